// The built page in Chromium, as people use it: node browser.mjs SITE NODE_MODULES < {"chromium", "shots", "hostile"}
// Prints a JSON line per scene: what was seen, errors of the console, requests to elsewhere, axe-core's findings.
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [site, modules] = process.argv.slice(2);
const given = JSON.parse(fs.readFileSync(0, "utf8"));
const { chromium } = (await import(pathToFileURL(path.join(modules, "playwright-core", "index.mjs"))));
const axe = fs.readFileSync(path.join(modules, "axe-core", "axe.min.js"), "utf8");
const say = (value) => console.log(JSON.stringify(value));

const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json", ".svg": "image/svg+xml", ".wasm": "application/wasm" };
let served = true, tampered;
const server = http.createServer((request, answer) => {
  const name = path.join(site, decodeURIComponent(new URL(request.url, "http://x").pathname).replace(/\/$/, "/index.html"));
  if (!served) return request.destroy();
  if (!fs.existsSync(name)) return answer.writeHead(404).end();
  answer.writeHead(200, { "Content-Type": types[path.extname(name)] ?? "application/octet-stream" });
  if (tampered && name.endsWith(tampered)) return answer.end(fs.readFileSync(name, "utf8") + " ");
  fs.createReadStream(name).pipe(answer);
}).listen(0, "127.0.0.1");
await new Promise((done) => server.on("listening", done));
const home = `http://127.0.0.1:${server.address().port}/`;

