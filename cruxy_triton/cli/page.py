"""`cruxy-triton page`: the planner as a folder of static files that runs in the browser, for any web server."""

import argparse
import functools
import http.server
import sys
from pathlib import Path

from cruxy_triton.errors import UserError

DESCRIPTION = """\
Writes the memory planner as a page: static files that any host serves. The browser runs the planner of this
package in Python (Pyodide), which comes from a CDN, or from a folder with --pyodide.

  cruxy-triton page --out site
  cruxy-triton page --out site --pyodide node_modules/pyodide --serve
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--out", metavar="DIR", help="folder to write; an older page in it is replaced")
    parser.add_argument("--pyodide", metavar="DIR", help="the npm package pyodide, copied into the folder")
    parser.add_argument("--serve", action="store_true", help="show the page on this machine's loopback address")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port of --serve (default: a free one)")


def run(args: argparse.Namespace) -> int:
    from cruxy_triton.page.build import build

    if args.out is None:
        raise UserError("where to? For example: cruxy-triton page --out site")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}; expected a whole number from 0 to 65535")
    written = build(args.out, args.pyodide)
    for name, size in written.items():
        print(f"  {size:>10,}  {name}")
    where = "in the folder" if args.pyodide else "from its CDN"
    print(f"{Path(args.out)}: {len(written)} files, {sum(written.values()):,} bytes; Pyodide is loaded {where}")
    if args.serve:
        serve(Path(args.out), args.port)
    else:
        print("serve it with any web server; browsers do not run it from a file:// address")
    return 0


class _Handler(http.server.SimpleHTTPRequestHandler):
    # What a system's own table may lack or have wrong.
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map,  # noqa: RUF012 (http.server's own)
                      ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}  # fmt: skip

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: Path, port: int) -> None:
    """Serve `folder` on 127.0.0.1 until interrupted."""
    handler = functools.partial(_Handler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"--port {port} cannot be had ({error.strerror}); leave --port out for a free one") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ (only this machine sees it; stop with Ctrl+C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
