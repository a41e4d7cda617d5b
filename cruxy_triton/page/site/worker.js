// The planner's own thread: fetches Pyodide and the archive, checks their hashes, and answers one request at a time.
import { assemble } from "./engine.js";

let planner;

onmessage = async ({ data }) => {
  try {
    if (data.start) {
      planner = await load();
      postMessage({ ready: true });
    } else if (data.picture) {
      postMessage({ picture: planner.picture(data.picture) });
    } else {
      postMessage({ reply: planner.answer(data.request) });
    }
  } catch (error) {
    // Python's own errors leave the interpreter whole; after any other it is not to be trusted.
    const lines = String(error?.message ?? error).trim().split("\n");
    postMessage({ failed: lines.at(-1), fatal: error?.constructor?.name !== "PythonError" });
  }
};

async function load() {
  const manifest = await (await fetch("page.json", { cache: "no-cache" })).json();
  const files = [...manifest.pyodide, manifest.archive];
  const total = files.reduce((sum, file) => sum + file.size, 0);
  let done = 0;
  const progress = (bytes) => postMessage({ progress: (done += bytes) / total, done, total });
  const contents = await Promise.all(files.map((file) => fetchChecked(file, progress)));
  const named = Object.fromEntries(files.map((file, i) => [file.name, contents[i]]));
  postMessage({ starting: true });

  // What was checked is what runs: Pyodide's modules come from memory, and its own two requests are answered from it.
  const { loadPyodide } = await importText(named["pyodide.mjs"]);
  const { default: createPyodideModule } = await importText(named["pyodide.asm.mjs"]);
  const outside = self.fetch;
  self.fetch = async (input) => {
    const name = String(input).split("/").at(-1);
    if (!(name in named)) throw new Error(`${name} is none of the files that were checked`);
    const type = name.endsWith(".wasm") ? "application/wasm" : "application/zip";
    return new Response(named[name], { headers: { "Content-Type": type } });
  };
  try {
    const indexURL = new URL("./", location).href;
    return await assemble(loadPyodide, { indexURL, createPyodideModule }, named[manifest.archive.name]);
  } finally {
    self.fetch = outside;
  }
}

async function importText(bytes) {
  const url = URL.createObjectURL(new Blob([bytes], { type: "text/javascript" }));
  try {
    return await import(url);
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function fetchChecked({ url, integrity, name }, progress) {
  // Where the browser has no digests (a page that is not served securely) it checks by itself, without progress.
  const own = self.crypto?.subtle;
  const answer = await fetch(url, own ? {} : { integrity });
  if (!answer.ok) throw new Error(`${url}: the server answered ${answer.status}`);
  const chunks = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    progress(value.length);
  }
  const bytes = await new Blob(chunks).arrayBuffer();
  if (own) {
    const hash = new Uint8Array(await own.digest("SHA-384", bytes));
    const found = `sha384-${btoa(String.fromCharCode(...hash))}`;
    if (found !== integrity) throw new Error(`${name} is not the file that this page was built with; it was not run`);
  }
  return bytes;
}
