// The planner in Pyodide: unpacks the archive and gives the two things that can be asked.

export async function assemble(loadPyodide, options, archive) {
  const pyodide = await loadPyodide({
    // no package beside the standard library, so that Pyodide's list of packages need not be loaded
    lockFileContents: { info: { abi_version: "2026_0", arch: "wasm32", platform: "emscripten_5_0_3" }, packages: {} },
    ...options,
  });
  pyodide.unpackArchive(archive, "zip", { extractDir: "/planner" });
  // A plan makes and drops many small objects: the collector of cycles need not look after every few thousand.
  pyodide.runPython("import gc, sys; gc.set_threshold(200_000); sys.path.insert(0, '/planner')");
  const planner = pyodide.pyimport("cruxy_triton.page.answer").Planner();
  return {
    answer: (request) => JSON.parse(planner.answer(JSON.stringify(request))),
    picture: (width) => planner.picture(width),
  };
}