const browser = await chromium.launch({
  executablePath: given.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

async function scene(name, { width = 1280, scheme = "light", hash = "", hub = {} }, play = async () => {}) {
  const context = await browser.newContext({ viewport: { width, height: width > 600 ? 900 : 844 }, colorScheme: scheme });
  const page = await context.newPage();
  page.setDefaultTimeout(120_000);
  const seen = { scene: name, errors: [], elsewhere: [], dialogs: 0 };
  page.on("console", (line) => ["error", "warning"].includes(line.type()) && seen.errors.push(line.text()));
  page.on("pageerror", (error) => seen.errors.push(error.message));
  page.on("dialog", (dialog) => (seen.dialogs++, dialog.dismiss()));
  context.on("request", (request) => !request.url().startsWith(home) && !/^(blob|data):/.test(request.url()) && seen.elsewhere.push(request.url()));
  await page.route("https://huggingface.co/**", (route) => {
    const body = hub[new URL(route.request().url()).pathname];
    const headers = { "Access-Control-Allow-Origin": "*" };
    return route.fulfill(body ? { status: 200, body, headers } : { status: 404, headers });
  });
  const t = performance.now();
  await page.goto(home + hash);
  await answered(page, 0);
  seen.first = (performance.now() - t) / 1e3;
  await play(page, seen, context);
  await context.close();
  say(seen);
}

const count = (page) => page.evaluate(() => Number(document.documentElement.dataset.answered ?? 0));
const answered = (page, before) =>
  page.waitForFunction((n) => Number(document.documentElement.dataset.answered ?? 0) > n && !document.querySelector("#detail.stale:not(:empty)"), before);
const verdict = (page) => page.locator("#verdict").innerText();
async function after(page, act) {
  const before = await count(page), t = performance.now();
  await act();
  await answered(page, before);
  return [(await verdict(page)).replaceAll("\u00a0", " "), (performance.now() - t) / 1e3];
}
const chart = (page) => page.locator("figure svg.chart").waitFor();
async function look(page, seen, name) {
  if (given.shots) await page.screenshot({ path: path.join(given.shots, `${name}.png`), fullPage: true });
  const found = await page.evaluate(`${axe}; axe.run(document)`);
  (seen.axe ??= []).push(...found.violations.map(({ id, impact, nodes }) => ({ id, impact, at: nodes.map((n) => n.target.join(" ")).slice(0, 4) })));
}
async function drop(page, name, text) {
  await page.evaluate(([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, { type: "application/json" }));
    for (const type of ["dragenter", "dragover", "drop"])
      document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }, [name, text]);
}

for (const [width, scheme] of [[1280, "light"], [390, "dark"], [1280, "dark"], [390, "light"]]) {
  await scene(`opens ${width} ${scheme}`, { width, scheme }, async (page, seen) => {
    seen.verdict = await verdict(page);
    await chart(page);
    await look(page, seen, `opens-${width}-${scheme}`);
    seen.wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    seen.at = await page.locator("figure output").innerText();
    await page.locator("figure input").focus();
    await page.keyboard.press("Home");
    seen.start = await page.locator("figure output").innerText();
    const box = await page.locator("figure svg").boundingBox();
    await page.mouse.move(box.x + box.width - 5, box.y + box.height / 2);
    seen.end = await page.locator("figure output").innerText();
  });
}

await scene("longer and longer", { hash: "#model=qwen2.5-1.5b&way=lora-16" }, async (page, seen) => {
  seen.steps = [];
  for (const length of [256, 512, 1024, 2048, 4096]) {
    seen.steps.push([length, ...(await after(page, () => page.fill("#max_seq_length", String(length))))]);
  }
  await chart(page);
  await look(page, seen, "does-not-fit");
  seen.remedy = await page.locator("button.option").first().innerText();
  [seen.remedied] = await after(page, () => page.locator("button.option").first().click());
  seen.link = page.url();
  seen.refused = (await after(page, () => page.fill("#max_seq_length", "many")))[0];
  seen.beside = await page.locator("#max_seq_length-error").innerText();
  seen.invalid = await page.locator("#max_seq_length").getAttribute("aria-invalid");
  await look(page, seen, "refused");
  [seen.reset] = await after(page, () => page.click("button[type=reset]"));
});

await scene("configs", { hub: { "/some/model/resolve/main/config.json": given.good } }, async (page, seen) => {
  [seen.dropped] = await after(page, () => drop(page, "config.json", given.good));
  const link = page.url();
  seen.name = await page.locator(".subject").innerText();
  [seen.broken] = await after(page, () => drop(page, "config.json", given.good.slice(0, 50)));
  seen.beside = await page.locator("#model-error").innerText();
  [seen.hub] = await after(page, () => page.fill("#model", "some/model"));
  [seen.absent] = await after(page, () => page.fill("#model", "no/such"));
  [seen.shared] = await after(page, () => page.goto(link));
});

await scene("shared link", { hash: "#gpu=t4&model=phi-2&max_seq_length=512&lora_r=4&odd=1" }, async (page, seen) => {
  seen.verdict = await verdict(page);
  seen.fields = await page.evaluate(() => ["gpu", "model", "max_seq_length", "lora_r"].map((id) => document.getElementById(id).value));
  seen.open = await page.locator("#rest").evaluate((rest) => rest.open);
  seen.notice = await page.locator("#notice").innerText();
});

await scene("offline", {}, async (page, seen, context) => {
  await page.waitForFunction(() => document.documentElement.dataset.kept);
  served = false;
  await page.reload();
  await answered(page, 0);
  seen.verdict = await verdict(page);
  served = true;
});

tampered = "pyodide.asm.mjs";
await scene("tampered", {}, async (page, seen) => {
  seen.verdict = await verdict(page);
});
tampered = undefined;

await scene("stop", {}, async (page, seen) => {
  drop(page, "config.json", JSON.stringify({ ...JSON.parse(given.good), num_hidden_layers: 9000 }));
  await page.locator("#stop").click(); // visible after three seconds
  seen.stopped = await verdict(page);
  [seen.again] = await after(page, () => page.click("button[type=reset]"));
});

await scene("keyboard", {}, async (page, seen) => {
  seen.order = [];
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    const id = await page.evaluate(() => (document.activeElement.id || document.activeElement.textContent.trim().slice(0, 20)));
    if (seen.order.includes(id)) break;
    seen.order.push(id);
  }
});

await scene("hostile", {}, async (page, seen) => {
  await page.exposeFunction("hacked", () => seen.dialogs++);
  await page.evaluate(() => (window.alert = window.hacked));
  seen.results = [];
  const state = async (said) =>
    seen.results.push([said[0].slice(0, 160), ...(await page.evaluate(() => [
      document.querySelectorAll("main img, main script, main iframe, main a, main b, #answer svg, #notice *").length,
      [...document.querySelectorAll("body *")].filter((e) => [...e.attributes].some((a) => a.name.startsWith("on"))).length,
      ({}).polluted === undefined && !("x" in window),
    ]))]);
  for (const text of given.hostile.configs) await state(await after(page, () => drop(page, "<img src=x onerror=alert(1)>.json", text)));
  for (const link of given.hostile.links) {
    await state(await after(page, () => page.evaluate((link) => (location.hash = `#_=${Math.random()}&${link}`), link)));
  }
  await after(page, () => page.click("button[type=reset]"));
  seen.verdict = await verdict(page);
});

await browser.close();
server.close();
