"use strict";
// The page is drawn from one state, the layer that is shown; without a script it shows the layer that tells most.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  let layer = page.first;

{% include "base.js" %}

  function drawOverview(node) {
    const traces = page.overview.data.map((trace) => {
      const line = { ...trace.line, color: colour(trace.meta.paint) };
      return trace.marker ? { ...trace, line, marker: { ...trace.marker, color: line.color } } : { ...trace, line };
    });
    Plotly.react(node, traces, themedLayout(page.overview.layout), config);
  }

  function drawMap(node, map) {
    const trace = {
      type: "heatmap", x: map.x, y: map.y, z: map.z, text: map.text, texttemplate: "%{text}", zmin: 0, xgap: 2, ygap: 2,
      colorscale: [[0, colour("panel")], [1, colour("map-high")]], showscale: false, textfont: { color: colour("ink") },
      hovertemplate: "%{y}, %{x}: %{z:.1%}<extra></extra>",
    };
    const layout = themedLayout({ height: map.height, xaxis: { type: "category", side: "top" }, yaxis: { autorange: "reversed" } });
    layout.xaxis.showgrid = layout.yaxis.showgrid = false;
    Plotly.react(node, [trace], layout, config);
  }

  function draw() {
    if (layer === null) return;
    for (const node of document.querySelectorAll("[data-figure]")) drawOverview(node);
    for (const node of document.querySelectorAll("[data-map]")) drawMap(node, page.maps[layer][node.dataset.map]);
  }

  function show(name) {
    for (const node of document.querySelectorAll("[data-chosen]")) node.textContent = name;
    for (const node of document.querySelectorAll("[data-layer]")) node.hidden = Number(node.dataset.layer) !== layer;
    for (const node of document.querySelectorAll("ruby")) {
      const expert = node.dataset.e.split(",")[layer];
      node.classList.toggle("none", expert === "");
      node.style.setProperty("--c", expert === "" ? "transparent" : `var(--expert-${Number(expert) % page.numColours})`);
      node.title = expert === "" ? "" : `expert ${expert}`;
      node.querySelector("rt").textContent = expert;
    }
    draw();
  }

  const chooser = document.getElementById("chooser");
  if (chooser) {
    chooser.hidden = false;
    for (const input of chooser.querySelectorAll("input")) {
      input.addEventListener("change", () => { layer = Number(input.value); show(input.dataset.name); });
    }
  }
  draw();
})();
