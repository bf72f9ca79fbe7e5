// Expert cards: an overview of all experts, a search, and cards that are made when they are about to be seen.
const BATCH = 24;
const KEYS = "123456789abcdefghijklmnopqrstuvwxyz";
const { domains, cards, layers, one_domain: oneDomain } = data;
const byId = new Map(cards.map((card) => [card.id, card]));
let shown = [];
let drawn = 0;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
const title = (card) => `L${card.layer} E${card.expert}`;
const specialization = (card) => card.specialization ?? -1;
// The full colour is the next tenth above what is there: on a scale to 1 most models would be blank.
const sharpest = Math.ceil(10 * Math.max(0.1, ...cards.map(specialization))) / 10;

// ---- what to show: search, filters, order; all of it stands in the address, so that a view can be linked ----

const plain = (text) => text.toLowerCase().replaceAll("␣", " ").trim();
for (const card of cards) {
  card.names = [`l${card.layer}`, `e${card.expert}`, card.id.toLowerCase()];
  card.words = card.tokens.map((token) => plain(token.text));
  card.lead = card.leading === null ? "" : domains[card.leading].toLowerCase();
}
const matchesWord = (card, word) =>
  /^(l\d+|e\d+|l\d+e\d+)$/.test(word)
    ? card.names.includes(word)
    : card.lead.includes(word) || card.words.some((token) => token.includes(word));
const ORDERS = {
  specialization: ["specialisation", (a, b) => specialization(b) - specialization(a)],
  load: ["load", (a, b) => b.load - a.load],
  idle: ["least load", (a, b) => a.load - b.load],
  gate: ["mean gate", (a, b) => (b.gate ?? -1) - (a.gate ?? -1)],
  layer: ["layer, expert", () => 0],
};
const COLOURS = {
  specialization: "specialisation",
  load: "load ÷ uniform",
  domain: "leading domain",
};
if (oneDomain) {
  delete ORDERS.specialization;
  delete COLOURS.specialization;
  delete COLOURS.domain;
}

function choice(label, options) {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", { value, text })));
  return [make("label", {}, make("span", { text: label }), select), select];
}
const search = make("input", {
  type: "search", placeholder: "token, domain, L2 E17", autocomplete: "off", spellcheck: "false",
});
const searchLabel = make("label", { class: "wide" }, make("span", { text: "Search" }), search);
const [layerLabel, layer] = choice("Layer", [["", "all layers"], ...layers.map((each) => [String(each.layer), `layer ${each.layer}`])]);
const [domainLabel, domain] = choice("Leading domain", [["", "all domains"], ...domains.map((name, i) => [String(i), name])]);
const [orderLabel, order] = choice("Sort by", Object.entries(ORDERS).map(([value, [text]]) => [value, text]));
const [colourLabel, colour] = choice("Colour by", Object.entries(COLOURS));
const status = make("p", { class: "status", role: "status" });
const form = make("form", { class: "controls", role: "search" }, searchLabel, layerLabel, domainLabel, orderLabel, colourLabel);
form.addEventListener("submit", (event) => event.preventDefault());
if (oneDomain) domainLabel.hidden = true;

function wanted(card) {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  return (
    (layer.value === "" || card.layer === Number(layer.value)) &&
    (domain.value === "" || card.leading === Number(domain.value)) &&
    words.every((word) => matchesWord(card, word))
  );
}

function refresh() {
  shown = cards.filter(wanted);
  shown.sort(ORDERS[order.value][1]);
  list.replaceChildren();
  drawn = 0;
  const inside = new Set(shown);
  for (const [id, cell] of cells) cell.classList.toggle("out", !inside.has(byId.get(id)));
  status.textContent = shown.length
    ? `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} experts`
    : "No expert matches. Search for part of a token, a domain, or an expert such as L2 E17.";
  root.dataset.shown = shown.length;
  more();
}

function remember() {
  const kept = new URLSearchParams();
  for (const [name, control] of Object.entries({ search, layer, domain })) if (control.value) kept.set(name, control.value);
  if (order.selectedIndex) kept.set("sort", order.value);
  if (colour.selectedIndex) kept.set("colour", colour.value);
  history.replaceState(null, "", `#${kept}`);
}

