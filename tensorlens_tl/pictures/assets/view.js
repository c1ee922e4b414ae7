/* The core of every page: data, words, colours, controls. A page is this file and one file a kind.

To add a kind NAME:
  1. assets/NAME.js sets  views.NAME = (box, data, watch) => api;  the file is loaded where used.
       box    an empty element to fill
       data   the View's data; every NumPy array is a typed array with a property `shape`
       watch  watch(f) calls f now, and again when the width or the colour scheme changes
       api    anything tests may ask; it is tensorlens.views[i]
  2. Python: View("NAME", {...}).
Use make, svg, slider, choice, button, tip, say, number, palette below. Text goes in by make(…, text),
never as HTML. Colours are the variables of view.css; styles are set by element.style, since the page
forbids style attributes. Every control needs a label; a drawing needs role, aria-label and tabindex,
and arrow keys that do what the mouse does. */
"use strict";
const views = {}, tensorlens = (window.tensorlens = { ready: false, views: [] });

// --- Elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return element;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const SVG = fill(document.createElement("template"), {}, []);
SVG.innerHTML = "<svg></svg>";
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG.content.firstChild.namespaceURI, tag), attributes, children);

let ids = 0;
function labelled(label, control, ...after) {
  control.id = `c${++ids}`;
  return make("span", { class: "control" }, make("label", { for: control.id }, label), control, ...after);
}
function slider(label, names, at, change) {
  const out = make("output", {}, names[at]);
  const input = make("input", { type: "range", min: 0, max: names.length - 1, value: at, "aria-valuetext": names[at] });
  input.addEventListener("input", () => {
    out.textContent = names[+input.value];
    input.setAttribute("aria-valuetext", names[+input.value]);
    change(+input.value);
  });
  return labelled(label, input, out);
}
function choice(label, names, at, change) {
  const select = make("select", { onchange: () => change(select.selectedIndex) },
    names.map((name, i) => make("option", { selected: i === at ? "" : null }, name)));
  return labelled(label, select);
}
function tick(label, on, change) {
  const box = make("input", { type: "checkbox", onchange: () => change(box.checked) });
  box.checked = on;
  return labelled(label, box);
}
const button = (text, press) => make("button", { type: "button", onclick: press }, text);
function save(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Arrow keys as steps to the right and down: act(right, down, event).
function arrows(element, act) {
  element.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    act(...by, event);
  });
}
// What an element says below the pointer.
const tips = (words) => ({ onpointermove: (event) => { event.stopPropagation(); tip(event, words(event)); }, onpointerleave: (event) => tip(event, "") });
const saveSvg = (name, text) => button("Save SVG", () => save(name, new Blob([text()], { type: "image/svg+xml" })));

// --- Words

