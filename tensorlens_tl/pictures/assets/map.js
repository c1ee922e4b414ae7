// A map of rows by columns: one panel or several side by side, through depth, in a window.
function openMap(map, named) {
  const { rows, columns, form } = map, sizes = map.sizes || new Float64Array(rows);
  const kind = map.cells || map.value, cells = new kind.constructor(rows * columns), { steps } = map;
  const exact = new Uint8Array(rows * columns), tops = new Float64Array(rows), level = new Float64Array(16);
  for (let i = 0, at = 0; i < rows; i++) {
    const start = i * columns, end = start + (map.triangle ? i + 1 : columns);
    exact.fill(1, form === "exact" ? start : end, start + columns);
    if (form === "exact") {
      cells.set(map.cells.subarray(at, at + end - start), start);
      at += end - start;
    } else if (form === "coarse") {
      for (let k = 0; k < 16; k++) level[k] = k === 15 ? NaN : Math.sign(k - steps) * ((k - steps) / steps) ** 2 * map.top[i];
      for (let here = start; here < end; here++, at++) cells[here] = level[at & 1 ? map.levels[at >> 1] & 15 : map.levels[at >> 1] >> 4];
    }
  }
  if (map.at) {
    let here = 0;
    map.at.forEach((step, k) => {
      here += step;
      cells[here] = map.value[k];
      exact[here] = 1;
    });
  }
  let top = 0, signed = false;
  for (let i = 0; i < rows; i++) {
    const start = i * columns, end = start + (map.triangle ? i + 1 : columns);
    let most = 0;
    for (let here = start; here < end; here++) {
      const x = cells[here], size = x < 0 ? -x : x;
      if (x < 0) signed = true;
      if (size > most && size < Infinity) most = size;
      if (form === "exact") sizes[i] += size || 0;
    }
    tops[i] = most;
    if (most > top) top = most;
  }
  function words(i, j) {
    const here = i * columns + j, x = cells[here];
    if (exact[here] || x !== x) return x !== x && named ? "nothing" : number(x);
    if (form === "largest") return "smaller than those given of this row";
    const full = map.top[i], level = Math.round(steps * Math.sqrt(Math.abs(x) / full)) || 0, sign = x < 0 ? -1 : 1;
    if (!level) return `below ${number(full * (0.5 / steps) ** 2, 2, false)} in size`;
    const ends = [level - 0.5, Math.min(steps, level + 0.5)].map((l) => number(sign * full * (l / steps) ** 2, 2));
    return `${ends[0]} to ${ends[1]}`;
  }
  return { ...map, cells, exact, sizes, top, tops, signed, words };
}