function recall() {
  const fragment = decodeURIComponent(location.hash.slice(1));
  if (byId.has(fragment)) return open(fragment);
  if (!fragment.includes("=")) return undefined;
  const kept = new URLSearchParams(location.hash.slice(1));
  const controls = { search, layer, domain, sort: order, colour };
  for (const [name, control] of Object.entries(controls)) {
    const value = kept.get(name);
    const known = control === search || [...control.options].some((option) => option.value === value);
    if (value !== null && known) control.value = value;
  }
  paint();
  return refresh();
}

function open(id) {
  if (!shown.includes(byId.get(id))) {
    search.value = layer.value = domain.value = "";
    refresh();
  }
  while (drawn <= shown.indexOf(byId.get(id))) more();
  const card = document.getElementById(id);
  card.scrollIntoView({ behavior: "instant" });
  card.focus({ preventScroll: true });
}

// ---- overview ----

const cells = new Map();
const overview = make("div", { class: "overview" });
const legend = make("p", { class: "legend" });
for (const each of layers) {
  const row = make("div", { class: "row", role: "group", "aria-label": `Layer ${each.layer}` });
  for (const card of cards.filter((card) => card.layer === each.layer)) {
    const cell = make("a", { class: "cell", href: `#${card.id}`, tabindex: cells.size ? "-1" : "0" });
    cells.set(card.id, cell);
    row.append(cell);
  }
  overview.append(make("span", { class: "layer", text: `layer ${each.layer}` }), row);
}

function paint() {
  for (const [id, cell] of cells) {
    const card = byId.get(id);
    const lead = card.leading === null ? "nothing" : domains[card.leading];
    const spec = oneDomain ? "" : `, specialisation ${number(card.specialization)}, leading domain ${lead}`;
    cell.title = `${title(card)}: load ${number(card.load)} × uniform${spec}`;
    cell.setAttribute("aria-label", cell.title);
    cell.textContent = "";
    let strength = 0;
    let hue = "var(--above)";
    if (colour.value === "specialization") strength = Math.max(0, specialization(card)) / sharpest;
    else if (colour.value === "load") {
      strength = card.load < 1 ? 1 - card.load : Math.min(1, (card.load - 1) / 3);
      if (card.load < 1) hue = "var(--below)";
    } else if (card.leading !== null) {
      cell.textContent = KEYS[card.leading];
      hue = `var(--domain-${card.leading % 8})`;
      strength = Math.max(0.25, specialization(card) / sharpest);
    }
    cell.style.background = `color-mix(in oklab, ${hue} ${Math.round(100 * strength)}%, var(--raised))`;
    cell.classList.toggle("strong", strength > 0.55);
  }
  legend.replaceChildren(...legendParts());
}

function ramp(...stops) {
  const bar = make("span", { class: "ramp" });
  bar.style.background = `linear-gradient(to right in oklab, ${stops.join(", ")})`;
  return bar;
}
function legendParts() {
  if (colour.value === "load") {
    return ["never used ", ramp("var(--below)", "var(--raised) 25%", "var(--above)"), " 4 times uniform or more (grey: uniform)"];
  }
  if (colour.value === "domain") {
    return domains.flatMap((name, i) => {
      const key = make("span", { class: "key strong", text: KEYS[i] });
      key.style.background = `var(--domain-${i % 8})`;
      return [key, ` ${name}  `];
    }).concat(["the stronger, the more specialised"]);
  }
  return ["0 (takes of every domain alike) ", ramp("var(--raised)", "var(--above)"), ` ${number(sharpest, 1)} (1 would be: of one domain alone)`];
}

