// Numbers against a size, one line each, with their intervals.
views.curves = (box, data, watch) => {
  const { x, lines } = data, inks = ["--pos", "--neg", "--third", "--text"], dashes = [null, "7 4", "2 3", "9 3 2 3"];
  const state = { at: x.length - 1 };
  const drawing = svg("svg", { role: "application", tabindex: 0, "aria-label": `${data.y_name} by ${data.x_name}. Left and right arrow keys choose a point.` });
  const words = (i) => `${data.x_name} ${number(x[i], 4, false)}\n` + lines.map((line) => `${line.name}: ${number(line.y[i])}` +
    (line.low ? ` (${number(line.low[i])} to ${number(line.high[i])})` : "")).join("\n");
  function draw() {
    const width = Math.max(280, Math.min(900, box.clientWidth)), height = 320, left = 56, bottom = 40;
    const all = [...(data.guides || []), ...lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])])].filter(Number.isFinite);
    let [low, high] = [Math.min(...all, 0), Math.max(...all, 0)];
    if (low === high) high = low + 1;
    const first = Math.min(...x), span = Math.max(...x) - first || 1;
    const px = (v) => left + 8 + ((v - first) / span) * (width - left - 24), py = (v) => 12 + ((high - v) / (high - low)) * (height - 12 - bottom);
    const points = (ys, order) => order.filter((i) => Number.isFinite(ys[i])).map((i) => `${px(x[i])},${py(ys[i])}`);
    const forth = [...x.keys()], ink = (k) => css(inks[k % inks.length]);
    drawing.replaceChildren(
      ...ticks(low, high).flatMap((v) => [svg("line", { x1: left, x2: width, y1: py(v), y2: py(v), stroke: css(v ? "--line" : "--quiet") }),
        svg("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, number(v, 3, false))]),
      ...ticks(first, first + span).map((v) => svg("text", { x: px(v), y: height - bottom + 16, "text-anchor": "middle" }, number(v, 3, false))),
      svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, data.x_name),
      ...(data.guides || []).map((v) => svg("line", { x1: left, x2: width, y1: py(v), y2: py(v), stroke: css("--mark"), "stroke-dasharray": "1 3" })),
      ...lines.flatMap((line, k) => [
        line.low ? svg("polygon", { points: [...points(line.low, forth), ...points(line.high, forth.toReversed())].join(" "), fill: ink(k), opacity: 0.18 }) : "",
        svg("polyline", { points: points(line.y, forth).join(" "), fill: "none", stroke: ink(k), "stroke-width": 2, "stroke-dasharray": dashes[k % 4] }),
        ...forth.filter((i) => Number.isFinite(line.y[i])).map((i) => svg("circle", { cx: px(x[i]), cy: py(line.y[i]), r: i === state.at ? 5 : 3, fill: ink(k) }))]),
      ...forth.map((i) => svg("rect", { x: px(x[i]) - 8, y: 0, width: 16, height, fill: "transparent",
        onpointermove: (event) => tip(event, words(i)), onpointerleave: (event) => tip(event, ""), onclick: () => choose(i) })));
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("width", width);
  }
  function choose(i) {
    state.at = Math.max(0, Math.min(x.length - 1, i));
    draw();
    say(words(state.at));
  }
  drawing.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    choose(state.at + by);
  });
  const key = make("div", { class: "legend" }, lines.map((line, k) => {
    const mark = svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: `var(${inks[k % 4]})`, "stroke-width": 2, "stroke-dasharray": dashes[k % 4] }));
    return make("span", { class: "step" }, mark, line.name);
  }));
  box.append(make("div", { class: "controls" }, button("Save SVG", () => save("curves.svg", new Blob([standalone(drawing)], { type: "image/svg+xml" })))), drawing, key);
  watch(draw);
  return { words, choose, state };
};
