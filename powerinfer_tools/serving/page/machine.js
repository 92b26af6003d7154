// The machine at work: what /machine says, twice a second while the tab is open.

import { get } from "./api.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const KEPT = 240;
let timer = null;
let last = null;
const speeds = [];

export function startMachine(key) {
  stopMachine();
  const tick = async () => {
    try {
      draw(await get("/machine", key()));
    } catch (error) {
      tiles([["", error.message]]);
    }
  };
  timer = setInterval(tick, 500);
  tick();
}

export function stopMachine() {
  clearInterval(timer);
  timer = null;
}

function draw(now) {
  if (last && now.now > last.now) {
    speeds.push((now.tokens - last.tokens) / (now.now - last.now));
    if (speeds.length > KEPT) speeds.shift();
  }
  last = now;
  const engine = now.engine;
  tiles([
    [(speeds.at(-1) ?? 0).toFixed(0), "tokens per second"],
    [`${now.processing} / ${now.parallel}`, "requests computed"],
    [now.waiting, "requests waiting"],
    [share(engine.density), "of FFN neurons computed"],
    [share(now.cached_tokens / Math.max(1, now.cached_tokens + now.prompt_tokens)), "of prompts from the cache"],
    [now.requests, "requests answered"],
    [engine.mode ?? "", "mode"],
    [`${engine.threads ?? ""} × ${engine.isa ?? ""}`, "threads"],
  ]);
  plot();
  const memory = Object.entries(engine.memory ?? {}).filter(([name, size]) => name !== "total" && size > 0);
  const most = Math.max(1, ...memory.map(([, size]) => size));
  bars("memory", memory.map(([name, size]) => [name.replace("_", " "), size, most, bytes(size)]));
  const context = now.model.meta.n_ctx;
  bars("slots", now.slots.map((slot) => [
    `${slot.id}${slot.is_processing ? " · busy" : ""}`, slot.n_tokens, context, `${slot.n_tokens} / ${context}`]));
  layers(engine.layers ?? []);
}

function tiles(values) {
  $("tiles").replaceChildren(...values.map(([value, text]) => {
    const tile = document.createElement("div");
    tile.className = "tile";
    const bold = document.createElement("b");
    bold.textContent = value;
    const under = document.createElement("span");
    under.textContent = text;
    tile.append(bold, under);
    return tile;
  }));
}

function plot() {
  const high = Math.max(10, ...speeds) * 1.1;
  const points = speeds.map((speed, index) => `${(600 * (KEPT - speeds.length + index)) / (KEPT - 1)},${120 - (120 * speed) / high}`);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.join(" "));
  const ground = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", 600], ["y1", 119.5], ["y2", 119.5]]) ground.setAttribute(name, value);
  $("speed").replaceChildren(ground, line);
}

function meter(value, most) {
  const node = document.createElement("meter");
  node.max = most;
  node.value = value;
  return node;
}

function bars(id, rows) {
  $(id).replaceChildren(...rows.map(([name, value, most, text]) => {
    const row = document.createElement("div");
    row.className = "bar";
    const left = document.createElement("span");
    left.textContent = name;
    const right = document.createElement("span");
    right.textContent = text;
    row.append(left, meter(value, most), right);
    return row;
  }));
}

function shape(kind, facts) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(facts)) node.setAttribute(name, value);
  return node;
}

// A bar for each layer: the share of its neurons that a token had computed, from the ground what the hot device computed.
function layers(rows) {
  const wide = 600 / Math.max(1, rows.length), gap = Math.min(2, wide / 4);
  $("density").replaceChildren(...rows.flatMap((layer, index) => {
    const high = 120 * (layer.density ?? 0), hot = high * (layer.hot_share ?? 0);
    const place = { x: index * wide, width: wide - gap };
    return [
      shape("rect", { ...place, y: 0, height: 120, class: "all" }),
      shape("rect", { ...place, y: 120 - high, height: high - hot, class: "cold" }),
      shape("rect", { ...place, y: 120 - hot, height: hot, class: "hot" }),
    ];
  }));
  $("layers").replaceChildren(...rows.map((layer, index) => {
    const node = document.createElement("div");
    const facts = [`layer ${index}: ${layer.mode}`, `${share(layer.density)} of ${layer.units} computed`,
      `${layer.hot} of them on the hot device`];
    if (layer.hot && layer.hot_share !== null) facts.push(`which did ${share(layer.hot_share)} of the work`);
    node.title = facts.join(", ");
    const density = document.createElement("b");
    density.textContent = layer.density === null ? "–" : `${Math.round(100 * layer.density)} %`;
    node.append(density, meter(layer.hot, Math.max(1, layer.units)), layer.mode.slice(0, 5));
    return node;
  }));
}

const share = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–");

function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (size >= 1024 && at < units.length - 1) { size /= 1024; at += 1; }
  return `${size.toFixed(at ? 1 : 0)} ${units[at]}`;
}
