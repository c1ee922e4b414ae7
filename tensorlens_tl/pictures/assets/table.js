// Rows of numbers with bars, sorted as the reader likes; what is cut opens by "N more".
views.table = (box, data, watch) => {
  const { labels, columns, values } = data, n = labels.length, m = columns.length, most = data.most || 40;
  const value = (i, k) => values[i * m + k], size = (x) => (Number.isFinite(x) ? Math.abs(x) : 0);
  const tops = columns.map((_, k) => labels.reduce((top, _, i) => Math.max(top, size(value(i, k))), 0));
  const full = data.scaled === "together" ? tops.map(() => Math.max(...tops)) : tops;
  const state = { sort: data.sort ?? -1, count: most, text: "" };
  const plus = columns.map((_, k) => labels.some((_, i) => value(i, k) < 0)); // a column of sizes has no signs
  // Means with intervals: a bar from 0, and a line from the low to the high end.
  const spans = data.scaled === "interval", signed = plus.some(Boolean), ends = {};
  const kin = (i) => (data.group < 0 ? "" : labels[i][data.group]);
  if (spans) labels.forEach((_, i) => {
    const own = [0, value(i, 0), value(i, 1), value(i, 2), ...(ends[kin(i)] || [])].filter(Number.isFinite);
    ends[kin(i)] = [Math.min(...own), Math.max(...own)];
  });
  function interval(i) {
    const [low, high] = ends[kin(i)], wide = 140, at = (x) => (high > low ? (wide * (x - low)) / (high - low) : 0);
    const [mean, a, b] = [0, 1, 2].map((k) => value(i, k)), box = svg("svg", { width: wide + 2, height: 12, "aria-hidden": "true" });
    if (Number.isFinite(mean)) box.append(svg("rect", { x: 1 + Math.min(at(0), at(mean)), y: 1, width: Math.abs(at(mean) - at(0)), height: 10, rx: 2, fill: `var(--${mean < 0 ? "neg" : "pos"})` }));
    if (Number.isFinite(a) && Number.isFinite(b)) box.append(svg("path", { d: `M${1 + at(a)} 6H${1 + at(b)}M${1 + at(a)} 3v6M${1 + at(b)} 3v6`, stroke: "var(--text)", "stroke-width": 1.5, fill: "none" }));
    return box;
  }
  const body = make("tbody"), head = make("tr", {}), more = make("button", { type: "button", class: "more" });
  const orders = ["as in the result", ...columns.map((c) => `size of ${c}`)];
  const find = make("input", { type: "search", size: 14, oninput: () => { state.text = find.value.toLowerCase(); state.count = most; draw(); } });
  more.addEventListener("click", () => { state.count = n; draw(); });
  function order() {
    const rows = labels.map((_, i) => i).filter((i) => !state.text || labels[i].join(" ").toLowerCase().includes(state.text));
    return state.sort < 0 ? rows : rows.sort((a, b) => size(value(b, state.sort)) - size(value(a, state.sort)));
  }
  function draw() {
    const rows = order(), long = m < 2 && box.clientWidth > 700 ? 160 : 70;
    body.replaceChildren(...rows.slice(0, state.count).map((i) => make("tr", {},
      labels[i].map((text, k) => make(k ? "td" : "th", k ? {} : { scope: "row" }, make("bdi", { dir: "ltr", title: text.length > 200 ? text : null }, shown(placed(text))))),
      columns.map((_, k) => {
        if (spans) return [make("td", { class: "num" }, k && Number.isNaN(value(i, k)) ? "–" : number(value(i, k), 4, signed)), k ? "" : make("td", { class: "of" }, interval(i))];
        const x = value(i, k), bar = make("span", { class: x < 0 ? "bar neg" : "bar pos" });
        bar.style.width = `${full[k] ? (long * size(x)) / full[k] : 0}px`;
        return [make("td", { class: "num" }, number(x, 4, plus[k])), make("td", { class: "of" }, bar)];
      }))));
    more.textContent = `${rows.length - state.count} more`;
    more.hidden = rows.length <= state.count;
  }
  head.append(...data.names.map((name) => make("th", { scope: "col" }, name)),
    ...columns.flatMap((name, k) => [make("th", { scope: "col", class: "num" }, name), spans && k ? "" : make("th", { class: "of", "aria-hidden": "true" })]));
  box.append(
    n > 6 ? make("div", { class: "controls" }, choice("Order", orders, state.sort + 1, (k) => { state.sort = k - 1; draw(); }), labelled("Find", find)) : "",
    make("div", { class: m > 1 && !(spans && data.names.length < 2) ? "listing many" : "listing" }, make("table", {}, make("caption", {}, data.caption || ""), make("thead", {}, head), body), more));
  draw();
  return { value, order, state };
};
