  // What all pages share: colours from the style sheet, plotly's layout in them, the theme switch and printing.
  // The page defines draw(), which is called again whenever a colour or the width changes.
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const config = { responsive: false, displayModeBar: false, displaylogo: false, scrollZoom: false };
  let paperWidth = null;

  function axisStyle(own) {
    const line = { gridcolor: colour("grid"), linecolor: colour("line"), tickcolor: colour("line"), automargin: true };
    const title = own && own.title ? { ...own.title, standoff: 10, font: { color: colour("soft"), size: 13 } } : undefined;
    return { ...line, zeroline: false, zerolinecolor: colour("soft"), zerolinewidth: 1.5, ...own, title };
  }

  function themedLayout(own) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("soft") },
      hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("line"), font: { color: colour("ink"), size: 13 } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...own, xaxis: axisStyle(own.xaxis), yaxis: axisStyle(own.yaxis),
      shapes: (own.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, width: 1, color: colour("soft") } })),
      margin: { l: 8, r: 12, t: 12, b: 8, ...own.margin },
      ...(paperWidth ? { width: paperWidth } : {}),
    };
  }

  const toggle = document.getElementById("theme");
  const label = () => {
    const words = isDark() ? "Light theme" : "Dark theme";
    toggle.title = words;
    toggle.setAttribute("aria-label", words);
  };
  try {
    const stored = localStorage.getItem("mixtura-theme");
    if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  } catch { /* a page from a file may have no storage */ }
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("mixtura-theme", root.dataset.theme); } catch { /* see above */ }
    label();
    draw();
  });
  systemDark.addEventListener("change", () => { label(); draw(); });

  // Paper is white and narrower than the window.
  let screenTheme;
  addEventListener("beforeprint", () => {
    screenTheme = root.dataset.theme;
    root.dataset.theme = "light";
    paperWidth = 660;
    draw();
  });
  addEventListener("afterprint", () => {
    if (screenTheme) root.dataset.theme = screenTheme; else delete root.dataset.theme;
    paperWidth = null;
    draw();
  });
  label();

  // Plotly itself follows the window only, a moment later. A plot's place also changes when a scroll bar comes or a
  // fold opens, and whoever takes a picture of the page in that moment should not see a plot cut off.
  const places = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const width = Math.round(contentRect.width);
      const drawn = target._fullLayout && Math.round(target._fullLayout.width);
      if (drawn && width && !paperWidth && drawn !== width) Plotly.relayout(target, { autosize: true });
    }
  });
  for (const node of document.querySelectorAll(".plot")) places.observe(node);
