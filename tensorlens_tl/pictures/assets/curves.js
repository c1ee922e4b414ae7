// Numbers against numbers: lines with their intervals, or points beside the diagonal, at one or several stops.
views.curves = (box, data, watch) => {
  const inks = ["--pos", "--neg", "--third", "--text"], dashes = [null, "7 4", "2 3", "9 3 2 3"], { labels, x_name, y_name } = data;
  const stops = data.stops || [""], points = Boolean(data.stops), n = data.lines.length && data.lines[0].y.length / stops.length;
  const state = { at: points ? 0 : data.start ?? n - 1, stop: points ? data.start : 0 }, least = data.log && Math.min(...data.x.filter((v) => v > 0));
  // By decades; what is below the least size, as 0 is, stands half a decade to its left.
  const scale = data.log ? (v) => (v < least ? (v / least - 1) / 2 : Math.log10(v / least)) : (v) => v, dash = (k) => dashes[(k + (k >> 2)) % 4];
  const here = (numbers) => numbers.subarray(state.stop * n, (state.stop + 1) * n);
  const current = () => data.lines.map((line) => ({ ...line, x: here(line.x || data.x), y: here(line.y) }));
  const drawing = svg("svg", { role: "application", tabindex: 0, "aria-label": `${y_name} by ${x_name}. Left and right arrow keys choose a point.` });
  const said = (line, i) => points ? `${line.name}: ${x_name} ${number(line.x[i])}, ${y_name} ${number(line.y[i])}`
    : `${line.name}: ${number(line.y[i])}` + (line.low ? ` (${number(line.low[i])} to ${number(line.high[i])})` : "");
  const words = (i) => [labels ? labels[state.stop * n + i] : `${x_name} ${number(data.x[i], 4, false)}`, ...current().map((line) => said(line, i))].join("\n");
  const mark = (k, x, y, r, more) => k % 3 === 0 ? svg("circle", { cx: x, cy: y, r, ...more })
    : k % 3 === 1 ? svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, ...more })
    : svg("path", { d: `M${x} ${y - 1.3 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.3 * r}L${x - 1.3 * r} ${y}Z`, ...more });
  function span(numbers) {
    const all = numbers.filter(Number.isFinite);
    let [low, high] = [Math.min(...all), Math.max(...all)];
    if (!(high > low)) [low, high] = [(all[0] || 0) - 0.5, (all[0] || 0) + 0.5];
    return points ? [low - (high - low) / 25, high + (high - low) / 25] : [low, high];
  }
  function draw() {
    const lines = current(), width = Math.max(280, Math.min(points ? 560 : 900, box.clientWidth)), height = points ? 420 : 320, left = 56, bottom = height - 40;
    const ys = [...(points ? [] : [0]), ...(data.guides || []), ...data.lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])])];
    const xs = data.lines.flatMap((line) => [...(line.x || data.x)]).map(scale);
    const [low, high] = span(points ? [...xs, ...ys] : ys), [first, last] = points ? [low, high] : span(xs);
    const px = (v) => left + 8 + ((scale(v) - first) / (last - first)) * (width - left - 24), [py, grid] = axis(low, high, 28, bottom, left, width);
    const at = (line, ys, order) => order.filter((i) => Number.isFinite(ys[i])).map((i) => `${px(line.x[i])},${py(ys[i])}`);
    const forth = [...Array(n).keys()], ink = (k) => css(inks[k % 4]), own = data.log ? [...new Set(data.x)] : ticks(first, last);
    let free = 0;
    drawing.replaceChildren(...grid,
      ...own.filter((v) => px(v) >= free && (free = px(v) + 30)).map((v) => svg("text", { x: px(v), y: bottom + 16, "text-anchor": "middle" }, number(v, 3, false))),
      svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, x_name), svg("text", { x: 4, y: 12 }, y_name),
      points ? svg("line", { x1: px(low), y1: py(low), x2: px(high), y2: py(high), stroke: css("--mark"), "stroke-dasharray": "1 3" }) : "",
      ...(data.guides || []).map((v) => svg("line", { x1: left, x2: width, y1: py(v), y2: py(v), stroke: css("--mark"), "stroke-dasharray": "1 3" })),
      ...lines.flatMap((line, k) => [
        line.low ? svg("polygon", { points: [...at(line, line.low, forth), ...at(line, line.high, forth.toReversed())].join(" "), fill: ink(k), opacity: 0.18 }) : "",
        points ? "" : svg("polyline", { points: at(line, line.y, forth).join(" "), fill: "none", stroke: ink(k), "stroke-width": 2, "stroke-dasharray": dash(k) }),
        ...forth.filter((i) => Number.isFinite(line.x[i] + line.y[i])).map((i) => mark(points ? k : 0, px(line.x[i]), py(line.y[i]), i === state.at ? 5.5 : points ? 4 : 3,
          { fill: ink(k), "fill-opacity": points && i !== state.at ? 0.55 : 1, ...(points ? { ...tips(() => words(i)), onclick: () => choose(i) } : {}) }))]),
      ...(data.guides || []).map((v, i) => svg("text", { x: left + 4, y: py(v) - 4, fill: css("--quiet"), stroke: css("--ground"), "stroke-width": 3, "paint-order": "stroke" }, data.guide_names[i])),
      ...(points ? [] : forth.map((i) => svg("rect", { x: px(data.x[i]) - 8, y: 0, width: 16, height, fill: "transparent", ...tips(() => words(i)), onclick: () => choose(i) }))));
    fill(drawing, { viewBox: `0 0 ${width} ${height}`, width }, []);
  }
  const below = make("p", { class: "note chosen" });
  function choose(i) {
    state.at = Math.max(0, Math.min(n - 1, i));
    draw();
    if (points) below.textContent = words(state.at);
    say(words(state.at));
  }
  arrows(drawing, (right) => right && choose(state.at + right));
  const legend = make("div", { class: "legend" }, data.lines.map((line, k) => points
    ? key(line.name, mark(k, 6, 5, 4, { fill: `var(${inks[k % 4]})` }), 12) : dashKey(line.name, inks[k % 4], dash(k))), points ? make("span", { class: "quiet" }, "dotted: real as predicted") : "");
  box.append(make("div", { class: "controls" }, stops.length > 1 ? slider(data.slider, stops, state.stop, (k) => { state.stop = k; choose(state.at); }) : "",
    saveSvg("curves.svg", () => standalone(drawing))), drawing, legend, points ? below : "");
  watch(draw);
  if (points && n) below.textContent = words(state.at);
  return { words, choose, state, current };
};