// A number as Python's f"{x:+.4g}" writes it.
function number(x, digits = 4, plus = true) {
  if (Number.isNaN(x)) return "nan";
  const sign = x < 0 || Object.is(x, -0) ? "-" : plus ? "+" : "";
  x = Math.abs(x);
  if (x === Infinity) return sign + "inf";
  if (x === 0) return sign + "0";
  const [mantissa, power] = x.toExponential(digits - 1).split("e");
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power >= -4 && power < digits) return sign + trim(x.toFixed(digits - 1 - power));
  return `${sign}${trim(mantissa)}e${power[0]}${power.slice(1).padStart(2, "0")}`;
}
const percent = (x) => (Number.isFinite(x) ? `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %` : "–");
// A token as one line; marks keep right-to-left text from moving what stands beside it.
function shown(token, most = 200) {
  const text = Array.from(token.replace(/\n/g, "\\n").replace(/\t/g, "\\t"));
  const cut = text.length > most ? text.slice(0, most - 1).join("") + "…" : text.join("");
  return `\u2068${cut}\u2069`;
}
// A name that may hold a token: a token from right to left keeps its place among what stands beside it.
const placed = (name) => (/[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(name) ? `\u200e${name.replace(/["']/g, "$&\u200e")}` : name);
// A name on few lines; the whole stands in the title of its element.
const briefly = (name) => (name.length > 90 ? `${Array.from(name).slice(0, 89).join("")}…` : name).replace(/\n/g, "\\n").replace(/\t/g, "\\t");
const quoted = (token, i) => `“${shown(token)}” @${i}`; // a token at its position

const hint = make("div", { class: "tip", "aria-hidden": "true" });
function tip(event, text) {
  hint.textContent = text || "";
  hint.style.display = text ? "block" : "none";
  if (!text) return;
  const { innerWidth: w, innerHeight: h } = window, { offsetWidth: a, offsetHeight: b } = hint;
  hint.style.left = `${Math.max(4, Math.min(event.clientX + 14, w - a - 8))}px`;
  hint.style.top = `${event.clientY + 18 + b > h ? Math.max(4, event.clientY - b - 12) : event.clientY + 18}px`;
}
const spoken = make("div", { class: "spoken", role: "status", "aria-live": "polite" });
const say = (text) => (spoken.textContent = text);

// A table of [label, value] with bars: the largest first, and the rest behind "N more".
function listing(rows, { title, total = 0, most = 12, heading = "value", signed = true }) {
  const sorted = [...rows].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]) || 0);
  const top = Math.max(...sorted.map((row) => (Number.isFinite(row[1]) ? Math.abs(row[1]) : 0)), 0);
  const body = make("tbody"), more = make("button", { type: "button", class: "more" });
  let count = 0;
  function add(n) {
    for (const [label, value] of sorted.slice(count, count + n)) {
      const bar = make("span", { class: signed ? (value < 0 ? "bar neg" : "bar pos") : "bar size" });
      bar.style.width = `${top ? (60 * Math.abs(value || 0)) / top : 0}px`;
      body.append(make("tr", {}, make("th", { scope: "row" }, make("bdi", { dir: "ltr", title: label.length > 90 ? label : null }, placed(briefly(label)))),
        make("td", { class: "num" }, number(value)), make("td", {}, bar),
        total ? make("td", { class: "num quiet" }, percent(Math.abs(value) / total)) : null));
    }
    count = Math.min(count + n, sorted.length);
    more.textContent = `${sorted.length - count} more`;
    more.hidden = count === sorted.length;
  }
  more.addEventListener("click", () => add(sorted.length));
  add(most);
  return make("div", { class: "listing" },
    make("table", {}, make("caption", {}, title),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "from"),
        make("th", { scope: "col", class: "num" }, heading), make("th", { scope: "col" }, make("span", { class: "spoken" }, "bar")),
        total ? make("th", { scope: "col", class: "num" }, "of Σ|·|") : null)), body), more);
}

// --- Colours

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function rgb(name) {
  const hex = css(name);
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}
// 511 colours as little-endian words for ImageData: −1 … 0 … +1 by the root of |share|.
// Numbers that have no sign, such as shares, have a hue of their own.
const hue = (signed, x = 1) => (signed ? (x < 0 ? "--neg" : "--pos") : "--size");
function palette(signed = true) {
  const ground = rgb("--ground"), word = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;
  const mix = (ink, t) => word(ground.map((c, i) => Math.round(c + (ink[i] - c) * t)));
  const [neg, pos] = [rgb("--neg"), rgb(hue(signed))], table = new Uint32Array(511);
  for (let i = 0; i < 256; i++) {
    table[255 + i] = mix(pos, i / 255);
    table[255 - i] = mix(neg, i / 255);
  }
  const none = word(rgb("--none")), odd = word(rgb("--odd"));
  return {
    none, odd,
    // The word of a value where `top` has full colour.
    word: (x, top) => x !== x ? odd
      : table[255 + Math.sign(x) * Math.round(255 * Math.sqrt(Math.min(1, top ? Math.abs(x) / top : 0)))],
    css: (word) => `rgb(${word & 255} ${(word >> 8) & 255} ${(word >> 16) & 255})`,
  };
}
// What the colours mean, with ticks at full and at half strength.
function legend(top, unit, both = true, signed = true) {
  const colours = palette(signed);
  const steps = (!top ? [0] : both ? [-1, -0.25, 0, 0.25, 1] : [0, 0.0625, 0.25, 1]).map((t) => {
    const cell = make("span", { class: "swatch" });
    cell.style.background = colours.css(colours.word(t * top, top));
    return make("span", { class: "step" }, cell, number(t * top, 3, both && t));
  });
  return make("div", { class: "legend" }, steps, make("span", { class: "quiet" }, unit));
}

