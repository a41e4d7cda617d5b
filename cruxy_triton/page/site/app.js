// The page: fields to request, reply to page, state to link. What is planned, drawn and refused comes from the worker.
const $ = (id) => document.getElementById(id);
const form = $("form");
const fields = [...form.querySelectorAll("[name]")];
const field = (name) => fields.find((each) => each.name === name);
const hidden = () => fields.filter((each) => each.type === "hidden");
const START = Object.fromEntries(fields.map((each) => [each.name, each.value]));
const LONGEST_LINK = 8000; // characters; browsers and mailers cut what is longer
const PATIENCE = 8000; // milliseconds that a new question waits for an old one
const configs = new Map(); // of Hugging Face ids, as the hub answered

// -- the worker: one question at a time, the newest waiting ------------------------------------------------

let worker, ready, asked, since, waiting, clock;

function launch() {
  worker?.terminate();
  ready = false;
  asked = undefined;
  $("progress").hidden = false;
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => heard(data);
  worker.onerror = () => refuse("", "The planner could not be started: this browser runs no module workers, or worker.js is missing.");
  worker.postMessage({ start: true });
}

function send(question) {
  asked = question;
  since = performance.now();
  worker.postMessage(question);
  clearInterval(clock);
  clock = setInterval(() => {
    const seconds = Math.round((performance.now() - since) / 1000);
    $("waiting").hidden = seconds < 3;
    $("waiting").firstElementChild.textContent = `Still computing (${seconds} s): a large model takes its time.`;
  }, 1000);
}

function settled() {
  asked = undefined;
  clearInterval(clock);
  $("waiting").hidden = true;
}

function ask() {
  waiting = { request: request() };
  $("detail").classList.add("stale");
  if (asked && performance.now() - since > PATIENCE) launch();
  else if (ready && !asked) next();
}

function next() {
  const question = waiting;
  waiting = undefined;
  if (question) send(question);
}

function heard(data) {
  if (data.progress !== undefined) {
    $("loading").value = data.progress;
    $("doing").textContent = `Loading Python: ${mega(data.done)} of ${mega(data.total)} MB`;
  } else if (data.starting) {
    $("doing").textContent = "Starting Python";
    $("loading").removeAttribute("value");
  } else if (data.ready) {
    ready = true;
    $("progress").hidden = true;
    keep();
    next();
  } else {
    const question = asked;
    settled();
    if (data.failed !== undefined) {
      $("progress").hidden = true;
      refuse("", data.failed);
      if (data.fatal && ready) launch(); // what failed while it started would fail again
    } else if (data.picture !== undefined) {
      if (!waiting) $("over-one-step")?.replaceChildren(...parsed(data.picture));
    } else if (data.reply.fetch !== undefined) fetchConfig(data.reply.fetch, question);
    else if (!waiting) answered(data.reply);
    if (ready && !asked) next();
  }
}

const mega = (bytes) => (bytes / 1e6).toFixed(1);

// -- the answer -----------------------------------------------------------------------------------------------

// Every text in it was escaped where it was made; a parsed document is inert, and the page's policy runs no inline script.
function parsed(html) {
  return [...new DOMParser().parseFromString(html, "text/html").body.childNodes];
}

function answered(reply) {
  unmark();
  if (reply.error !== undefined) return refuse(reply.field, reply.error);
  document.title = reply.title;
  $("verdict").replaceChildren(...parsed(reply.verdict));
  const drawn = $("over-one-step")?.childNodes ?? [];
  const detail = parsed(reply.detail);
  $("detail").replaceChildren(...detail);
  $("over-one-step").replaceChildren(...drawn); // the old picture stands until the new one comes
  $("detail").classList.remove("stale");
  for (const button of $("detail").querySelectorAll(".copy")) button.hidden = !navigator.clipboard;
  document.documentElement.dataset.answered = String(Number(document.documentElement.dataset.answered ?? 0) + 1);
  drawPicture();
}

function drawPicture() {
  const room = $("over-one-step")?.clientWidth;
  if (room && ready && !asked && !waiting) send({ picture: Math.max(280, Math.min(960, room)) });
}

function refuse(name, message) {
  const subject = document.createElement("p");
  subject.className = "error";
  subject.textContent = message;
  const title = document.createElement("p");
  title.className = "verdict none";
  title.textContent = "No plan";
  $("verdict").replaceChildren(title, subject);
  $("detail").replaceChildren();
  document.title = "No plan: will it fit?";
  document.documentElement.dataset.answered = String(Number(document.documentElement.dataset.answered ?? 0) + 1);
  const wrong = field(name);
  if (!wrong) return;
  wrong.setAttribute("aria-invalid", "true");
  $(`${name}-error`).textContent = message;
  if (wrong.closest("details")) wrong.closest("details").open = true;
}

