// Okabe and Ito's colours, which colour-blind people tell apart, in three depths. A colour is never the only sign:
// the panel names every expert, and pointing at one dims all others.

const HUES = [[230, 159, 0], [86, 180, 233], [0, 158, 115], [213, 94, 0], [204, 121, 167], [0, 114, 178], [200, 184, 30]];
const DEPTHS = [0, 0.38, -0.3];

function shade([r, g, b], depth) {
  const to = depth > 0 ? 255 : 0;
  const mix = (value) => Math.round(value + (to - value) * Math.abs(depth));
  return `rgb(${mix(r)} ${mix(g)} ${mix(b)})`;
}

const table = DEPTHS.flatMap((depth) => HUES.map((hue) => shade(hue, depth)));

const cards = new Map(); // by model: {layer: {expert: card}}
let domains = [];
let wanted = true;

/** The cards of a model. Domains have one colour for all models. */
export function setCards(model, given) {
  cards.set(model, given);
  const all = [...cards.values()].flatMap((each) => Object.values(each)).flatMap((layer) => Object.values(layer));
  domains = [...new Set(all.map((card) => card.domain).filter(Boolean))].sort();
}

export const cardOf = (model, layer, expert) => cards.get(model)?.[layer]?.[expert] ?? null;
export const hasCards = (model) => Object.keys(cards.get(model) ?? {}).length > 0;
export const hasDomains = (model) => Object.values(cards.get(model) ?? {}).some((layer) => Object.values(layer).some((card) => card.domain));
export function wantDomains(yes) { wanted = yes; }
export const colouredByDomain = () => wanted && domains.length > 0;
export const legend = () => domains.map((domain, at) => ({ domain, colour: table[at % table.length] }));

export function colourOf(model, layer, expert) {
  if (!wanted || !hasDomainsOf(model)) return table[expert % table.length];
  const at = domains.indexOf(cardOf(model, layer, expert)?.domain);
  return at < 0 ? "rgb(140 140 140)" : table[at % table.length];
}

// Asked for every piece of every lane.
const hasDomainsOf = (model) => domains.length > 0 && cards.has(model);

/** A square of a colour. */
export function swatch(colour) {
  const node = document.createElement("span");
  node.className = "swatch";
  node.style.backgroundColor = colour;
  node.setAttribute("aria-hidden", "true");
  return node;
}
