// Words on a grid, each shaded by its share: what is read at every place.
views.words = (box, data, watch) => {
  const { rows, columns, words, shares } = data, m = columns.length;
  function draw() {
    const [ground, ink] = [rgb("--ground"), rgb("--size")];
    const cell = (i, j) => {
      const t = 0.45 * (shares[i * m + j] || 0), made = make("td", {}, make("bdi", { dir: "ltr" }, shown(words[i * m + j], 12)),
        make("span", { class: "quiet" }, percent(shares[i * m + j])));
      made.style.background = `rgb(${ground.map((c, k) => Math.round(c + (ink[k] - c) * t))})`;
      return made;
    };
    box.replaceChildren(make("div", { class: "listing", tabindex: 0, role: "region", "aria-label": `${data.name}: scroll with the arrow keys` }, make("table", {},
      make("caption", {}, data.name),
      make("thead", {}, make("tr", {}, make("td", {}), columns.map((name) => make("th", { scope: "col" }, make("bdi", { dir: "ltr" }, shown(name, 14)))))),
      make("tbody", {}, rows.map((name, i) => make("tr", {}, make("th", { scope: "row" }, name), columns.map((_, j) => cell(i, j))))))));
  }
  watch(draw);
  return { word: (i, j) => words[i * m + j], share: (i, j) => shares[i * m + j] };
};
