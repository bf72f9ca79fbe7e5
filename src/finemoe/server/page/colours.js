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

let cards = null;
let domains = [];
let byDomain = false;

/** The cards of the model, and whether they colour the lanes. */
export function useCards(given, colourByDomain) {
  cards = given;
  domains = [...new Set(Object.values(given ?? {}).flatMap((layer) => Object.values(layer).map((card) => card.domain)).filter(Boolean))].sort();
  byDomain = Boolean(colourByDomain && domains.length);
}

export const cardOf = (layer, expert) => cards?.[layer]?.[expert] ?? null;
export const hasDomains = () => domains.length > 0;
export const colouredByDomain = () => byDomain;
export const legend = () => domains.map((domain, at) => ({ domain, colour: table[at % table.length] }));

export function colourOf(layer, expert) {
  if (!byDomain) return table[expert % table.length];
  const at = domains.indexOf(cardOf(layer, expert)?.domain);
  return at < 0 ? "rgb(140 140 140)" : table[at % table.length];
}

/** A square of a colour, drawn by script: a style attribute would be refused by the policy. */
export function swatch(colour) {
  const node = document.createElement("span");
  node.className = "swatch";
  node.style.backgroundColor = colour;
  node.setAttribute("aria-hidden", "true");
  return node;
}
