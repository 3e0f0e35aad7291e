"use strict";
// The page is drawn from one state: every control changes it and draws again. Colours come from the style sheet.
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const state = { axis: "steps", log: false, seeds: true, whole: false, hidden: new Set(), mapSeed: page.mapSeeds[0] };

{% include "base.js" %}

  function traceOf(trace) {
    const { arm, role, scale } = trace.meta;
    const paint = colour(`arm-${arm}`);
    const x = scale && state.axis !== "steps" ? trace.x.map((step) => step * scale[state.axis]) : trace.x;
    const visible = !state.hidden.has(arm) && (role !== "seed" || state.seeds || trace.mode === "markers");
    const themed = { ...trace, x, visible, line: { ...trace.line, color: paint } };
    if (trace.marker) themed.marker = { ...trace.marker, color: paint, line: { ...trace.marker.line, color: paint } };
    if (trace.error_x) themed.error_x = { ...trace.error_x, color: paint };
    return themed;
  }

  // Plotly writes the 2 and the 5 between powers of ten without their power; these are whole numbers with a prefix.
  function logTicks() {
    const tickvals = [];
    for (let power = -3; power < 27; power += 1) for (const digit of [1, 2, 5]) tickvals.push(digit * 10 ** power);
    const prefixes = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [0, ""]];
    const text = (value) => {
      const [scale, prefix] = prefixes.find(([least]) => value >= least * 0.999);
      return Number((value / (scale || 1)).toPrecision(3)) + prefix;
    };
    return { tickvals, ticktext: tickvals.map(text) };
  }

  function curveLayout(layout) {
    layout.xaxis.title.text = layout.meta.axes[state.axis];
    layout.xaxis.type = state.log ? "log" : "linear";
    if (state.log) Object.assign(layout.xaxis, logTicks());
    layout.hovermode = state.axis === "seconds" ? "closest" : "x unified";
    layout.yaxis.autorange = state.whole;
    layout.uirevision = [state.axis, state.log, state.whole].join();
    return layout;
  }

  function draw() {
    for (const node of document.querySelectorAll("[data-figure]")) {
      const figure = page.figures[node.dataset.figure];
      const layout = themedLayout(figure.layout);
      Plotly.react(node, figure.data.map(traceOf), node.dataset.figure === "curves" ? curveLayout(layout) : layout, config);
    }
    for (const node of document.querySelectorAll("[data-map]")) drawMap(node, page.maps[Number(node.dataset.map)]);
  }

  function drawMap(node, map) {
    const z = map.seeds[state.mapSeed] || Object.values(map.seeds)[0];
    const scale = [[0, colour("load-low")], [0.5, colour("load-mid")], [1, colour("load-high")]];
    const trace = {
      type: "heatmap", x: map.groups || map.steps, y: z.map((_, expert) => expert), z, zmin: 0, zmax: 2,
      colorscale: scale, showscale: false,
      hovertemplate: map.groups ? "%{x}, expert %{y}: %{z:.2f} times an even share<extra></extra>"
        : "step %{x}, expert %{y}: load %{z:.2f}<extra></extra>",
    };
    const steps = { title: { text: "Training steps" }, nticks: 5 };
    const xaxis = map.groups ? { type: "category", tickangle: map.groups.length > 6 ? -60 : 0, dtick: 1, tickfont: { size: 11 } } : steps;
    const axes = { xaxis, yaxis: { title: { text: "Expert" }, nticks: 6 } };
    const height = Math.min(440, Math.max(190, (map.groups ? 100 : 70) + 9 * map.experts));
    const layout = themedLayout({ ...axes, height });
    if (paperWidth) layout.width = paperWidth / 2 - 12;
    layout.xaxis.showgrid = layout.yaxis.showgrid = false;
    Plotly.react(node, [trace], layout, config);
  }

  function listen(selector, change) {
    for (const input of document.querySelectorAll(selector)) {
      input.addEventListener("change", () => { change(input); draw(); });
    }
  }
  listen('input[name="axis"]', (input) => { state.axis = input.value; });
  listen('input[name="map-seed"]', (input) => { state.mapSeed = input.value; });
  listen("#log", (input) => { state.log = input.checked; });
  listen("#seeds-shown", (input) => { state.seeds = input.checked; });
  listen("#whole", (input) => { state.whole = input.checked; });
  listen("input[data-arm]", (input) => {
    state.hidden[input.checked ? "delete" : "add"](Number(input.dataset.arm));
  });

  const copy = document.getElementById("copy");
  copy.hidden = false;
  copy.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById("command"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    copy.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });

  draw();
})();
