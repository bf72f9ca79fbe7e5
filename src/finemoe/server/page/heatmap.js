// The load over the conversation: a row for each layer, a cell for each expert.

import { cardOf } from "./colours.js";
import { button, el, fill } from "./dom.js";
import { expertDetail } from "./inspector.js";
import { highlight } from "./lanes.js";
import { moeLayers } from "./switchboard.js";
import { loadOf } from "./trace.js";

const ROW = 16;
// Cividis, which keeps its order for colour-blind eyes and in grey.
const STOPS = [[0, 34, 78], [60, 77, 110], [124, 123, 120], [188, 174, 108], [254, 232, 56]];

function shade(value) {
  const at = Math.max(0, Math.min(0.999, value)) * (STOPS.length - 1);
  const [from, to] = [STOPS[Math.floor(at)], STOPS[Math.floor(at) + 1]];
  return `rgb(${from.map((each, channel) => Math.round(each + (to[channel] - each) * (at % 1))).join(" ")})`;
}

export class Heatmap {
  constructor(box, { tryOut }) {
    this.box = box;
    this.tryOut = tryOut;
    this.detail = el("div");
    new ResizeObserver(() => this.paint()).observe(box);
  }

  /** 1 is an even share of the tokens. */
  times(at, expert) { return (this.load.counts[at].get(expert) ?? 0) / this.even[at]; }

  show(traces, model) {
    this.model = model?.id;
    // Expert 5 of one model is nothing to expert 5 of another.
    this.load = loadOf(traces.filter((trace) => trace.model === this.model));
    const { layers, counts, tokens } = this.load;
    const known = moeLayers(model);
    this.detail.replaceChildren();
    if (!layers.length) {
      this.canvas = null;
      fill(this.box, el("h3", {}, "Load in this conversation"), el("p.quiet", {}, model?.finemoe?.layers && !known.length ? "This model has no experts to choose from." : "Appears with the first answer: how often each expert of each layer was chosen."));
      return;
    }
    this.experts = layers.map((layer, at) => known.find((each) => each.layer === layer)?.experts ?? Math.max(...counts[at].keys()) + 1);
    this.even = counts.map((row, at) => [...row.values()].reduce((sum, count) => sum + count, 0) / this.experts[at]);
    this.canvas = el("canvas", { role: "img", "aria-label": `Load of ${layers.length} layers; the table below says the same in words.`,
      onclick: (event) => this.at(event, true), onpointermove: (event) => this.at(event, false),
      onpointerleave: () => { highlight(null); this.hint.textContent = this.idle; } });
    this.idle = `${tokens} tokens. Rows are layers, cells experts. Dark blue: never; grey: about twice an even share; yellow: four times or more.`;
    this.hint = el("p.quiet.hint", {}, this.idle);
    fill(this.box, el("h3", {}, "Load in this conversation"), el("div.heat", {}, this.canvas), this.hint, this.detail, this.table());
    this.paint();
  }

  table() {
    const { layers, counts, tokens } = this.load;
    return el("details", {}, el("summary", {}, "As a table"), el("table", {},
      el("thead", {}, el("tr", {}, ["Layer", "Most chosen", "Never"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, layers.map((layer, at) => el("tr", {}, el("th", { scope: "row" }, String(layer)),
        el("td", {}, [...counts[at]].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([expert, count]) =>
          button(`${expert}: ${Math.round((100 * count) / tokens)} %`, () => this.open(layer, expert), { class: "small", title: `Expert ${expert} of layer ${layer}` }))),
        el("td", {}, `${this.experts[at] - counts[at].size} of ${this.experts[at]}`))))));
  }

  open(layer, expert) {
    fill(this.detail, expertDetail(this.model, layer, expert, { tryOut: this.tryOut, close: () => this.detail.replaceChildren() }));
    this.detail.querySelector("button")?.focus();
  }

  paint() {
    if (!this.canvas) return;
    const { layers } = this.load;
    const most = Math.max(...this.experts);
    const room = this.box.clientWidth - 56;
    if (room <= 0) return;
    // Cells of 3 pixels at least; a layer of 256 experts scrolls inside its box.
    this.cell = Math.max(3, Math.min(24, room / most));
    const ratio = Math.min(2, devicePixelRatio || 1);
    const [width, height] = [this.cell * most + 24, ROW * layers.length];
    this.canvas.width = Math.ceil(width * ratio);
    this.canvas.height = Math.ceil(height * ratio);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const ink = getComputedStyle(this.box).color;
    layers.forEach((layer, at) => {
      pen.fillStyle = ink;
      pen.fillText(String(layer), 0, at * ROW + 12);
      for (let expert = 0; expert < this.experts[at]; expert += 1) {
        pen.fillStyle = shade(this.times(at, expert) / 4);
        pen.fillRect(24 + expert * this.cell, at * ROW, Math.max(1, this.cell - 0.5), ROW - 1);
      }
    });
  }

  at(event, clicked) {
    const at = Math.floor(event.offsetY / ROW);
    const expert = Math.floor((event.offsetX - 24) / this.cell);
    const layer = this.load.layers[at];
    if (layer === undefined || expert < 0 || expert >= this.experts[at]) return;
    const card = cardOf(this.model, layer, expert);
    const count = this.load.counts[at].get(expert) ?? 0;
    this.hint.textContent = `Expert ${expert} of layer ${layer}${card?.title ? ` (${card.title})` : ""}: ${count} of ${this.load.tokens} tokens, `
      + `${this.times(at, expert).toFixed(1)} times an even share.`;
    highlight({ model: this.model, layer, expert });
    if (clicked) this.open(layer, expert);
  }
}
