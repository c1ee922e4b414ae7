// Nodes on a grid and signed edges between them, the largest first, with lists of what goes in and out.
views.graph = (box, data, watch) => {
  const READS = ["", "v", "q", "k"], MOST = 500, COLUMNS = 80, { labels, kinds, columns, rows } = data;
  const state = { stop: -1, only: null, at: -1, picked: new Set(), groups: [], qk: true, hidden: new Set(), zoom: 0 };
  const svgBox = make("div", { class: "scroll" }), side = make("div", { class: "lists" }), controls = make("div", { class: "controls" });
  const target = labels.length - 1;
  let units, links, total, drawn, picture, marker, rowNames, bands, sliderBox = make("span");

  // --- What is drawn: nodes, or groups of them; edges between the same two are summed
  function model() {
    const of = new Int32Array(labels.length).fill(-1);
    units = [];
    for (const group of state.groups) {
      const middle = [...group.members].sort((a, b) => data.row[a] - data.row[b] || data.column[a] - data.column[b])[group.members.length >> 1];
      for (const i of group.members) of[i] = units.length;
      units.push({ label: group.name, kind: "group", column: data.column[middle], row: data.row[middle], members: group.members });
    }
    for (let i = 0; i < labels.length; i++) {
      if (of[i] >= 0 || state.hidden.has(kinds[i])) continue;
      of[i] = units.length;
      units.push({ label: labels[i], kind: kinds[i], column: data.column[i], row: data.row[i], members: [i] });
    }
    for (const unit of units) {
      unit.effect = unit.members.reduce((a, i) => a + data.effect[i], 0);
      unit.into = [];
      unit.out = [];
      unit.used = unit.members.includes(target);
      unit.first = Infinity; // the number of its largest edge
    }
    const found = new Map();
    for (let e = 0; e < data.weight.length; e++) {
      const [a, b] = [of[data.src[e]], of[data.dest[e]]], qk = data.reads[e] > 1;
      if (a < 0 || b < 0 || a === b || (qk && !state.qk)) continue;
      const read = qk || units[b].kind !== "group" ? data.reads[e] : 0, key = `${a} ${b} ${read}`;
      if (found.has(key)) found.get(key).weight += data.weight[e];
      else found.set(key, { src: units[a], dest: units[b], read, qk, weight: data.weight[e] });
    }
    links = [...found.values()].sort((x, y) => Math.abs(y.weight) - Math.abs(x.weight));
    for (const link of links) {
      link.src.out.push(link);
      link.dest.into.push(link);
    }
    total = links.reduce((a, x) => a + (x.qk ? 0 : Math.abs(x.weight)), 0);
    // As many of the largest as there is room for: a drawing has so many columns.
    const inUse = new Set(), room = (x) => inUse.add(x.src.column).add(x.dest.column).size <= COLUMNS;
    const cut = links.findIndex((x, i) => i >= MOST || !room(x));
    drawn = links.slice(0, cut < 0 ? links.length : cut);
    drawn.forEach((link, i) => {
      for (const unit of [link.src, link.dest]) [unit.used, unit.first] = [true, Math.min(unit.first, i)];
    });
    const stops = [5, 10, 20, 40, 80, 160, 320, MOST].filter((k) => k < drawn.length);
    stops.push(drawn.length);
    if (state.stop < 0) state.stop = Math.min(stops.length - 1, 4);
    state.stop = Math.min(state.stop, stops.length - 1);
    state.stops = stops;
    const share = stops.map((k) => drawn.slice(0, k).reduce((a, x) => a + (x.qk ? 0 : Math.abs(x.weight)), 0) / (total || 1));
    const names = stops.map((k, i) => `${k} of ${links.length}${k ? `, from ${number(Math.abs(drawn[k - 1].weight), 2, false)}` : ""}; ${percent(share[i])} of Σ|weight|`);
    const fresh = slider("Edges", names, state.stop, (k) => { state.stop = k; mark(); });
    sliderBox.replaceWith(fresh);
    sliderBox = fresh;
  }

  // --- Where: columns and rows that are in use, each as wide as what stands in it
  function place() {
    const used = units.filter((unit) => unit.used), cells = new Map(), wide = new Map();
    for (const unit of used) {
      const key = `${unit.column} ${unit.row}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(unit);
    }
    for (const [key, here] of cells) {
      const c = +key.split(" ")[0];
      wide.set(c, Math.max(wide.get(c) || 0, here.length));
    }
    const left = 82, tall = 52, starts = new Map(), narrow = [...wide.values()].reduce((a, n) => a + Math.max(64, 46 * n + 14), 0);
    // A few columns take half of the page; the lists stand beside them.
    const stretch = Math.max(1, Math.min(2, (box.clientWidth / 2 - left) / narrow)), step = 46 * stretch, room = (c) => Math.max(64 * stretch, step * wide.get(c) + 14);
    let x = left;
    for (const c of [...wide.keys()].sort((a, b) => a - b)) {
      starts.set(c, x);
      x += room(c);
    }
    const levels = [...new Set(used.map((unit) => unit.row))].sort((a, b) => b - a);
    const height = levels.length * tall + 46;
    for (const [key, here] of cells) {
      const [c, r] = key.split(" ").map(Number);
      here.forEach((unit, i) => {
        unit.x = starts.get(c) + room(c) / 2 + (i - (here.length - 1) / 2) * step;
        unit.y = 24 + levels.indexOf(r) * tall;
      });
    }
    return { used, starts, room, levels, tall, width: x + 10, height };
  }

  function shape(unit, r, fill) {
    const { x, y } = unit, about = { ...fill, class: "glyph" };
    if (unit.kind === "token" || unit.kind === "target") return svg("rect", { ...about, x: x - r, y: y - r, width: 2 * r, height: 2 * r });
    if (unit.kind === "group") return svg("rect", { ...about, x: x - 1.5 * r, y: y - r, width: 3 * r, height: 2 * r, rx: r });
    if (["mlp", "expert", "error"].includes(unit.kind))
      return svg("path", { ...about, d: `M${x} ${y - 1.3 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.3 * r}L${x - 1.3 * r} ${y}Z` });
    if (unit.kind === "constant") return svg("path", { ...about, d: `M${x - r} ${y}H${x + r}M${x} ${y - r}V${y + r}` });
    return svg("circle", { ...about, cx: x, cy: y, r });
  }
  function draw() {
    const { used, starts, room, levels, tall, width, height } = place();
    const largest = drawn.length ? Math.abs(drawn[0].weight) : 1, most = Math.max(...used.map((u) => Math.abs(u.effect) || 0), 1e-300);
    picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, tabindex: 0, role: "application", "font-family": "system-ui, sans-serif", "font-size": 11,
      "aria-label": `${data.name}: ${used.length} nodes. Arrow keys move between nodes, Enter shows the edges of one, Space picks it for a group, Escape shows all.` });
    picture.append(...levels.map((r, i) => svg("line", { x1: 72, x2: width, y1: 24 + i * tall, y2: 24 + i * tall, stroke: "var(--line)", "stroke-width": 0.5 })));
    for (const [c, x] of starts) {
      const name = svg("text", { x: x + room(c) / 2, y: height - 12, "text-anchor": "middle", fill: "var(--text)" }, shown(columns[c], Math.floor(room(c) / 7)));
      name.append(svg("title", {}, data.tokens ? quoted(columns[c], c) : columns[c]));
      picture.append(name);
    }
    // A group for each stop of the slider, which so changes few elements; the largest edges are on top.
    bands = state.stops.map(() => svg("g", {}));
    for (const [i, link] of [...drawn.entries()].reverse()) {
      const [a, b] = [link.src, link.dest], mid = (a.y + b.y) / 2;
      // Long edges have longer dashes: dashes are what a frame of the slider costs most.
      const far = Math.max(1, (Math.abs(a.x - b.x) + a.y - b.y) / 150);
      const dash = link.qk ? (link.weight < 0 ? [4, 6] : [12, 5]).map((n) => Math.round(n * far)).join(" ") : null;
      // Edges that would hide each other bend: past nodes between, and apart by what reads.
      const past = Math.abs(a.x - b.x) < 1 && a.y - b.y > 1.5 * tall ? 12 + (a.y - b.y) / 12 : 0;
      const bend = past + [0, 0, 12, -12][link.read];
      link.line = svg("path", { d: a.y === b.y ? `M${a.x} ${a.y}Q${(a.x + b.x) / 2} ${a.y - tall / 2} ${b.x} ${b.y}` : `M${a.x} ${a.y}C${a.x + bend} ${mid} ${b.x + bend} ${mid} ${b.x} ${b.y}`,
        fill: "none", stroke: link.qk ? "var(--third)" : link.weight < 0 ? "var(--neg)" : "var(--pos)",
        "stroke-dasharray": dash, "stroke-width": Math.max(0.6, 6 * Math.sqrt(Math.abs(link.weight) / largest)).toFixed(2), "stroke-opacity": 0.65 });
      fill(link.line, tips(() => words(link)), []);
      bands[state.stops.findIndex((k) => i < k)].append(link.line);
    }
    picture.append(...bands.toReversed());
    marker = svg("circle", { r: 19, fill: "none", stroke: "var(--mark)", "stroke-width": 2, "stroke-dasharray": "3 2", visibility: "hidden" });
    picture.append(marker);
    for (const unit of used) {
      const r = 4 + 9 * Math.sqrt(Math.abs(unit.effect || 0) / most);
      const sign = unit.effect < 0 ? "var(--neg)" : "var(--pos)";
      unit.glyph = shape(unit, r, { fill: unit.kind === "constant" ? "none" : sign, "fill-opacity": 0.4, stroke: unit.kind === "constant" ? sign : "var(--text)" });
      // The row names the layer, and the column the token.
      const short = unit.kind === "group" ? unit.label : data.tokens && unit.kind === "token" && !unit.label.includes("_embed") ? "" : unit.label.replace(/^L\d+\.?([a-z_]+\.?(?=F\d|error|skip|past))?|@\d+$|_embed/g, "");
      unit.name = svg("text", { x: unit.x, y: unit.y + r + 11, "text-anchor": "middle", fill: "var(--text)", stroke: "var(--ground)", "stroke-width": 3, "paint-order": "stroke" }, shown(short.replace("_embed", ""), unit.kind === "target" ? 24 : 9));
      const click = (event) => {
        if (moved) return;
        if (event.shiftKey || event.ctrlKey || event.metaKey) pick(unit);
        else choose(state.only === unit ? null : unit);
      };
      unit.drawn = svg("g", { class: "unit", ...tips(() => about(unit)), onclick: click }, unit.glyph, unit.name);
      picture.append(unit.drawn);
    }
    arrows(picture, walk);
    picture.addEventListener("keydown", keys);
    picture.addEventListener("blur", () => marker.setAttribute("visibility", "hidden"));
    // The names of the rows stay in sight, in a drawing of their own: scrolling repaints nothing.
    rowNames = svg("svg", { class: "rows", viewBox: `0 0 74 ${height}`, "aria-hidden": "true" },
      svg("rect", { width: 74, height, fill: "var(--ground)", opacity: 0.85 }),
      levels.map((r, i) => svg("text", { x: 68, y: 28 + i * tall, "text-anchor": "end", fill: "var(--quiet)", "font-size": 11 }, rows[r])));
    svgBox.replaceChildren(rowNames, picture);
    state.used = used;
    state.at = -1;
    resize();
    mark();
    const goal = used.find((unit) => unit.members.includes(target));
    svgBox.scrollTo(goal.x * state.scale - svgBox.clientWidth / 2, 0);
  }
  function resize() {
    const width = +picture.getAttribute("width"), tall = +picture.getAttribute("height"), room = box.clientWidth - 4;
    const scale = (state.scale = [Math.min(1, room / width), 1, 1.6][state.zoom === 0 && room / width < 0.8 ? 1 : state.zoom]);
    picture.style.width = `${width * scale}px`;
    rowNames.style.width = `${74 * scale}px`;
    picture.style.height = rowNames.style.height = `${tall * scale}px`;
    rowNames.style.marginBottom = `${-tall * scale}px`;
  }
  // Only what crosses the threshold changes here, so that the slider is quick.
  function set(element, name, value) {
    if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
  function mark() {
    const k = state.stops[state.stop], { only } = state;
    bands.forEach((band, i) => set(band, "visibility", only || i <= state.stop ? "visible" : "hidden"));
    for (const link of drawn) set(link.line, "visibility", !only || link.src === only || link.dest === only ? "inherit" : "hidden");
    const near = only && new Set([only, ...only.into.map((link) => link.src), ...only.out.map((link) => link.dest)]);
    for (const unit of state.used) {
      const on = only ? near.has(unit) : unit.first < k;
      set(unit.glyph, "stroke-opacity", on ? 1 : 0.25);
      set(unit.glyph, "fill-opacity", on ? 0.4 : 0.1);
      set(unit.name, "visibility", on ? "visible" : "hidden");
      set(unit.glyph, "stroke-width", state.picked.has(unit) || unit === only ? 3 : unit.kind === "constant" ? 2.5 : 1);
    }
  }

  // --- Words
  const about = (unit) => `${unit.label}${unit.kind === "group" ? `: ${unit.members.map((i) => labels[i]).join(", ")}` : ""}${unit.effect === unit.effect ? `\n${data.effect_name} ${number(unit.effect)} ${data.unit}` : ""}`;
  const end = (link) => `${link.dest.label}${link.read ? `.${READS[link.read]}` : ""}`;
  const words = (link) => `${link.src.label} → ${end(link)}\n${number(link.weight)} ${data.unit}${link.qk ? "\nfirst-order, and in no sum" : ""}`;
  function list() {
    const unit = state.only;
    if (!unit) return side.replaceChildren(listing(links.filter((x) => !x.qk).map((x) => [`${x.src.label} → ${end(x)}`, x.weight]), { title: "The largest edges", total, heading: data.unit }),
      ...(links.some((x) => x.qk) ? [listing(links.filter((x) => x.qk).map((x) => [`${x.src.label} → ${end(x)}`, x.weight]), { title: "Into queries and keys: first-order, and in no sum", heading: data.unit })] : []));
    const flow = (some) => some.filter((x) => !x.qk), sum = flow(unit.into).reduce((a, x) => a + x.weight, 0);
    const parts = [make("p", {}, make("b", {}, about(unit)), "\n", button("Show all", () => choose(null)))];
    if (flow(unit.into).length)
      parts.push(listing(flow(unit.into).map((x) => [x.src.label, x.weight]), { title: `Into ${unit.label}: these sum to ${number(sum)}${data.sums && unit.kind !== "group" ? `, all of it to ${number(unit.effect)}` : ""}`, heading: data.unit }));
    const qk = unit.into.filter((x) => x.qk);
    if (qk.length) parts.push(listing(qk.map((x) => [`${x.src.label} → ${READS[x.read]}`, x.weight]), { title: "Into its queries (q) and keys (k): first-order, and in no sum", heading: data.unit }));
    if (unit.out.length) parts.push(listing(unit.out.map((x) => [end(x), x.weight]), { title: `Out of ${unit.label}`, heading: data.unit }));
    side.replaceChildren(...parts);
  }
  function choose(unit) {
    state.only = unit;
    mark();
    list();
    if (unit?.drawn) unit.drawn.scrollIntoView({ block: "nearest", inline: "nearest" });
    say(unit ? `${about(unit)}. ${unit.into.length} edges in, ${unit.out.length} out` : "all nodes");
  }
  function pick(unit) {
    if (!state.picked.delete(unit)) state.picked.add(unit);
    mark();
    say(`${unit.label} ${state.picked.has(unit) ? "picked" : "left"}; ${state.picked.size} picked`);
    grouping.disabled = state.picked.size < 2;
  }
  const reached = () => state.used[state.at] || state.used[state.used.length - 1];
  function walk(right, down) {
    const here = reached();
    let best = Infinity, next = here;
    for (const unit of state.used) {
      const [dx, dy] = [unit.x - here.x, unit.y - here.y], along = dx * right + dy * down, across = Math.abs(dx * down) + Math.abs(dy * right);
      if (along > 0.5 && along + 2 * across < best) [best, next] = [along + 2 * across, unit];
    }
    if (state.at < 0) next = here;
    state.at = state.used.indexOf(next);
    fill(marker, { cx: next.x, cy: next.y, visibility: "visible" }, []);
    next.drawn.scrollIntoView({ block: "nearest", inline: "nearest" });
    say(about(next));
  }
  function keys(event) {
    const here = reached();
    if (event.key === "Enter") choose(state.only === here ? null : here);
    else if (event.key === " ") pick(here);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
  }
  let moved = false;
  svgBox.addEventListener("pointerdown", () => (moved = false));
  svgBox.addEventListener("pointermove", (event) => {
    if (!event.buttons || event.pointerType === "touch") return;
    moved = moved || Math.abs(event.movementX) + Math.abs(event.movementY) > 2;
    svgBox.scrollBy(-event.movementX, -event.movementY);
  });

  // --- Files
  function svgText() {
    const copy = picture.cloneNode(true);
    copy.append(...rowNames.cloneNode(true).querySelectorAll("text"));
    for (const hidden of copy.querySelectorAll("[visibility=hidden]")) hidden.remove();
    const text = new XMLSerializer().serializeToString(copy).replace(/ style="[^"]*"/, "");
    return text.replace(/var\((--\w+)\)/g, (_, name) => css(name));
  }
  function dotText() {
    const name = (text) => `"${text.replace(/\\/g, "\\\\").replace(/"/g, '\\"').replace(/\n/g, "\\n")}"`;
    const lines = drawn.slice(0, state.stops[state.stop]).map((x) =>
      `  ${name(x.src.label)} -> ${name(x.dest.label)} [label=${name(`${READS[x.read]} ${number(x.weight)}`.trim())}, color=${x.weight < 0 ? "blue" : "red"}${x.qk ? ", style=dashed" : ""}];`);
    return ["digraph graph1 {", "  rankdir=BT; node [shape=box];", ...lines, "}"].join("\n");
  }
  function jsonText() {
    const text = new TextDecoder().decode(data.json);
    if (!state.groups.length || !data.ids.length) return text;
    const found = JSON.parse(text);
    found.qParams.supernodes = state.groups.map((group) => [group.name, ...group.members.map((i) => data.ids[i])]);
    return JSON.stringify(found);
  }
  const file = (name, text, type) => button(`Save ${name.split(".")[1].toUpperCase()}`, () => save(name, new Blob([text()], { type })));

  // --- Groups
  function regroup() {
    state.picked.clear();
    state.only = null;
    grouping.disabled = true;
    ungrouping.disabled = !state.groups.length;
    model();
    draw();
    list();
  }
  const named = make("input", { type: "text", size: 10, value: "group" });
  const grouping = button("Group picked nodes", () => {
    const members = [...state.picked].flatMap((unit) => unit.members);
    const old = state.groups.filter((group) => !group.members.some((i) => members.includes(i)));
    state.groups = [...old, { name: named.value || "group", members }];
    regroup();
  });
  const ungrouping = button("Ungroup all", () => { state.groups = []; regroup(); });
  grouping.disabled = ungrouping.disabled = true;
  controls.append(sliderBox,
    data.reads.some((x) => x > 1) ? tick("Queries and keys (dashed)", true, (on) => { state.qk = on; regroup(); }) : "",
    ...[["Constants", "constant"], ["Errors", "error"]].filter(([, kind]) => kinds.includes(kind)).map(([name, kind]) =>
      tick(name, true, (on) => { state.hidden[on ? "delete" : "add"](kind); regroup(); })),
    choice("Size", ["fit", "100 %", "160 %"], 0, (k) => { state.zoom = k; resize(); }),
    labelled("Group name", named), grouping, ungrouping, file("graph.svg", svgText, "image/svg+xml"), file("graph.dot", dotText, "text/plain"),
    data.json ? file("graph.json", jsonText, "application/json") : "");
  box.append(controls, make("div", { class: "legend" }, dashKey("adds", "--pos"), dashKey("takes away", "--neg"),
    data.reads.some((x) => x > 1) ? [dashKey("q or k, adds", "--third", "12 5"), dashKey("q or k, takes away", "--third", "4 6")] : null,
    make("span", { class: "quiet" }, `${data.legend} At most ${MOST} edges and ${COLUMNS} columns are drawn; the lists hold all. Click a node for its edges; with Shift, pick it for a group.`)), make("div", { class: "beside" }, svgBox, side));
  model();
  draw();
  list();
  watch(() => resize());
  return { state, choose: (label) => choose(units.find((u) => u.label === label) || null), pick: (label) => pick(units.find((u) => u.label === label)),
    units: () => units, links: () => links, total: () => total, svgText, dotText, jsonText, mark };
};
