// The token that is pointed at: its probability, its alternatives, its experts.

import { cardOf, colourOf, hasCards, swatch } from "./colours.js";
import { button, el, fill } from "./dom.js";
import { highlight, nameOf, visible } from "./lanes.js";

const percent = (share) => (share < 0.0005 ? "< 0.1 %" : share >= 0.1 ? `${Math.round(share * 100)} %` : `${(share * 100).toFixed(1)} %`);

/** A bar from 0 to 1; its number stands beside it as text. */
export function bar(share, colour) {
  const fill = el("span.fill");
  fill.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
  if (colour) fill.style.backgroundColor = colour;
  return el("span.meter", { "aria-hidden": "true" }, fill);
}

const NO_CARD = "No card: the analysis of this model says nothing of this expert.";
const NO_CARDS = () => ["No card: this model has not been analysed. ", el("code", {}, "finemoe analyze experts MODEL --out MODEL/experts"), " does it."];

/** An expert and its two switches. `tryOut(kind, layer, expert)` answers again beside the original. */
export function expertDetail(model, layer, expert, { tryOut, close }) {
  const card = cardOf(model, layer, expert);
  return el("div.expert-detail", { role: "group", "aria-label": `Layer ${layer}, expert ${expert}` },
    el("div.row", {}, swatch(colourOf(model, layer, expert)), el("strong.grow", {}, `Expert ${expert} of layer ${layer}`),
      close ? button("×", close, { class: "plain", "aria-label": "Close the expert" }) : ""),
    card ? el("p", {}, el("strong", {}, card.title ?? "No title"), card.domain ? ` · ${card.domain}` : "",
      Number.isFinite(card.share) ? ` · ${percent(card.share)} of the tokens` : "") : el("p.quiet", {}, hasCards(model) ? NO_CARD : NO_CARDS()),
    card?.tokens?.length ? el("p.quiet", {}, "Often chosen for ", card.tokens.slice(0, 10).map((token) => [el("code", {}, nameOf(String(token))), " "])) : "",
    tryOut ? el("div.row", {}, button("Switch off", () => tryOut("disabled", layer, expert)), button("Force", () => tryOut("forced", layer, expert))) : "",
    tryOut ? el("p.quiet", {}, "The answer is made again beside the original, with the same seed.") : "");
}

export class Inspector {
  constructor(box) {
    this.box = box;
    this.clear();
  }

  clear() {
    this.pinned = null;
    fill(this.box, el("h3", {}, "Token"), el("p.quiet", {},
      "Point at a word of an answer, or go through the words with the arrow keys, to see which experts made it. A click holds it here."));
  }

  /** `tryOut` is missing where an answer cannot be made again. */
  show(trace, at, { tryOut, pinned = false, layers = [] }) {
    const token = trace.tokens[at];
    if (!token) return;
    this.pinned = pinned;
    const shared = (index) => token.s[index];
    fill(this.box,
      el("h3", {}, "Token ", el("code.token-name", {}, token.t.trim() ? visible(token.t) : nameOf(token.t))),
      el("p.quiet", {}, [`number ${at + 1}`, token.i !== undefined ? `id ${token.i}` : "",
        token.p !== null ? `probability ${percent(Math.exp(token.p))}` : "", pinned ? "held" : ""].filter(Boolean).join(" · ")),
      this.alternatives(token, trace.a[at]),
      trace.layers.map((layer, index) => this.layer(trace.model, layer, token.e[index] ?? [], token.g[index] ?? [], shared(index), tryOut,
        layers.find((each) => each.layer === layer))));
  }

  alternatives(token, others) {
    if (!others?.length) return "";
    // What was drawn need not be among the likeliest.
    const rows = others.some(([text]) => text === token.t) || token.p === null ? [...others] : [[token.t, token.p], ...others];
    rows.sort((a, b) => b[1] - a[1]);
    return el("table.alternatives", {}, el("caption", {}, "What could have stood here"),
      el("thead", {}, el("tr", {}, ["Token", "Probability", "Log-probability"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map(([text, logprob]) => {
        const own = text === token.t;
        return el(own ? "tr.own" : "tr", {}, el("th", { scope: "row" }, el("code", {}, text.trim() ? visible(text) : nameOf(text)), own ? el("span.quiet", {}, " chosen") : ""),
          el("td", {}, bar(Math.exp(logprob)), percent(Math.exp(logprob))), el("td.number", {}, logprob.toFixed(2)));
      })));
  }

  layer(model, layer, experts, gates, shared, tryOut, facts) {
    const detail = el("div");
    const chips = experts.map((expert, slot) => {
      const card = cardOf(model, layer, expert);
      const colour = colourOf(model, layer, expert);
      const hidden = (text) => el("span.sr", {}, text);
      const chip = button([swatch(colour), hidden("Expert "), el("span", {}, `${expert}`),
        bar((gates[slot] ?? 0) / (Math.max(...gates) || 1), colour),
        gates[slot] === undefined ? "" : [hidden(", gate "), el("span.quiet", {}, gates[slot].toFixed(gates[slot] < 0.1 ? 3 : 2))],
        card?.title ? hidden(`, ${card.title}`) : ""], () => {
        const open = chip.getAttribute("aria-expanded") === "true";
        for (const each of chips) each.setAttribute("aria-expanded", "false");
        chip.setAttribute("aria-expanded", String(!open));
        fill(detail, open ? "" : expertDetail(model, layer, expert, { tryOut }));
      }, { class: "chip", "aria-expanded": "false", title: card?.title ?? null,
        onpointerenter: () => highlight({ model, layer, expert }), onpointerleave: () => highlight(null),
        onfocus: () => highlight({ model, layer, expert }), onblur: () => highlight(null) });
      return chip;
    });
    return el("div.layer", { role: "group", "aria-label": `Layer ${layer}` },
      el("div.layer-head", {}, el("span", {}, `Layer ${layer}`, facts?.experts ? el("span.quiet", {}, ` ${experts.length} of ${facts.experts}`) : ""),
        Number.isFinite(shared) ? el("span.shared", {}, "shared ", bar(shared), ` ${Math.round(shared * 100)} %`) : ""),
      el("div.chips", {}, chips), detail);
  }
}