function unmark() {
  for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
  for (const each of form.querySelectorAll(".error")) each.textContent = "";
}

// -- the state: form, request, link -----------------------------------------------------------------------------

function request() {
  const bySize = $("gpu").value === "";
  $("by-memory").hidden = !bySize;
  $("os").closest(".field").hidden = bySize;
  const off = bySize ? ["os"] : ["vram_bytes", "capability"];
  const values = Object.fromEntries(fields.filter((each) => !off.includes(each.name)).map((each) => [each.name, each.value]));
  const id = values.model.trim();
  if (!values.config && configs.has(id)) Object.assign(values, configs.get(id));
  return values;
}

function remember() {
  const changed = fields.filter((each) => each.value !== START[each.name]).map((each) => [each.name, each.value]);
  const hash = new URLSearchParams(changed).toString();
  const short = hash.length <= LONGEST_LINK;
  notice(short ? "" : "This config.json is too long for a link: the address of this page is that of an earlier plan.");
  if (short) history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function recall() {
  const given = new URLSearchParams(location.hash.slice(1));
  const odd = [...given.keys()].filter((name) => !field(name));
  for (const each of fields) {
    const value = given.get(each.name) ?? START[each.name];
    each.value = value.slice(0, 1 << 20);
    if (each.value !== value && each.tagName === "SELECT") {
      odd.push(`${each.name}=${value}`);
      each.value = START[each.name];
    }
    if (each.value && given.has(each.name) && each.closest("details")) each.closest("details").open = true;
  }
  notice(odd.length ? `Not understood in this link, and left out: ${odd.join(", ").slice(0, 300)}` : "");
  ask();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

let soon;
function changed() {
  clearTimeout(soon);
  soon = setTimeout(() => {
    remember();
    ask();
  }, 120);
}

// -- configs: from the hub, from a file -------------------------------------------------------------------------

async function fetchConfig(id, question) {
  const path = id.split("/").map(encodeURIComponent).join("/");
  try {
    const answer = await fetch(`https://huggingface.co/${path}/resolve/main/config.json`, {
      signal: AbortSignal.timeout(10000), credentials: "omit", referrerPolicy: "no-referrer",
    });
    configs.set(id, answer.ok ? { config: await answer.text() } : { config_status: String(answer.status) });
  } catch (error) {
    configs.set(id, { config_status: error.message || error.name });
    setTimeout(() => configs.delete(id), 5000); // the network may be back
  }
  if (question.request.model.trim() === field("model").value.trim()) ask();
}

async function open(file) {
  if (!file) return;
  field("config").value = await file.slice(0, (1 << 20) + 1).text();
  field("config_name").value = file.name;
  field("model").value = file.name;
  changed();
}

let inside = 0;
addEventListener("dragenter", () => ($("drop").hidden = ++inside <= 0));
addEventListener("dragleave", () => ($("drop").hidden = --inside <= 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  open(event.dataTransfer.files[0]);
});
$("file").addEventListener("change", () => open($("file").files[0]));

// -- buttons ----------------------------------------------------------------------------------------------------

form.addEventListener("input", (event) => {
  if (event.target === field("model")) for (const each of hidden()) each.value = "";
  if (event.target !== $("file")) changed();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", (event) => {
  event.preventDefault();
  for (const each of fields) each.value = START[each.name];
  $("file").value = "";
  changed();
});
addEventListener("hashchange", recall);
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(drawPicture, 300);
});
$("stop").addEventListener("click", () => {
  settled();
  waiting = undefined;
  refuse("", "Stopped. Change something to plan again.");
  launch();
});
$("detail").addEventListener("click", ({ target }) => {
  if (target.matches(".copy")) copy(target, target.previousElementSibling.textContent);
  if (!target.matches(".option")) return;
  for (const [name, value] of Object.entries(JSON.parse(target.dataset.pins))) field(name).value = value;
  changed();
  scrollTo({ top: 0 });
});
$("link").addEventListener("click", () => copy($("link"), location.href));

async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed to copy here";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

// -- offline: what was loaded is kept ---------------------------------------------------------------------------

async function keep() {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("sw.js");
    const manifest = await (await fetch("page.json")).json();
    const urls = [location.pathname, ...manifest.site, ...[...manifest.pyodide, manifest.archive].map((file) => file.url)];
    const wanted = urls.map((url) => new URL(url, location.origin + location.pathname).href);
    const cache = await caches.open("will-it-fit");
    for (const kept of await cache.keys()) if (!wanted.includes(kept.url)) await cache.delete(kept);
    for (const url of wanted) if (!/\/pyodide[@-]\d/.test(new URL(url).pathname) || !(await cache.match(url))) await cache.add(url);
    document.documentElement.dataset.kept = "true";
  } catch (error) {
    console.info(`Not kept for use offline: ${error.message}`);
  }
}

$("unstarted").remove();
launch();
recall();
