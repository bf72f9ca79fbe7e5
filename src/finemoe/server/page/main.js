// The page put together: models, the header, the panel, the dialogs, keys.

import { curl, expertCards, models, onKeyWanted, requests } from "./api.js";
import { Chat } from "./chat.js";
import { colouredByDomain, hasDomains, legend, setCards, swatch, wantDomains } from "./colours.js";
import { ask, button, byId, copy, dialog, el, fill } from "./dom.js";
import { Heatmap } from "./heatmap.js";
import { HELP, LANES } from "./help.js";
import { Inspector } from "./inspector.js";
import { redrawAll } from "./lanes.js";
import { openSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { onStorageTrouble, read, save, write } from "./store.js";
import { drawSwitchboard, moeLayers } from "./switchboard.js";

const WIDE = matchMedia("(min-width: 1100px)");
const view = { domains: true, theme: "system", model: "", ...read("finemoe.view", {}) };
let known = [];
const asked = new Set(); // models whose cards were asked for

/** On in a wide window, until somebody has chosen. */
const expertsShown = () => view.experts ?? WIDE.matches;
const current = () => known.find((model) => model.id === byId("model").value) ?? null;
const keepView = () => write("finemoe.view", view);

function notice(text, lasting = true) {
  const box = byId("notice");
  box.hidden = !text;
  fill(box, el("span.grow", {}, text), button("×", () => notice(""), { class: "plain", "aria-label": "Close the notice" }));
  if (text && !lasting) setTimeout(() => notice(""), 4000);
}

function showCurl(request) {
  const text = curl(request);
  const take = button("Copy", () => copy(text, take), { class: "strong" });
  dialog("The request as curl", el("div", {},
    el("pre.curl", { tabindex: "0", role: "group", "aria-label": "Command" }, el("code", {}, text)),
    el("div.row.end", {}, take)), { wide: true });
}

function showRequests() {
  const box = dialog("Requests of this page", el("div", {}, el("p.quiet", {}, "Everything that this page does is one of these; the newest first."),
    el("ul.requests", {}, requests().map((entry) => el("li", {}, el("code.grow", {}, `${entry.method} /${entry.path}`), el("span.quiet", {}, String(entry.status)),
      button("curl", () => showCurl(entry), { "aria-label": `curl of ${entry.method} ${entry.path}` }))))), { wide: true });
  return box;
}

// The key is asked for once, however many requests wait for it.
let asking = null;
onKeyWanted((refused) => (asking ??= ask("This server wants a key", { label: "API key", type: "password", ok: "Use it", text: `${refused ? "The server did not accept this key. " : ""}It stays in this tab and is gone when the tab is closed.` })
  .finally(() => { asking = null; })));
onStorageTrouble((text) => notice(text));

const inspector = new Inspector(byId("inspector"));
const heatmap = new Heatmap(byId("heatmap"), { tryOut: (kind, layer, expert) => {
  const last = chat.path().findLast((node) => node.request);
  if (last && !chat.answering) chat.tryOut(last, kind, layer, expert);
} });

const host = {
  model: current,
  expertView: expertsShown,
  notice,
  showCurl,
  cardsOf,
  /** In a small window the panel would cover what it has begun. */
  comparing() { if (!WIDE.matches) panel(false); },
  opened: () => inspector.clear(),
  showToken(trace, at, { pinned, tryOut, span }) {
    inspector.show(trace, at, { pinned, tryOut, layers: moeLayers(current()) });
    if (pinned && !WIDE.matches) {
      panel(true, false);
      span?.scrollIntoView({ block: "nearest" });
    }
  },
  busy(now) {
    byId("stop").hidden = !now;
    byId("send").hidden = now;
    byId("compare-open").disabled = now;
  },
  /** Something that the panel shows has changed. */
  changed() { queueMicrotask(drawPanel); },
  async refresh(id) {
    await loadModels();
    return current()?.id === id && current().finemoe?.chat !== undefined;
  },
  /** A model that was not loaded says more of itself once it is. */
  modelsUsed() { if (!current()?.finemoe?.loaded || !current().finemoe.layers) loadModels(); },
};

const chat = new Chat(host);
const sidebar = new Sidebar({ current: () => chat.conversation, trouble: notice, open(conversation) {
  if (conversation?.model && known.some((model) => model.id === conversation.model)) byId("model").value = conversation.model;
  chat.open(conversation);
  write("finemoe.last", conversation?.id ?? "");
  modelChosen(false);
  sidebar.draw();
  side(false);
  byId("draft").focus();
} });

function drawPanel() {
  drawSwitchboard(byId("switchboard"), { model: current(), experts: chat.conversation.experts, retry: () => chat.tryAll(), onChange(experts) {
    chat.conversation.experts = experts;
    if (chat.path().length) save(chat.conversation);
    drawPanel();
  } });
  if (expertsShown()) heatmap.show(chat.traces(), current());
  if (chat.path().length) { write("finemoe.last", chat.conversation.id); sidebar.draw(); }
  drawLegend();
  const usage = chat.path().findLast((node) => node.usage && node.model === current()?.id)?.usage;
  const context = current()?.finemoe?.context;
  byId("composer-hint").textContent = usage && context ? `${usage.prompt_tokens + usage.completion_tokens} of ${context} tokens` : "";
}

function drawLegend() {
  const box = byId("legend");
  box.hidden = !expertsShown() || !chat.traces().some((trace) => trace.layers.length);
  const more = button("?", () => dialog("What the lanes show", LANES()), { class: "plain", "aria-label": "What the lanes show" });
  const domains = hasDomains(current()?.id) ? [button(colouredByDomain() ? "Colour by expert" : "Colour by domain", () => {
    view.domains = !colouredByDomain();
    keepView();
    wantDomains(view.domains);
    redrawAll();
    drawLegend();
    byId("legend").querySelector("button.small")?.focus();
  }, { class: "small" }), colouredByDomain() ? legend().map(({ domain, colour }) => el("span.key", {}, swatch(colour), domain)) : ""] : "";
  fill(box, el("span", {}, "Under each word: one column for each layer of the model, in it the experts that made the word; taller means a larger say. A dot is a space."), more, domains);
}

async function cardsOf(model) {
  if (!model.finemoe?.cards || asked.has(model.id)) return;
  asked.add(model.id);
  try {
    setCards(model.id, (await expertCards(model.id)) ?? {});
  } catch (error) {
    asked.delete(model.id);
    notice(error.message);
  }
  redrawAll();
}

async function modelChosen(fresh = true) {
  const model = current();
  if (!model) return;
  view.model = model.id;
  keepView();
  if (fresh && chat.conversation.model !== model.id) {
    chat.conversation.model = model.id;
    // Switches set for one model mean nothing for another.
    chat.conversation.experts = {};
  }
  const chatting = model.finemoe?.chat !== false;
  byId("draft").placeholder = chatting ? "Write a message" : "Write the beginning of a text, or leave empty to go on";
  byId("draft-label").textContent = chatting ? "Message" : "Text to continue";
  byId("send").textContent = chatting ? "Send" : "Continue";
  if (!chat.answering && chat.shownAs !== chatting) chat.render();
  await cardsOf(model);
  drawPanel();
}

async function loadModels() {
  try {
    known = await models();
  } catch (error) {
    notice(error.message);
    return;
  }
  const select = byId("model");
  const wanted = select.value || chat.conversation.model || view.model;
  fill(select, ...known.map((model) => el("option", { value: model.id }, model.id)));
  if (known.some((model) => model.id === wanted)) select.value = wanted;
  byId("compare-open").hidden = known.length < 2;
  if (!known.length) notice("The server has no models.");
  await modelChosen(false);
}

function side(open) {
  byId("app").classList.toggle("side-open", open);
  byId("side-toggle").setAttribute("aria-expanded", String(open));
  if (open) byId("new").focus();
}

function panel(open, focus = true) {
  byId("app").classList.toggle("panel-open", open);
  byId("panel-toggle").setAttribute("aria-expanded", String(open));
  if (open && focus) byId("panel-close").focus();
}

function expertView(on) {
  byId("view-toggle").setAttribute("aria-checked", String(on));
  byId("app").classList.toggle("experts", on);
  if (!on) panel(false);
}

function theme(next) {
  view.theme = next;
  keepView();
  if (next === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = next;
  byId("theme").textContent = `Theme: ${next}`;
  drawPanel();
}

const draft = byId("draft");
function fit() {
  draft.style.height = "auto";
  draft.style.height = `${Math.min(draft.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function send(otherModel = null) {
  const text = draft.value;
  const chatting = current()?.finemoe?.chat !== false;
  if (!current()) { notice("There is no model to ask yet."); return; }
  if (chat.answering || (!text.trim() && (chatting || !chat.path().length))) { draft.focus(); return; }
  draft.value = "";
  fit();
  chat.send(text, otherModel).catch((error) => notice(error.message));
}

function chooseOther() {
  const others = known.filter((model) => model !== current());
  const select = el("select", { "aria-label": "Second model" }, others.map((model) => el("option", { value: model.id }, model.id)));
  const box = dialog("The same prompt to two models", el("form", { onsubmit: (event) => {
    event.preventDefault();
    box.close();
    send(others.find((model) => model.id === select.value));
  } }, el("p", {}, `What you have written goes to ${current()?.id} and, with the same seed, to the model chosen here. What differs is marked.`),
  el("label.field", {}, "Second model", select),
  draft.value.trim() ? "" : el("p.problem", {}, "Write a message first."),
  el("div.row.end", {}, el("button.strong", { type: "submit", disabled: !draft.value.trim() }, "Send to both"))));
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
draft.addEventListener("input", fit);
draft.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  if (event.key === "ArrowUp" && !draft.value) {
    const last = chat.path().findLast((node) => node.role === "user");
    if (last) { event.preventDefault(); chat.messages.get(last.id).edit(); }
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (chat.answering) { stop(); return; }
  if (byId("app").classList.contains("panel-open")) { panel(false); byId("panel-toggle").focus(); }
  if (byId("app").classList.contains("side-open")) { side(false); byId("side-toggle").focus(); }
});
function stop() {
  chat.stop();
  draft.focus();
}
byId("stop").addEventListener("click", stop);
byId("model").addEventListener("change", () => modelChosen());
byId("settings-open").addEventListener("click", () => openSettings({ model: current(), trouble: notice, system: chat.conversation.system, onSystem(text) {
  chat.conversation.system = text;
  if (chat.path().length) save(chat.conversation);
} }));
byId("compare-open").addEventListener("click", chooseOther);
byId("curl-open").addEventListener("click", () => { if (current()) showCurl(chat.draftRequest(draft.value)); });
byId("requests").addEventListener("click", showRequests);
byId("help").addEventListener("click", () => dialog("Help", HELP(), { wide: true }));
byId("theme").addEventListener("click", () => theme({ system: "light", light: "dark", dark: "system" }[view.theme] ?? "system"));
byId("side-toggle").addEventListener("click", () => side(!byId("app").classList.contains("side-open")));
byId("panel-toggle").addEventListener("click", () => panel(!byId("app").classList.contains("panel-open")));
byId("panel-close").addEventListener("click", () => { panel(false); byId("panel-toggle").focus(); });
document.querySelector("main").addEventListener("click", () => side(false));
byId("view-toggle").addEventListener("click", () => {
  view.experts = !expertsShown();
  keepView();
  expertView(view.experts);
  if (!chat.answering) chat.render();
});

wantDomains(view.domains);
expertView(expertsShown());
theme(view.theme);
const last = read(`finemoe.conversation.${read("finemoe.last", "")}`, null);
if (last?.nodes) chat.open(last);
sidebar.draw();
loadModels();
