"use strict";
// Elements, numbers and scales. Whatever comes from a file enters the page as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);

function element(space, name, attributes, children) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const h = (name, attributes, ...children) => element(null, name, attributes, children);
const s = (name, attributes, ...children) => element("http://www.w3.org/2000/svg", name, attributes, children);

const missing = (part) => h("p", { class: "missing" }, part.missing);
const colour = (index) => `var(--c${index % 7})`;
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function number(value, digits = 3, zeros = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) {
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    const raised = [...String(Number(power))].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("");
    const shown = String(Number(mantissa));
    return (shown === "1" ? "" : shown.replace("-", "−") + "×") + "10" + raised;
  }
  const text = size >= 1000 ? String(Math.round(value)) : zeros ? value.toPrecision(digits) : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−").replace(/\B(?=(\d{3})+$)/, size >= 10000 ? "\u202f" : "");
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit += 1; }
  return `${Number(value.toPrecision(3))} ${units[unit]}`;
}

// A function from numbers to pixels with its ticks; logarithmic if asked for.
function scale([low, high], [from, to], log = false) {
  const f = log ? Math.log10 : (v) => v;
  if (low === high) { high = log ? low * 10 : low + 1; }
  const at = (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
  at.ticks = log ? logTicks(low, high) : linearTicks(low, high, Math.abs(to - from) > 300 ? 6 : 4);
  at.log = log;
  return at;
}
// As many digits as tell neighbouring ticks apart.
function tickText(ticks) {
  const gap = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : 1;
  return (tick) => number(tick, Math.max(1, Math.floor(Math.log10(Math.abs(tick) / gap || 1) + 1e-9) + 2));
}
function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((v) => v >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(i * step);
  return ticks;
}
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.ceil((last - first) / 6);
  const within = (v) => v >= low * 0.999 && v <= high * 1.001;
  const ticks = [];
  for (let power = first; power <= last; power += every) ticks.push(10 ** power);
  if (ticks.filter(within).length >= 2) return ticks.filter(within);
  const finer = [];
  for (let power = first; power <= last; power += 1) finer.push(...[1, 2, 5].map((m) => m * 10 ** power));
  return finer.filter(within);
}
function extent(values, log = false) {
  const some = values.filter((v) => Number.isFinite(v) && v !== null && (!log || v > 0));
  return some.length ? [some.reduce((a, b) => Math.min(a, b)), some.reduce((a, b) => Math.max(a, b))] : null;
}

// An element that is drawn for its width, and drawn again when that changes; draw(width) returns nodes.
function drawn(draw, label) {
  const box = h("div", { role: "img", "aria-label": label });
  box.redraw = () => { if (box.clientWidth) box.replaceChildren(...[draw(box.clientWidth)].flat()); };
  let width = 0;
  new ResizeObserver(() => { if (box.clientWidth !== width) { width = box.clientWidth; box.redraw(); } }).observe(box);
  return box;
}

function figure(title, caption, ...content) {
  return h("figure", {}, h("figcaption", {}, h("h3", {}, title), caption), ...content);
}

function legend(entries) {
  return h("ul", { class: "legend" }, entries.map(([name, c]) =>
    h("li", {}, h("span", { class: "swatch", "--c": c }), name)));
}

// Buttons of which one is chosen.
let groups = 0;
function pills(title, names, chosen, choose, swatches = false) {
  const group = `group-${groups += 1}`;
  return h("fieldset", { class: "pills" }, h("legend", {}, title), names.map((name, i) =>
    h("label", {}, h("input", { type: "radio", name: group, checked: i === chosen, onchange: () => choose(i) }),
      swatches && h("span", { class: "swatch", "--c": colour(i) }), h("span", {}, name))));
}
