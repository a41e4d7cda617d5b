// Answers a list of requests with the built folder's own engine and archive: node drive.mjs SITE NODE_MODULES < requests
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [site, modules] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(site, name));
const manifest = JSON.parse(read("page.json"));
const { assemble } = await import(`data:text/javascript,${encodeURIComponent(read("engine.js"))}`);
const { loadPyodide } = await import(pathToFileURL(path.join(modules, "pyodide", "pyodide.mjs")));

const say = (value) => console.log(JSON.stringify(value));
const cpu = () => (process.cpuUsage().user + process.cpuUsage().system) / 1e6;
const timed = (work) => {
  const before = [performance.now(), cpu()];
  return [work(), (performance.now() - before[0]) / 1e3, cpu() - before[1]];
};

const before = [performance.now(), cpu()];
const planner = await assemble(loadPyodide, {}, new Uint8Array(read(manifest.archive.url)));
say({ started: (performance.now() - before[0]) / 1e3, cpu: cpu() - before[1] });
for (const request of JSON.parse(fs.readFileSync(0, "utf8"))) {
  const [reply, seconds, used] = timed(() => planner.answer(request));
  const [picture, drawing] = reply.plan ? timed(() => planner.picture(720)) : [undefined, 0];
  say({ reply, seconds, cpu: used, drawing, picture: picture?.length });
}
