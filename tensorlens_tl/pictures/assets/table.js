// Rows of numbers with bars, sorted as the reader likes; what is cut opens by "N more".
views.table = (box, data, watch) => {
  const { labels, columns, values } = data, n = labels.length, m = columns.length, most = data.most || 40;
  const value = (i, k) => values[i * m + k], size = (x) => (Number.isFinite(x) ? Math.abs(x) : 0);
  const tops = columns.map((_, k) => labels.reduce((top, _, i) => Math.max(top, size(value(i, k))), 0));
  const full = data.scaled === "together" ? tops.map(() => Math.max(...tops)) : tops;
  const state = { sort: data.sort ?? -1, count: most, text: "" };
  const plus = columns.map((_, k) => labels.some((_, i) => value(i, k) < 0)); // a column of sizes has no signs
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
      labels[i].map((text, k) => make(k ? "td" : "th", k ? {} : { scope: "row" }, make("bdi", { dir: "ltr", title: text.length > 200 ? text : null }, shown(text)))),
      columns.map((_, k) => {
        const x = value(i, k), bar = make("span", { class: x < 0 ? "bar neg" : "bar pos" });
        bar.style.width = `${full[k] ? (long * size(x)) / full[k] : 0}px`;
        return [make("td", { class: "num" }, number(x, 4, plus[k])), make("td", { class: "of" }, bar)];
      }))));
    more.textContent = `${rows.length - state.count} more`;
    more.hidden = rows.length <= state.count;
  }
  head.append(...data.names.map((name) => make("th", { scope: "col" }, name)),
    ...columns.flatMap((name) => [make("th", { scope: "col", class: "num" }, name), make("th", { class: "of", "aria-hidden": "true" })]));
  box.append(
    n > 6 ? make("div", { class: "controls" }, choice("Order", orders, state.sort + 1, (k) => { state.sort = k - 1; draw(); }), labelled("Find", find)) : "",
    make("div", { class: m > 1 ? "listing many" : "listing" }, make("table", {}, make("caption", {}, data.caption || ""), make("thead", {}, head), body), more));
  draw();
  return { value, order, state };
};
