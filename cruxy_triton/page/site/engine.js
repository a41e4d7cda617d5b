// The planner in Pyodide: unpacks the archive and gives the two things that can be asked.

export async function assemble(loadPyodide, options, archive) {
  const pyodide = await loadPyodide({
    // no package beside the standard library, so that Pyodide's list of packages need not be loaded
    lockFileContents: { info: { abi_version: "2026_0", arch: "wasm32", platform: "emscripten_5_0_3" }, packages: {} },
    ...options,
  });
  pyodide.unpackArchive(archive, "zip", { extractDir: "/planner" });
  pyodide.runPython("import sys; sys.path.insert(0, '/planner')");
  const planner = pyodide.pyimport("cruxy_triton.page.answer").Planner();
  return {
    answer: (request) => JSON.parse(planner.answer(JSON.stringify(request))),
    picture: (width) => planner.picture(width),
  };
}
