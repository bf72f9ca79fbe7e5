// How answers are drawn and shown. An empty field shows what holds without it.

import { defaults } from "./answering.js";
import { dialog, el } from "./dom.js";
import { read, write } from "./store.js";

const NAME = "finemoe.settings";

const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest token; higher is more daring", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top-p", "draw only from the likeliest tokens that together have this probability", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top-k", "draw only from this many likeliest tokens", { min: 1, step: 1 }],
  ["min_p", "Min-p", "leave out what is less likely than this share of the likeliest", { min: 0, max: 1, step: 0.01 }],
  ["max_tokens", "Longest answer", "in tokens", { min: 1, step: 1 }],
  ["min_new_tokens", "Shortest answer", "in tokens", { min: 0, step: 1 }],
  ["repetition_penalty", "Repetition penalty", "above 1 makes tokens that were there already less likely", { min: 0.1, max: 5, step: 0.05 }],
  ["presence_penalty", "Presence penalty", "for tokens that were in the answer", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", "for each time that a token was in the answer", { min: -2, max: 2, step: 0.1 }],
  ["seed", "Seed", "the same seed and request give the same answer; empty draws one each time", { min: 0, step: 1 }],
  ["alternatives", "Alternatives shown", "other tokens that could have stood there, 0 to 20", { min: 0, max: 20, step: 1 }],
];

export const settings = read(NAME, {});

export function keep(changes) {
  Object.assign(settings, changes);
  for (const [name, value] of Object.entries(settings)) if (value === undefined || value === "") delete settings[name];
  write(NAME, settings);
}

/** The dialog; the system message belongs to the conversation. */
export function openSettings({ model, system, onSystem, trouble }) {
  const usual = { ...defaults(model?.finemoe?.chat !== false), top_k: "all", seed: "drawn each time" };
  const guesses = model?.finemoe?.guesses ?? [];
  const bad = new Map(); // fields that hold what cannot be, and what to say of them
  const field = ([name, label, help, limits]) => el("label.field", {}, el("span", {}, label),
    el("input", { type: "number", name, inputmode: "decimal", placeholder: String(usual[name]),
      value: settings[name] ?? "", "aria-describedby": `wrong-${name} help-${name}`, ...limits,
      step: "any", onchange: (event) => change(name, event.target) }), el("small.problem", { id: `wrong-${name}` }), el("small.quiet", { id: `help-${name}` }, help));
  const change = (name, input) => {
    const number = input.value === "" ? undefined : Number(input.value);
    const [, label, , limit] = FIELDS.find((each) => each[0] === name);
    const whole = limit.step === 1;
    const wrong = input.validity.badInput || number !== undefined && (!Number.isFinite(number)
      || number < (limit.min ?? -Infinity) || number > (limit.max ?? Infinity) || (whole && !Number.isInteger(number)));
    const sentence = wrong ? `${whole ? "A whole number" : "A number"} from ${limit.min}${limit.max === undefined ? "" : ` to ${limit.max}`}, or empty.` : "";
    input.toggleAttribute("aria-invalid", wrong);
    if (wrong) input.setAttribute("aria-invalid", "true");
    form.querySelector(`#wrong-${name}`).textContent = sentence;
    bad.delete(input);
    if (wrong) bad.set(input, `${label} was not changed to ${input.value || "that"}. ${sentence}`);
    else keep({ [name]: number });
  };
  const stops = el("textarea", { name: "stop", rows: 2, "aria-describedby": "help-stop", value: (settings.stop ?? []).join("\n"),
    onchange: () => keep({ stop: stops.value.split("\n").filter(Boolean).slice(0, 4) }) });
  const systemField = el("textarea", { name: "system", rows: 3, value: system,
    placeholder: "You are a helpful assistant.", onchange: () => onSystem(systemField.value) });
  const guess = el("select", { name: "guess", onchange: () => keep({ guess: guess.value }) },
    el("option", { value: "" }, "off"),
    guesses.map((each) => el("option", { value: each, selected: settings.guess === each }, each === "text" ? "from the text" : "by the prediction module")));
  const check = (name, label) => el("label.check", {}, el("input", { type: "checkbox", name, checked: Boolean(settings[name]),
    onchange: (event) => keep({ [name]: event.target.checked || undefined }) }), label);
  const form = el("form.settings", { onsubmit: (event) => event.preventDefault() },
    model?.finemoe?.chat === false ? el("p.quiet", {}, "This model has no chat template: it continues text, and takes no system message.")
      : el("label.field.full", {}, el("span", {}, "System message (of this conversation)"), systemField),
    FIELDS.map(field),
    el("label.field", {}, el("span", {}, "Stop at"), stops, el("small.quiet", { id: "help-stop" }, "one text a line, four at most")),
    guesses.length ? el("label.field", {}, el("span", {}, "Guess ahead"), guess, el("small.quiet", {}, "may be faster; changes nothing in what is likely")) : "",
    el("div.field", {}, check("ignore_end", "Go on after the end of the answer"), check("quiet", "Screen reader: only say when an answer is finished")));
  // A change is told when a field loses focus; closing with Escape must not lose the last one.
  const box = dialog("Settings", form, { wide: true });
  box.addEventListener("cancel", (event) => {
    document.activeElement?.blur();
    const [wrong] = bad.keys();
    if (wrong) { event.preventDefault(); wrong.focus(); }
  });
  box.addEventListener("close", () => { if (bad.size) trouble([...bad.values()].join(" ")); });
}
