// The page: follows events, asks again for what events do not tell, and shows it.

/** Events that are listed. */
const LISTED = 100;
/** Between questions for the device and for the map, in milliseconds, at least. */
const DEVICE_PAUSE = 2000;
const MAP_PAUSE = 500;
/** After how long without a change the map is asked for: memory becomes resident without an event. */
const MAP_IDLE = 5000;

const at = (id) => document.getElementById(id);
const map = new RegionMap(at("map"), at("map-readout"), at("map-scale"), at("map-table"));
const chart = new Chart(at("chart"));
const rate = new Rate();
const state = { device: null, changed: true, live: false, asOf: null, told: new Map() };

function show() {
  const { device } = state;
  if (!device) return;
  const { requested_size: requested, plugged_size: plugged, resident_size: resident } = device;
  at("place").textContent = `at ${address(device.addr)}${device.node_id === null ? "" : `, NUMA node ${device.node_id}`}`;
  at("requested").textContent = size(requested);
  at("plugged").textContent = size(plugged);
  at("resident").textContent = resident === null ? "unknown" : size(resident);
  at("resident-note").textContent = resident === null ? "guest memory is not mapped" : "what the host holds";
  at("region").textContent = size(device.region_size);
  at("region-note").textContent = `${size(device.usable_region_size)} usable, blocks of ${size(device.block_size)}`;
  mark("front-end", device.connected ? "good" : "bad", device.connected ? "front-end connected" : "no front-end");
  mark("migration", "held", "migration: blocks frozen");
  at("migration").hidden = !device.migration_active || !state.live;
  at("front-end").hidden = !state.live;
  document.title = `${size(plugged)} of ${size(requested)} plugged – virtio-mem device`;
  document.querySelector("main").setAttribute("aria-busy", String(!state.live));
  showProgress();
}

/** How far a resize is, in a bar and a sentence. */
function showProgress() {
  const { requested_size: requested, plugged_size: plugged, connected, migration_active: frozen } = state.device;
  const speed = rate.now();
  const quiet = rate.last === null ? null : (Date.now() - rate.last) / 1000;
  at("progress").value = requested ? Math.min(1, plugged / requested) : plugged ? 0 : 1;
  at("rate").textContent = speed ? `${speed > 0 ? "+" : "−"}${size(Math.abs(speed))}/s` : "0 B/s";
  at("last-change").textContent = quiet === null ? "none seen" : quiet < 2 ? "now" : `${duration(quiet)} ago`;
  const left = requested - plugged;
  const moves = speed !== 0 && Math.sign(speed) === Math.sign(left);
  const what = `${size(Math.abs(left))} ${left > 0 ? "to plug" : "to unplug"}`;
  let text = `the guest has plugged what is requested, ${size(plugged)}.`;
  if (left && frozen) text = `${what}; blocks are frozen while migration is active.`;
  else if (left && !connected) text = `${what}; no front-end is connected.`;
  else if (left && moves) text = `${what}; about ${duration(left / speed)} at the present rate.`;
  else if (left && quiet !== null) text = `${what}; no change by the guest for ${duration(quiet)}.`;
  else if (left) text = `${what}; no change by the guest since this page was opened.`;
  text = state.live ? sentence(text) : `As of ${clock(state.asOf)}: ${text}`;
  if (at("progress-text").textContent !== text) at("progress-text").textContent = text;
  showReason();
}

/** What keeps the guest, as far as the device knows. */
function showReason() {
  const { resize } = state.device;
  const text = stall(resize) ?? "";
  at("reason").hidden = !text || !state.live;
  if (at("reason").textContent !== text) at("reason").textContent = text;
}

/** Why a resize stands still, in a sentence; nothing when it does not, or the daemon does not tell. */
function stall(resize) {
  if (resize?.state !== "stalled" || !resize.reason) return undefined;
  const since = resize.since ? ` since ${clock(new Date(resize.since))}` : "";
  return `The resize stands still${since}: ${resize.reason.text}`;
}

/** A resize in a few words, for the list of events. */
function resizeInWords(resize) {
  return `resize: ${resize.state}${resize.reason ? ` (${resize.reason.text})` : ""}`;
}

function mark(id, kind, text) {
  at(id).dataset.state = kind;
  at(id).textContent = text;
  at(id).hidden = false;
}