// Round numbers between two ends, about five of them.
function ticks(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((k) => k * power >= raw) || 10), found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step || 0);
  return found;
}
// A scale down a drawing: the place of a value, and lines with numbers from `left` to `right`.
function axis(low, high, top, bottom, left, right) {
  const y = (v) => top + ((high - v) / (high - low)) * (bottom - top);
  return [y, ticks(low, high).flatMap((v) => [
    svg("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: css(v ? "--line" : "--quiet") }),
    svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, number(v, 3, false))])];
}
// What a mark means.
const key = (text, mark, size = 26) => make("span", { class: "step" }, svg("svg", { width: size, height: 10, "aria-hidden": "true" }, mark), text);
const dashKey = (text, ink, dash) => key(text, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: `var(${ink})`, "stroke-width": 2.5, "stroke-dasharray": dash }));
const barKey = (text, ink) => key(text, svg("rect", { width: 14, height: 10, rx: 2, fill: `var(${ink})` }), 14);
// A drawing as a file of its own, with the page's letters and ground.
function standalone(drawing) {
  const copy = drawing.cloneNode(true);
  copy.prepend(svg("style", {}, `text { font: 12px sans-serif; fill: ${css("--text")} } svg { background: ${css("--ground")} }`));
  return new XMLSerializer().serializeToString(copy);
}

// --- Data

const TYPES = { float32: Float32Array, float64: Float64Array, uint8: Uint8Array, uint16: Uint16Array,
  uint32: Uint32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };
async function inflate(block) {
  const bytes = Uint8Array.from(atob(block.zlib), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = new TYPES[block.dtype](await new Response(stream).arrayBuffer());
  return Object.assign(found, { shape: block.shape });
}
async function opened(data) {
  if (!data || typeof data !== "object") return data;
  if (data.zlib !== undefined && data.dtype) return inflate(data);
  if (Array.isArray(data)) return typeof data[0] === "object" ? Promise.all(data.map(opened)) : data;
  const values = await Promise.all(Object.values(data).map(opened));
  return Object.fromEntries(Object.keys(data).map((key, i) => [key, values[i]]));
}

// --- The page

function watch(draw) {
  let frame = 0;
  const later = () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
  };
  addEventListener("resize", later);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  addEventListener("beforeprint", draw);
  draw();
}
async function start() {
  const main = document.querySelector("main");
  try {
    const page = JSON.parse(document.getElementById("data").textContent);
    document.body.append(hint, spoken);
    main.replaceChildren(make("h1", {}, page.title), ...page.notes.map((note) => make("p", { class: "note" }, note)));
    const boxes = page.views.map((view) => make("section", {}, view.heading && make("h2", {}, view.heading)));
    const tabs = [...new Set(page.views.map((view) => view.tab))];
    const show = async (tab) => {
      for (const [i, view] of page.views.entries()) {
        boxes[i].hidden = page.tabs && view.tab !== tab;
        if (boxes[i].hidden || tensorlens.views[i]) continue;
        const box = make("div", { class: `view ${view.kind}` });
        boxes[i].append(box);
        tensorlens.views[i] = views[view.kind](box, await opened(view.data), watch) || {};
      }
    };
    if (page.tabs && tabs.length > 1)
      main.append(make("div", { class: "controls" }, choice(page.tab_name, tabs, 0, (k) => show(tabs[k]))));
    main.append(...boxes);
    await show(tabs[0]);
    tensorlens.ready = true;
    // A page in a frame says how tall it is, for whoever listens.
    if (parent !== window) new ResizeObserver(() => parent.postMessage({ tensorlens: document.documentElement.offsetHeight }, "*")).observe(document.documentElement);
    main.dataset.ready = "";
  } catch (error) {
    main.append(make("p", { class: "note" }, `This page cannot be drawn here (${error.message}). Open it in a newer browser.`));
    throw error;
  }
}
