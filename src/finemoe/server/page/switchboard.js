// What holds for the experts in the next answers.

import { button, el, fill } from "./dom.js";

export const moeLayers = (model) => (model?.finemoe?.layers ?? []).filter((layer) => layer.kind === "moe");

/** A copy in which one expert is disabled, forced, or (kind null) neither. */
export function changed(experts, kind, layer, expert) {
  const out = { ...experts };
  for (const name of ["disabled", "forced"]) {
    const ids = (experts?.[name]?.[layer] ?? []).filter((id) => id !== expert);
    if (name === kind) ids.push(expert);
    out[name] = { ...experts?.[name], [layer]: ids };
    if (!ids.length) delete out[name][layer];
  }
  return out;
}

/** In words: "without expert 17 of layer 2, 4 experts a token". */
export function inWords(experts) {
  const parts = [];
  const each = (name, word) => {
    for (const [layer, ids] of Object.entries(experts?.[name] ?? {})) for (const id of ids) parts.push(`${word} expert ${id} of layer ${layer}`);
  };
  each("disabled", "without");
  each("forced", "always with");
  if (Number.isInteger(experts?.active)) parts.push(`${experts.active} active ${experts.active === 1 ? "expert" : "experts"}`);
  if (experts?.shared === false) parts.push("without the shared expert");
  return parts.join(", ");
}

export function drawSwitchboard(box, { model, experts, onChange, retry }) {
  const layers = moeLayers(model);
  const focused = document.activeElement?.id;
  const title = el("h3", {}, "For the next answers");
  if (!layers.length) {
    fill(box, title, el("p.quiet", {},
      model?.finemoe?.layers ? "This model has no experts: every token goes through all of it." : "Known after the first answer, when the model is loaded."));
    return;
  }
  const usual = Math.max(...layers.map((layer) => layer.active ?? 1));
  const most = Math.min(Math.min(...layers.map((layer) => layer.experts ?? usual)), Math.max(usual * 3, 8));
  const active = experts.active ?? usual;
  const shown = el("output", { for: "active" }, `${active}${experts.active === undefined ? " (as trained)" : ""}`);
  const slider = el("input", { type: "range", id: "active", min: 1, max: most, value: String(active), "aria-describedby": "active-help",
    oninput: () => { shown.textContent = `${slider.value}${Number(slider.value) === usual ? " (as trained)" : ""}`; },
    onchange: () => {
      const { active: _, ...rest } = experts;
      onChange(Number(slider.value) === usual ? rest : { ...rest, active: Number(slider.value) });
    } });
  const shared = layers.some((layer) => layer.shared)
    ? el("button.switch", { type: "button", id: "no-shared", role: "switch", "aria-checked": String(experts.shared === false),
      onclick: () => { const { shared: was, ...rest } = experts; onChange(was === false ? rest : { ...rest, shared: false }); } }, "Without the shared expert") : "";
  const chips = ["disabled", "forced"].flatMap((kind) => Object.entries(experts[kind] ?? {}).flatMap(([layer, ids]) => ids.map((id) =>
    el("li", {}, `${kind === "disabled" ? "off" : "forced"}: expert ${id} of layer ${layer} `,
      button("×", () => onChange(changed(experts, null, layer, id)), { class: "plain", "aria-label": `No longer: ${kind} expert ${id} of layer ${layer}` })))));
  const any = inWords(experts);
  fill(box, title,
    el("label.field", { for: "active" }, el("span", {}, "Experts a token uses: ", shown), slider),
    el("p.quiet", { id: "active-help" }, "Fewer is faster and blurs; the model was trained with ", String(usual), "."),
    shared, chips.length ? el("ul.constraints", {}, chips) : "",
    any ? el("div.row", {}, button("Answer again with this", retry), button("As trained", () => onChange({}))) : "");
  if (focused) document.getElementById(focused)?.focus();
}