// One stop for Tab, arrows within: hundreds of links are not to stand between a keyboard and the cards.
overview.addEventListener("keydown", (event) => {
  const all = [...cells.values()];
  const at = all.indexOf(event.target);
  const width = layers.length > 1 ? cards.filter((card) => card.layer === layers[0].layer).length : all.length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, Home: -at, End: all.length - 1 - at }[event.key];
  const next = all[at + step];
  if (at < 0 || !next) return;
  event.preventDefault();
  all[at].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// ---- cards ----

const list = make("div", { class: "expert-cards" });
const button = make("button", { type: "button" });
button.addEventListener("click", more);

function more() {
  list.append(...shown.slice(drawn, drawn + BATCH).map(cardOf));
  drawn = Math.min(drawn + BATCH, shown.length);
  button.hidden = drawn >= shown.length;
  button.textContent = `Show more (${(shown.length - drawn).toLocaleString("en")} left)`;
}

function cardOf(card) {
  const facts = [
    ["load", `${number(card.load)} × uniform`],
    ...(oneDomain ? [] : [["specialisation", number(card.specialization)]]),
    ["mean gate", number(card.gate, 3)],
  ];
  const heading = make("h3", {}, make("a", { href: `#${card.id}`, text: title(card) }));
  const parts = [heading, make("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]))];
  if (!card.assignments) parts.push(make("p", { class: "note", text: "No token of this text went to it." }));
  else parts.push(...tokensOf(card), ...contextsOf(card), ...domainsOf(card));
  parts.push(...stabilityOf(card), ...nearOf(card));
  return make("article", { id: card.id, class: "expert", tabindex: "-1", "aria-label": title(card) }, ...parts);
}

function tokensOf(card) {
  if (!card.tokens.length) return [make("p", { class: "note", text: "No token often enough to rank." })];
  const chips = card.tokens.map((token) =>
    make("li", { title: `${token.count} times; ${percent(token.share)} of its gate weight; ${number(token.lift, 1)} times as common here as in the text` },
      make("code", { text: token.text }), make("small", { text: ` ${number(token.lift, token.lift < 9.95 ? 1 : 0)}×` })));
  return [make("h4", { text: "Tokens, by lift" }), make("ul", { class: "tokens" }, ...chips)];
}

function contextsOf(card) {
  const lines = card.contexts.map((context) =>
    make("li", {}, make("small", { text: `${number(context.gate, 3)} ${domains[context.domain]} ` }),
      make("span", {}, context.before, make("mark", { text: context.token }), context.after)));
  return lines.length ? [make("h4", { text: "Where its gate is highest" }), make("ul", { class: "contexts" }, ...lines)] : [];
}

function domainsOf(card) {
  if (oneDomain) return [];
  const highest = Math.max(...card.domains.map((each) => each.lift), 1);
  const rows = card.domains.map((each, i) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${(100 * each.lift) / highest}%`;
    const track = make("span", { class: "track" }, bar);
    const base = make("span", { class: "base" });
    base.style.left = `${100 / highest}%`;
    track.append(base);
    return make("li", { title: `${percent(each.share)} of its tokens are ${domains[i]}; it takes ${percent(each.rate)} of that domain's tokens` },
      make("span", { class: "name", text: domains[i] }), track, make("span", { class: "value", text: `${number(each.lift, 2)}×` }));
  });
  return [make("h4", { text: "Domains, against their part of the text" }), make("ul", { class: "domains" }, ...rows)];
}

function stabilityOf(card) {
  if (!card.stability.length) return [];
  const text = card.stability.map((each, i) => `${number(each.overlap)} at ${i ? "" : "step "}${each.step.toLocaleString("en")}`).join(" · ");
  return [make("h4", { text: "Overlap with what it took before" }), make("p", { class: "small", text })];
}

function nearOf(card) {
  const kinds = [["router", "by router", ""], ["weights", "by weights", ""], ["coactivation", "taken together", "×"]];
  const parts = kinds.filter(([kind]) => card.near[kind].length).map(([kind, name, unit]) => {
    const links = card.near[kind].flatMap((each, i) => [
      i ? ", " : "", make("a", { href: `#L${card.layer}E${each.expert}`, text: `E${each.expert}` }), ` ${number(each.value)}${unit}`,
    ]);
    return make("li", {}, make("span", { text: `${name}: ` }), ...links);
  });
  return parts.length ? [make("h4", { text: "Nearest experts" }), make("ul", { class: "near" }, ...parts)] : [];
}

// ---- begin ----

root.append(form, legend, overview, status, list, button);
paint();
for (const control of [search, layer, domain, order]) control.addEventListener("input", () => { refresh(); remember(); });
colour.addEventListener("input", () => { paint(); remember(); });
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  event.preventDefault();
  search.focus();
});
window.addEventListener("hashchange", recall);
refresh();
recall();
if ("IntersectionObserver" in window) {
  new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && !button.hidden && more(), { rootMargin: "400px" }).observe(button);
}
