"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);

{% include "base.js" %}

  function draw() {
    const traces = page.figure.data.map((trace) => {
      const paint = colour(`arm-${trace.meta.arm}`);
      if (trace.meta.band) return { ...trace, fillcolor: `${paint}22` };
      const marker = { color: paint, size: 9, symbol: page.symbols[trace.meta.arm] };
      return { ...trace, line: { color: paint, width: 2 }, marker };
    });
    for (const node of document.querySelectorAll("[data-figure]")) {
      Plotly.react(node, traces, themedLayout(page.figure.layout), config);
    }
  }

  draw();
})();
