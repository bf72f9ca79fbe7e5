"use strict";
// Draws every chart for the current colour scheme, and again when the scheme changes or the page is printed.
const { charts, config } = JSON.parse(document.getElementById("chart-data").textContent);
const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();
let latest = 0;

async function draw(scheme) {
  const turn = ++latest;
  for (const element of document.querySelectorAll("[data-chart]")) {
    try {
      const result = await vegaEmbed(element, charts[Number(element.dataset.chart)], {
        mode: "vega-lite",
        renderer: "svg",
        config: config[scheme],
        actions: { export: true, source: false, compiled: false, editor: false },
        tooltip: { theme: scheme },
      });
      drawn.get(element)?.finalize();
      drawn.set(element, result);
    } catch (error) {
      element.textContent = `This chart could not be drawn: ${error.message}`;
    }
    if (turn !== latest) return; // a later call has begun and draws everything itself
  }
}

const current = () => (darkScheme.matches ? "dark" : "light");
draw(current());
darkScheme.addEventListener("change", () => draw(current()));
// A chart drawn while folded away has no width: the charts listen for a change of the window's.
for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => details.open && window.dispatchEvent(new Event("resize")));
}
window.addEventListener("beforeprint", () => darkScheme.matches && draw("light"));
window.addEventListener("afterprint", () => darkScheme.matches && draw(current()));