/** Takes an event up. The first ones of a connection tell the state: only what differs from before is news. */
function take({ name, data }) {
  const { device } = state;
  if (!device) return;
  const texts = {
    "requested-size": () => `requested size: ${size(device.requested_size = data.requested_size)}`,
    "plugged-size": () => `plugged size: ${size(device.plugged_size = data.plugged_size)}`,
    migration: () => `migration: ${(device.migration_active = data.active) ? "active" : "not active"}`,
    connected: () => `front-end: ${(device.connected = data.connected) ? "connected" : "not connected"}`,
    resize: () => resizeInWords(device.resize = data),
    stray: () => `unplugged memory that was in use: ${size(data.swept_size)}, discarded`,
    disconnected: () => `front-end: ${(device.connected = data.connected) ? "connected" : "not connected"}`,
  };
  const text = texts[name]?.() ?? `${name}: ${JSON.stringify(data)}`;
  if (name === "plugged-size") rate.add(data.plugged_size);
  if (name !== "resize") state.changed = true;
  const kind = name.endsWith("connected") ? "front-end" : name;
  // How fast a resize is changes all the time.
  const now = name === "resize" ? text : JSON.stringify(data);
  const before = state.told.get(kind);
  state.told.set(kind, now);
  if (kind === "stray" || (before !== undefined && before !== now)) list(kind, text);
}

/** Lists an event; a series of the same kind within a second is one line, its last. */
function list(name, text) {
  const first = at("events").firstElementChild;
  const time = new Date();
  const again = first?.dataset.name === name && time - first.dataset.time < 1000;
  const item = again ? first : document.createElement("li");
  if (!again) {
    item.dataset.name = name;
    item.dataset.time = time.getTime();
    item.append(document.createElement("time"), document.createElement("span"));
    at("events").prepend(item);
    at("no-events").hidden = true;
  }
  item.firstElementChild.textContent = clock(time);
  item.lastElementChild.textContent = text;
  while (at("events").childElementCount > LISTED) at("events").lastElementChild.remove();
}

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** A page that is not seen asks for nothing. */
async function seen() {
  while (document.hidden) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

async function readDevice(signal) {
  state.device = await (await get("/v1/device", signal)).json();
  state.live = true;
  state.asOf = new Date();
  rate.add(state.device.plugged_size);
  if (!chart.samples.length) chart.add(state.device);
  show();
}

async function followDevice(signal) {
  for (;;) {
    await pause(DEVICE_PAUSE);
    await seen();
    await readDevice(signal);
  }
}

async function followEvents(signal) {
  for await (const event of events(signal)) {
    take(event);
    requestAnimationFrame(show);
  }
  throw new Error("The daemon ended the stream of events.");
}

/** Reads the map when something changed, and now and then; the longer that takes, the less often. */
async function followMap(signal) {
  for (;;) {
    await seen();
    const begun = Date.now();
    state.changed = false;
    const sums = new Sums(state.device);
    for (const resource of ["/v1/device/blocks", "/v1/device/resident"]) {
      let list = "";
      await readRanges(resource, signal, (name) => { list = name; }, (range) => sums.add(list, range));
    }
    map.show(state.device, sums);
    const took = Date.now() - begun;
    await pause(Math.max(MAP_PAUSE, 4 * took));
    const idle = Date.now() + MAP_IDLE;
    while (!state.changed && Date.now() < idle) await pause(100);
  }
}

/** What to say of an error. */
function explain(error) {
  if (error.status === 401) return "Open this page with the address that “vmemctl ui” printed: it has a token that this tab lacks.";
  if (error instanceof TypeError) return "No answer: “vmemctl ui” may have ended. Trying again.";
  return `${sentence(error.message)} Trying again.`;
}

async function run() {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 10_000)) {
    const end = new AbortController();
    try {
      await readDevice(end.signal);
      mark("link", "good", "live");
      at("trouble").hidden = true;
      wait = 500;
      await Promise.race([followEvents, followDevice, followMap].map((follow) => follow(end.signal)));
    } catch (error) {
      end.abort();
      state.live = false;
      show();
      mark("link", "bad", "not connected");
      at("trouble").textContent = explain(error);
      at("trouble").hidden = false;
    }
    await pause(wait);
  }
}

setInterval(() => {
  if (!state.live) return;
  chart.add(state.device);
  showProgress();
}, 1000);
for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
  matchMedia(query).addEventListener("change", () => {
    map.draw();
    chart.draw();
  });
}
run();
