// One number through depth: what every step adds, the sum so far, and another reading beside it.
views.waterfall = (box, data, watch) => {
  const { steps, parts, rows } = data, n = steps.length; // parts[i] = [step, label]
  const state = { lens: true, row: rows ? rows.length - 1 : 0 };
  let own, sums, after, lens;
  // One number, or one of several: rows of a map.
  function read(row) {
    state.row = row;
    own = steps.map(() => []);
    parts.forEach(([step, label], i) => own[step].push([label, data.values[row * parts.length + i]]));
    sums = own.map((some) => some.reduce((a, part) => a + part[1], 0));
    after = sums.map((_, i) => sums.slice(0, i + 1).reduce((a, b) => a + b, 0));
    lens = data.lens && data.lens.subarray(row * n, (row + 1) * n);
    state.step = sums.reduce((best, x, i) => (Math.abs(x) > Math.abs(sums[best]) ? i : best), 0);
  }
  read(state.row);
  const drawing = svg("svg", { role: "application", tabindex: 0, "aria-label": "What each step adds. Left and right arrow keys choose a step." });
  const list = make("div", { class: "panels" }), below = make("p", { class: "note" });
  const controls = make("div", { class: "controls" });
  const which = rows && choice("Row", rows, state.row, (row) => { read(row); choose(state.step); });
  if (rows) {
    controls.append(which);
    document.addEventListener("row", ({ detail }) => {
      if (detail.link !== data.link || detail.row === state.row) return;
      which.querySelector("select").selectedIndex = detail.row;
      read(detail.row);
      choose(state.step, true);
    });
  }
  if (data.lens) controls.append(tick(data.lens_name, true, (on) => { state.lens = on; draw(); }));
  controls.append(saveSvg("waterfall.svg", () => standalone(drawing)));
  const words = (i) => `${steps[i]}: adds ${number(sums[i])}, ${number(after[i])} so far` +
    (lens && Number.isFinite(lens[i]) ? `\n${data.lens_name}: ${number(lens[i])}` : "");
  function choose(i, quiet) {
    state.step = Math.max(0, Math.min(n - 1, i));
    draw();
    const details = (data.details || []).filter((d) => d.step === state.step);
    list.replaceChildren(listing(own[state.step], { title: words(state.step).replace("\n", "; "), total: own[state.step].reduce((a, r) => a + Math.abs(r[1]), 0) }),
      ...details.map((d) => listing(d.labels.map((label, i) => [label, d.values[i]]), { title: d.name, total: d.values.reduce((a, v) => a + Math.abs(v), 0) })));
    if (!quiet) say(words(state.step));
  }
  function draw() {
    const width = Math.max(280, box.clientWidth), height = 340, left = 52, bottom = 74, top = 12;
    const room = Math.max((width - left - 8) / n, 9), whole = left + 8 + room * n;
    let [low, high] = [0, 0];
    own.forEach((rows, i) => {
      const start = i ? after[i - 1] : 0, up = rows.reduce((a, r) => a + Math.max(0, r[1]), 0);
      [low, high] = [Math.min(low, start, after[i]), Math.max(high, start + up)];
    });
    if (lens && state.lens) for (const x of lens) if (Number.isFinite(x)) [low, high] = [Math.min(low, x), Math.max(high, x)];
    if (low === high) high = low + 1;
    const [y, grid] = axis(low, high, top, height - bottom, left, whole), x = (i) => left + i * room;
    drawing.replaceChildren(...grid);
    fill(drawing, { viewBox: `0 0 ${whole} ${height}`, width: whole, height }, []);
    const every = Math.ceil(13 / room);
    own.forEach((rows, i) => {
      const start = i ? after[i - 1] : 0, group = svg("g", { onclick: () => choose(i), ...tips(() => words(i)) },
        svg("rect", { x: x(i), y: top, width: room, height: height - top - bottom, fill: i === state.step ? css("--panel") : "transparent" }));
      // Left half: what adds, stacked from the sum before. Right half: what takes away, down to the sum after.
      const half = Math.max(1, room / 2 - 1.5);
      let at = start;
      for (const sign of [1, -1]) {
        const ordered = rows.filter((r) => r[1] * sign > 0).sort((a, b) => sign * (b[1] - a[1]));
        for (const [label, v] of ordered) {
          const edge = y(Math.max(at, at + v)), tall = Math.abs(y(at) - y(at + v));
          group.append(svg("rect", { x: x(i) + (sign > 0 ? 1 : half + 2), y: edge, width: half, height: Math.max(0.4, tall),
            fill: css(sign > 0 ? "--pos" : "--neg"), stroke: css("--ground"), "stroke-width": tall > 3 ? 0.8 : 0,
            ...tips(() => `${label}: ${number(v)}\n${words(i)}`) }));
          at += v;
        }
      }
      drawing.append(group);
      if (i % every === 0 || i === state.step)
        drawing.append(svg("text", { x: x(i) + room / 2, y: height - bottom + 12, "text-anchor": "end", transform: `rotate(-50 ${x(i) + room / 2} ${height - bottom + 12})`,
          "font-weight": i === state.step ? "bold" : null }, shown(steps[i], 16)));
    });
    const line = (numbers) => numbers.map((v, i) => (Number.isFinite(v) ? `${x(i) + room / 2},${y(v)}` : "")).filter(Boolean).join(" ");
    drawing.append(svg("polyline", { points: line([...after]), fill: "none", stroke: css("--mark"), "stroke-width": 2, "pointer-events": "none" }));
    if (lens && state.lens) drawing.append(svg("polyline", { points: line([...lens]), fill: "none", stroke: css("--third"), "stroke-width": 2, "stroke-dasharray": "6 4", "pointer-events": "none" }));
  }
  below.append(make("span", { class: "legend" }, dashKey("sum so far", "--mark"), data.lens ? dashKey(data.lens_name, "--third", "6 4") : null,
    barKey("adds", "--pos"), barKey("takes away", "--neg"), data.unit));
  arrows(drawing, (right) => right && choose(state.step + right));
  box.append(controls, make("div", { class: "scroll" }, drawing), below, list);
  choose(state.step, true);
  watch(draw);
  return { get sums() { return sums; }, get after() { return after; }, get parts() { return own; }, state, choose };
};
