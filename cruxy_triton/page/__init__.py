"""The planner as a page: a folder of static files that runs the planner of this package, unchanged, in the browser.

`form` makes the form from `cruxy_triton.settings`, `build` writes the folder, `answer` is what the browser calls,
`words` turns a plan into HTML (for the page and for `cruxy-triton plan --html`). `site/` has what is no Python.
"""