// The picture that patches are of, as a canvas.
function pixels(from) {
  const [height, width] = from.shape, { length } = from;
  const image = new ImageData(width, height), whole = make("canvas", { width, height });
  for (let k = 0; k < length / 3; k++) image.data.set([from[3 * k], from[3 * k + 1], from[3 * k + 2], 255], 4 * k);
  whole.getContext("2d").putImageData(image, 0, 0);
  return whole;
}
views.map = (box, data, watch) => {
  data.columns = data.columns || data.rows;
  const label = data.named ? (text) => shown(text) : quoted; // what has a name, or a token at a position
  const n = data.rows.length, m = data.columns.length, panels = data.panels;
  const stops = panels.reduce((a, p) => (p.stops.length > a.length ? p.stops : a), []);
  const cache = new Map();
  const current = (p) => Math.min(state.stop, panels[p].stops.length - 1);
  function map(p) {
    const key = `${p}.${current(p)}`;
    if (!cache.has(key)) {
      if (cache.size > 6) cache.delete(cache.keys().next().value);
      cache.set(key, openMap(panels[p].stops[current(p)].map, data.named));
    }
    return cache.get(key);
  }
  const side = Math.max(n, m), windowed = side > (data.named ? 128 : 40);
  const state = { stop: 0, size: Math.min(side, windowed ? 32 : side), row: 0, column: 0, i: n - 1, j: 0, p: 0, rowwise: windowed && !data.named };
  const rowsShown = () => Math.min(n, state.size), columnsShown = () => Math.min(m, state.size);
  function move(row, column) {
    state.row = Math.max(0, Math.min(n - rowsShown(), Math.round(row)));
    state.column = Math.max(0, Math.min(m - columnsShown(), Math.round(column)));
  }
  move(n, m); // the last rows first: the prediction

  // --- Controls
  const controls = make("div", { class: "controls" });
  if (stops.length > 1)
    controls.append(slider(data.slider, stops.map((s) => s.name), 0, (k) => { state.stop = k; draw(); pick(); }));
  if (windowed) {
    const sizes = [16, 32, 64, 128, 256].filter((s) => s < side);
    controls.append(choice("Window", sizes.map((s) => `${s} tokens`), sizes.indexOf(32), (k) => {
      const [r, c] = [state.row + state.size, state.column + state.size];
      state.size = sizes[k];
      move(r - state.size, c - state.size);
      draw();
    }));
  }
  controls.append(choice("Colours relative to", ["the whole map", "each row"], +state.rowwise, (k) => { state.rowwise = k === 1; draw(); }));
  const picture = data.image && pixels(data.image);
  if (picture) controls.append(tick("Colours over the picture", true, (on) => { state.bare = !on; drawWindow(); }));
  controls.append(button("Save PNG", () => figures[0].canvas.toBlob((blob) => save("map.png", blob))));
  box.append(controls);

  // --- Overview: the whole map, with the window in it
  const overview = make("canvas", { tabindex: 0, role: "application",
    "aria-label": "The whole map. Drag the window, or move it with the arrow keys." });
  let whole = null;
  function drawWhole() {
    const a = map(0), most = Math.min(side, 320), step = Math.ceil(side / most);
    const [h, w] = [Math.ceil(n / step), Math.ceil(m / step)], colours = palette(panels[0].signed || a.signed);
    const image = new ImageData(w, h), words = new Uint32Array(image.data.buffer);
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) {
        let best = 0, row = y * step;
        for (let i = y * step; i < Math.min(n, (y + 1) * step); i++)
          for (let j = x * step; j < Math.min(a.triangle ? i + 1 : m, (x + 1) * step); j++) {
            const v = a.cells[i * m + j];
            if (v !== v || Math.abs(v) > Math.abs(best)) {
              best = v;
              row = i;
            }
          }
        words[y * w + x] = colours.word(best, state.rowwise ? a.tops[row] : a.top);
      }
    whole = make("canvas", { width: w, height: h });
    whole.getContext("2d").putImageData(image, 0, 0);
  }
  const wide = () => Math.min(panels.length > 1 && box.clientWidth > 900 ? 230 : 320, box.clientWidth - 4);
  function drawOverview() {
    if (!windowed) return;
    const width = wide(), scale = width / side, ratio = devicePixelRatio || 1;
    overview.width = m * scale * ratio;
    overview.height = n * scale * ratio;
    overview.style.width = `${m * scale}px`;
    const pen = overview.getContext("2d");
    pen.scale(ratio, ratio);
    pen.drawImage(whole, 0, 0, m * scale, n * scale);
    pen.strokeStyle = css("--line");
    pen.strokeRect(0.5, 0.5, m * scale - 1, n * scale - 1);
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 2;
    pen.strokeRect(state.column * scale, state.row * scale, columnsShown() * scale, rowsShown() * scale);
  }
  function drag(event) {
    if (!event.buttons) return;
    const edge = overview.getBoundingClientRect(), scale = edge.width / m;
    move((event.clientY - edge.top) / scale - rowsShown() / 2, (event.clientX - edge.left) / scale - columnsShown() / 2);
    drawWindow();
  }
  overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); drag(event); });
  overview.addEventListener("pointermove", drag);
  arrows(overview, (right, down) => {
    move(state.row + 8 * down, state.column + 8 * right);
    drawWindow();
    say(`rows ${state.row} to ${state.row + rowsShown() - 1}, columns ${state.column} to ${state.column + columnsShown() - 1}`);
  });

  // --- The window, one canvas a panel
  const figures = panels.map((panel, p) => {
    const canvas = make("canvas", { tabindex: 0, role: "application", ...tips((event) => words(p, where(figure, event))),
      "aria-label": `${panel.name}: ${n} ${data.axes[0]}s by ${m} ${data.axes[1]}s. Arrow keys move the selected cell.` });
    const caption = make("figcaption", {}), scale = make("div", {});
    const figure = { canvas, caption, scale, at: null, box: make("figure", {}, caption, canvas, scale) };
    canvas.addEventListener("click", (event) => {
      const at = where(figure, event);
      if (!at) return;
      [state.i, state.j, state.p] = [at[0] ?? state.i, at[1] ?? state.j, p];
      drawWindow();
      pick();
    });
    arrows(canvas, (right, down, { shiftKey }) => {
      state.i = Math.max(0, Math.min(n - 1, state.i + (shiftKey ? 8 : 1) * down));
      state.j = Math.max(0, Math.min(m - 1, state.j + (shiftKey ? 8 : 1) * right));
      move(Math.min(Math.max(state.row, state.i - rowsShown() + 1), state.i), Math.min(Math.max(state.column, state.j - columnsShown() + 1), state.j));
      drawWindow();
      pick();
      say(words(p, [state.i, state.j]));
    });
    return figure;
  });
  // The cell under the pointer; a margin has only a row or only a column.
  function where({ canvas, at }, event) {
    const edge = canvas.getBoundingClientRect();
    const i = Math.floor((event.clientY - edge.top - at.top) / at.cell), j = Math.floor((event.clientX - edge.left - at.left) / at.cell);
    const [r, c] = [i >= 0 && i < rowsShown() ? state.row + i : null, j >= 0 && j < columnsShown() ? state.column + j : null];
    return r === null && c === null ? null : [r, c];
  }
  function words(p, at) {
    if (!at) return "";
    const a = map(p), panel = panels[p], stop = panel.stops[current(p)], [i, j] = at;
    if (i === null) return `${label(data.columns[j], j)}: column sum ${number(stop.columns[j])}`;
    if (j === null) return sumWords(panel, stop, i);
    const share = a.exact[i * m + j] && a.sizes[i] ? `, ${percent(Math.abs(a.cells[i * m + j]) / a.sizes[i])} of the row's Σ|·|` : "";
    return `${panel.name}\n${a.words(i, j)}${share}\n${data.axes[1]}: ${label(data.columns[j], j)}\n${data.axes[0]}: ${label(data.rows[i], i)}`;
  }
  function sumWords(panel, stop, i) {
    const head = `${label(data.rows[i], i)}: row sum ${number(stop.sums[i])}`;
    if (!stop.constants) return head;
    const [sum, target] = [stop.sums[i] + stop.constants[i], panel.target[i]];
    return `${head}, constants ${number(stop.constants[i])}, together ${number(sum, 6)}; ${panel.target_name} ${number(target, 6)}, off by ${number(Math.abs(sum - target), 1, false)}`;
  }
  // Room for the longest name of a row.
  function names(most) {
    const pen = make("canvas", {}).getContext("2d");
    pen.font = "11px system-ui, sans-serif";
    return Math.min(most, 16 + data.rows.reduce((a, name) => Math.max(a, pen.measureText(name).width), 50));
  }
  function drawFigure(p) {
    const panel = panels[p], figure = figures[p], a = map(p), stop = panel.stops[current(p)];
    const ratio = devicePixelRatio || 1, narrow = box.clientWidth < 560, signed = panel.signed || a.signed;
    const tight = narrow || (windowed && panels.length > 1), left = data.named ? names(narrow ? 120 : 180) : tight ? 68 : 100, right = tight ? 46 : 84, bottom = 46, [h, w] = [rowsShown(), columnsShown()];
    // Side by side where there is room: the whole map, and up to two panels.
    const broad = box.clientWidth > 900, many = broad ? Math.min(2, panels.length) : 1;
    const room = (box.clientWidth - (windowed && broad ? wide() + 26 : 0) - 26 * (many - 1)) / many;
    const cell = Math.max(1, Math.min(Math.max(26, (picture ? 400 : data.patches ? 200 : 0) / h), (room - left - right) / w, Math.max(14, 900 / h)));
    // Names that fit above their cells stand upright; the two names of the axes need room as well.
    const flat = data.columns.every((name) => 8 * name.length < cell), top = flat ? 36 : 84, ends = Math.max(left + w * cell, 215);
    figure.at = { left, top, cell };
    const [width, height] = [Math.max(left + w * cell + right, 220), top + h * cell + bottom], { canvas } = figure;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    figure.box.style.width = `${Math.max(width, Math.min(360, box.clientWidth))}px`;
    const pen = canvas.getContext("2d"), colours = palette(signed), [text, quiet] = [css("--text"), css("--quiet")];
    pen.scale(ratio, ratio);
    pen.fillStyle = css("--ground");
    pen.fillRect(0, 0, width, height);
    // 1. Cells.
    const image = new ImageData(w, h), out = new Uint32Array(image.data.buffer);
    for (let i = 0; i < h; i++) {
      const full = state.rowwise ? a.tops[state.row + i] : a.top;
      for (let j = 0; j < w; j++) {
        const here = (state.row + i) * m + state.column + j;
        out[i * w + j] = a.form === "largest" && !a.exact[here] ? colours.none : colours.word(a.cells[here], full);
        if ((a.triangle && state.column + j > state.row + i) || (data.named && Number.isNaN(a.cells[here]))) out[i * w + j] = colours.none;
      }
    }
    const small = make("canvas", { width: w, height: h });
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    if (!state.bare) pen.filter = "grayscale(1)"; // so that the only colours are those of the numbers
    if (picture) pen.drawImage(picture, (state.column / m) * picture.width, (state.row / n) * picture.height, (w / m) * picture.width, (h / n) * picture.height, left, top, w * cell, h * cell);
    pen.filter = "none";
    pen.globalAlpha = picture ? (state.bare ? 0 : 0.6) : 1;
    pen.drawImage(small, left, top, w * cell, h * cell);
    pen.globalAlpha = 1;
    pen.strokeStyle = css("--line");
    pen.strokeRect(left - 0.5, top - 0.5, w * cell + 1, h * cell + 1);
    // 2. Tokens on both sides; every label where there is room.
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.direction = "ltr";
    const every = Math.ceil(12 / cell), most = data.named ? 28 : tight ? 9 : 14;
    for (let i = 0; i < h; i++) {
      const chosen = state.row + i === state.i;
      if (!chosen && (i % every || Math.abs(state.row + i - state.i) < every)) continue;
      pen.fillStyle = chosen ? text : quiet;
      pen.textAlign = "right";
      pen.fillText(shown(data.rows[state.row + i], most), left - 6, top + (i + 0.5) * cell, left - 8);
    }
    for (let j = 0; j < w; j++) {
      const chosen = state.column + j === state.j;
      if (!chosen && (j % every || Math.abs(state.column + j - state.j) < every)) continue;
      pen.save();
      pen.translate(left + (j + 0.5) * cell, top - 6);
      if (!flat) pen.rotate(-Math.PI / 3);
      pen.fillStyle = chosen ? text : quiet;
      pen.textAlign = flat ? "center" : "left";
      pen.fillText(shown(data.columns[state.column + j], 11), 0, flat ? -4 : 0, 74);
      pen.restore();
    }
    // 3. Margins: row sums beside their targets, column sums below.
    const rowFull = Math.max(...sizesOf(stop.sums), ...sizesOf(panel.target || []), 1e-300), mid = left + w * cell + 8 + (right - 16) / 2;
    for (let i = 0; i < h; i++) {
      const y = top + i * cell, x = stop.sums[state.row + i], long = ((right - 16) / 2) * (x / rowFull);
      pen.fillStyle = css(hue(signed, x));
      if (long === long) pen.fillRect(Math.min(mid, mid + long), y + cell * 0.2, Math.abs(long), cell * 0.6);
      if (!panel.target) continue;
      const at = mid + ((right - 16) / 2) * (panel.target[state.row + i] / rowFull);
      pen.fillStyle = text;
      pen.fillRect(at - 1, y + cell * 0.05, 2, Math.max(1, cell * 0.9));
    }
    const columnFull = Math.max(...sizesOf(stop.columns), 1e-300), line = top + h * cell + 6 + (bottom - 12) / 2;
    for (let j = 0; j < w; j++) {
      const x = stop.columns[state.column + j], tall = ((bottom - 12) / 2) * (x / columnFull);
      pen.fillStyle = css(hue(signed, x));
      if (tall === tall) pen.fillRect(left + j * cell + cell * 0.2, Math.min(line, line - tall), Math.max(0.5, cell * 0.6), Math.abs(tall));
    }
    pen.fillStyle = css("--line");
    pen.fillRect(mid - 0.5, top, 1, h * cell);
    pen.fillRect(left, line - 0.5, w * cell, 1);
    pen.fillStyle = quiet;
    pen.textAlign = "center";
    pen.fillText("row sum", mid, top - 8, right - 4);
    pen.textAlign = "right";
    pen.fillText("column sum", left - 6, line, left - 8);
    pen.fillText(`${data.axes[1]} →`, ends, 8);
    pen.textAlign = "left";
    pen.fillText(`${data.axes[0]} ↓`, 0, 8);
    // 4. The selected cell.
    pen.strokeStyle = css("--mark");
    pen.lineWidth = 1.5;
    const [y, x] = [state.i - state.row, state.j - state.column];
    if (y >= 0 && y < h) pen.strokeRect(left, top + y * cell, w * cell, cell);
    if (x >= 0 && x < w) pen.strokeRect(left + x * cell, top, cell, h * cell);
    // 5. What it is, in words.
    figure.caption.replaceChildren(make("b", {}, panel.name), stop.name && panel.stops.length > 1 ? `, ${data.slider.toLowerCase()} ${stop.name}. ` : ". ", panel.note || "",
      a.form === "coarse" ? ` Colours have ${2 * a.steps + 1} levels; ${percent(a.share)} of Σ|·| is exact to the digit.` : "",
      a.form === "largest" ? ` The largest cells of each row: ${percent(a.share)} of Σ|·|.` : "");
    figure.scale.replaceChildren(legend(state.rowwise && y >= 0 && y < h ? a.tops[state.i] : a.top, panel.unit + (state.rowwise ? ", of the selected row" : ""), a.signed, signed));
  }
  const sizesOf = (numbers) => {
    let top = 0;
    for (const x of numbers) if (Math.abs(x) > top && Math.abs(x) < Infinity) top = Math.abs(x);
    return [top];
  };

  // --- Exact numbers of the selected row and column
  const lists = make("div", { class: "panels" });
  function pick() {
    const { i, j, p } = state, a = map(p), row = [], column = [], name = panels.length > 1 ? `${panels[p].name}, ` : "";
    for (let k = 0; k < m; k++) if (a.exact[i * m + k] && a.cells[i * m + k]) row.push([label(data.columns[k], k), a.cells[i * m + k]]);
    for (let k = 0; k < n; k++) if (a.exact[k * m + j] && a.cells[k * m + j]) column.push([label(data.rows[k], k), a.cells[k * m + j]]);
    if (data.link) document.dispatchEvent(new CustomEvent("row", { detail: { link: data.link, row: i } }));
    lists.replaceChildren(
      listing(row, { title: `${name}row ${sumWords(panels[p], panels[p].stops[current(p)], i)}`, total: a.sizes[i], signed: panels[p].signed || a.signed }),
      listing(column, { title: `${name}column ${words(p, [null, j])}`, signed: panels[p].signed || a.signed }));
  }
  function drawWindow() {
    panels.forEach((_, p) => drawFigure(p));
    drawOverview();
  }
  function draw() {
    if (windowed) drawWhole();
    drawWindow();
  }
  box.append(make("div", { class: "panels" }, windowed ? make("figure", {}, make("figcaption", {}, "The whole map. Drag the window."), overview) : null,
    figures.map((figure) => figure.box)), lists);
  for (let j = 1, a = map(0); j < m; j++)
    if (Math.abs(a.cells[state.i * m + j]) > Math.abs(a.cells[state.i * m + state.j])) state.j = j;
  watch(draw);
  pick();
  return { value: (p, i, j) => map(p).cells[i * m + j], exact: (p, i, j) => map(p).exact[i * m + j], words, state, draw, drawWindow, figures, form: (p) => map(p).form };
};
