// The conversation that is shown, and what can be done with it.

import { answer, kept, requestFor, seedFor, whole } from "./answering.js";
import { Beside } from "./beside.js";
import { button, byId, el, fill, onceAFrame, say } from "./dom.js";
import { Message } from "./messages.js";
import { settings } from "./settings.js";
import { Speaker } from "./speaking.js";
import { forgetTrace, load, onOtherTab, save, saveTrace, traceOf } from "./store.js";
import { changed, inWords } from "./switchboard.js";
import { mend } from "./trace.js";
import { ROOT, add, choose, merge, newConversation, path, remove, until } from "./tree.js";

export class Chat {
  /** `host`: model(), expertView(), showToken(...), showCurl(request), changed(), notice(text), opened(), comparing(),
   *  cardsOf(model), refresh(id): whether it is known now, modelsUsed(). */
  constructor(host) {
    this.host = host;
    this.log = byId("log");
    this.scroller = byId("scroll");
    this.messages = new Map();
    this.open(null);
    addEventListener("pagehide", () => this.leave());
    onOtherTab((other) => this.takeIn(other));
  }

  /** The page is closed or loaded again: what has come of an answer stays. */
  leave() {
    if (!this.answering) return;
    if (this.live?.tokens.length) { mend(this.live); saveTrace(this.answering, this.live); }
    this.stop("cut");
  }

  /** Another tab has gone on. What is done here is not disturbed: `save` takes it in later. */
  takeIn(other) {
    if (other?.id !== this.conversation.id || this.answering || this.beside || this.log.querySelector("form.edit")) return;
    const stay = this.atEnd();
    const seen = () => JSON.stringify([this.path(), this.messages.size]);
    const before = seen();
    merge(this.conversation, other);
    for (const name of ["title", "system", "experts"]) this.conversation[name] = other[name];
    if (seen() === before) this.host.changed();
    else this.render();
    if (stay) this.toEnd();
  }

  get chatting() { return this.host.model()?.finemoe?.chat !== false; }

  open(conversation) {
    this.stop("left");
    this.conversation = conversation ?? newConversation(this.host.model()?.id);
    this.host.opened();
    this.render();
    this.toEnd();
  }

  path() { return path(this.conversation); }

  traces() { return this.path().map((node) => (node.id === this.answering?.id ? this.live : traceOf(node))).filter(Boolean); }

  render() {
    this.closeBeside();
    for (const message of this.messages.values()) message.destroy();
    this.messages.clear();
    const nodes = this.path();
    this.shownAs = this.chatting;
    fill(this.log, ...nodes.map((node) => this.message(node).element));
    if (!nodes.length) this.log.append(this.welcome());
    this.host.changed();
  }

  welcome() {
    return el("div.welcome", {}, el("h2", {}, this.chatting ? "Ask something" : "Write a beginning"),
      el("p", {}, this.chatting
        ? "With the expert view on, each word of the answer shows which small parts of the model, its experts, made it. "
          + "Click one to switch it off and see what changes."
        : "This model has not learnt to answer; it continues the text that you begin. "
          + "With the expert view on, each word shows which small parts of the model, its experts, made it."));
  }

  message(node, trace = traceOf(node)) {
    const message = new Message(node, { conversation: this.conversation, model: this.conversation.model, trace, experts: this.host.expertView(), chat: this.chatting, does: {
      edit: (old, text) => this.edit(old, text),
      retry: (old) => this.retry(old),
      goOn: (old) => { this.stop(); this.answerTo(old.id); },
      choose: (other) => { this.stop(); choose(this.conversation, other); save(this.conversation); this.render(); this.focusOn(other); },
      remove: (old) => this.remove(old),
      curl: (old) => this.host.showCurl(this.requestOf(old)),
      token: (from, shown, at, pinned, view) => this.token(from.node, shown, at, pinned, view),
    } });
    this.messages.set(node.id, message);
    return message;
  }

  focusOn(node) {
    const article = this.messages.get(node.id)?.element;
    (article?.querySelector(".versions button:not([disabled])") ?? article?.querySelector("button"))?.focus({ preventScroll: true });
    article?.scrollIntoView({ block: "nearest" });
  }

  token(node, trace, at, pinned, view) {
    // What is held stays until something else is clicked.
    if (this.held?.view.gone) this.held = null;
    if (!pinned && this.held) return;
    if (pinned && this.held && this.held.view === view && this.held.at === at) {
      this.release();
      this.host.showToken(trace, at, { pinned: false });
      return;
    }
    if (pinned) {
      this.release();
      this.held = { view, at };
      view.select(at);
    }
    const again = node.request && !this.answering ? (kind, layer, expert) => this.tryOut(node, kind, layer, expert) : null;
    this.host.showToken(trace, at, { pinned, tryOut: again, span: view.spans[at] });
  }

  release() {
    this.held?.view?.select(-1);
    this.held = null;
  }

  requestAfter(parent, { model = this.host.model(), experts = this.conversation.experts, seed = seedFor(settings) } = {}) {
    return requestFor({ model, messages: until(this.conversation, parent), system: this.conversation.system, settings, experts, seed,
      routing: this.host.expertView() });
  }

  /** The request that an answer came from. */
  requestOf(node) { return whole(node.request, until(this.conversation, node.parent), node.system); }

  /** What the button would send now, for `curl`. */
  draftRequest(text) {
    const messages = [...this.path(), ...(text ? [{ role: "user", content: text }] : [])];
    return requestFor({ model: this.host.model(), messages, system: this.conversation.system, settings, experts: this.conversation.experts,
      seed: seedFor(settings), routing: this.host.expertView() });
  }

  async send(text, otherModel = null) {
    if (this.answering) return;
    let parent = this.path().at(-1)?.id ?? ROOT;
    if (text) parent = add(this.conversation, parent, { role: "user", content: text }).id;
    await this.answerTo(parent, otherModel);
  }

  edit(node, text) {
    if (!text.trim()) return;
    this.stop();
    const fresh = add(this.conversation, node.parent, { role: node.role, content: text });
    this.answerTo(fresh.id);
  }

  retry(node) {
    this.stop();
    this.answerTo(node.parent);
  }

  remove(node) {
    this.stop();
    for (const gone of remove(this.conversation, node)) forgetTrace(gone);
    save(this.conversation);
    this.render();
    byId("draft").focus();
  }

  async answerTo(parent, otherModel = null) {
    const model = this.host.model();
    if (!model) return;
    this.stop();
    const conversation = this.conversation;
    let request = this.requestAfter(parent);
    const { system } = this.conversation;
    const node = add(this.conversation, parent, { role: "assistant", model: model.id, finish: "writing", request: kept(request), ...(system ? { system } : {}) });
    this.conversation.model = model.id;
    this.answering = node;
    save(this.conversation);
    this.render();
    const controller = (this.controller = new AbortController());
    this.host.busy(true);
    const speaker = new Speaker();
    const message = this.messages.get(node.id);
    message.streaming(true, this.conversation);
    this.toEnd();
    const grow = onceAFrame(() => {
      if (this.answering !== node) return;
      const stay = this.atEnd();
      if (this.live?.tokens.length && !message.trace) {
        message.trace = this.live;
        if (this.live.layers.length && this.host.expertView()) { message.asTokens = true; message.show(); }
      }
      message.change();
      if (stay) this.toEnd();
    });
    let finished;
    if (otherModel) this.besideModels(node, otherModel, new Promise((resolve) => { finished = resolve; }));
    this.live = null;
    let saved = Date.now();
    const take = (now) => {
      Object.assign(node, { content: now.content, finish: controller.why ?? (now.finish || "writing"), written: Date.now() });
      if (now.reasoning) node.reasoning = now.reasoning;
      if (now.calls.length) node.calls = now.calls;
      this.live = now.trace;
      if (Date.now() - saved < 1000) return;
      saved = Date.now();
      if (load(conversation.id)) save(conversation);
    };
    const ask = () => answer(request, { signal: controller.signal, onWait: (seconds) => this.host.notice(`The server is full; asking again in ${seconds} s.`, false),
      onChange: (now) => { take(now); speaker.heard(now.content); grow(); } });
    let result = await ask();
    // Whether a model that was not loaded can chat is known only now.
    if (result.error && !result.content && model.finemoe?.chat === undefined && await this.host.refresh(model.id)) {
      const { path: asked, body } = request;
      request = this.requestAfter(parent, { seed: body.seed });
      node.request = kept(request);
      if (request.path !== asked) result = await ask();
    }
    take(result);
    node.finish = controller.why ?? result.finish;
    node.request = kept(request);
    node.usage = result.usage;
    if (result.error) node.error = result.error;
    if (result.trace.tokens.length) saveTrace(node, result.trace);
    if (this.answering === node) {
      this.answering = null;
      this.host.busy(false);
    }
    speaker.done(node.content, node.error, node.finish === "stopped");
    finished?.();
    this.settle(node, message, conversation);
  }

  /** Keeps an answer that has ended; one of which nothing came only with its error. */
  settle(node, message, conversation) {
    if (conversation !== this.conversation) {
      // What came of the answer belongs to its own conversation, unless that was deleted.
      if (load(conversation.id)) save(conversation);
      return;
    }
    if (!conversation.nodes[node.id]) return;
    if (!node.content && !node.reasoning && !node.error && node.finish === "stopped") {
      remove(conversation, node);
      save(conversation);
      this.render();
      return;
    }
    save(conversation);
    const stay = this.atEnd();
    // An answer may be whole before its first token was drawn.
    if (!message.trace) message.asTokens = this.host.expertView() && (traceOf(node)?.layers.length ?? 0) > 0;
    message.trace = traceOf(node);
    message.streaming(false, conversation);
    // The tokens that are drawn stay, and with them what is held or has the focus.
    if (message.view?.trace === message.trace && !message.trace.mended) message.change();
    else message.show();
    if (stay) this.toEnd();
    this.host.changed();
    this.host.modelsUsed();
  }

  stop(why = "stopped") {
    if (!this.answering) return;
    const node = this.answering;
    this.answering = null;
    this.controller.why = node.finish = why;
    this.controller.abort();
    this.host.busy(false);
    if (load(this.conversation.id)) save(this.conversation); // it may just have been deleted
  }

  /** An expert off or forced: the same request, the same seed, one thing changed. */
  tryOut(node, kind, layer, expert) {
    const before = node.request.body.finemoe?.experts ?? {};
    const experts = changed(structuredClone(before), kind, layer, expert);
    this.besideWith(node, experts, `${kind === "disabled" ? "Without" : "Always with"} expert ${expert} of layer ${layer}`, [layer, expert]);
  }

  /** The last answer again with the switches as they stand. */
  tryAll() {
    const node = this.path().findLast((each) => each.role === "assistant" && each.request);
    if (!node) { say("There is no answer yet."); return; }
    const title = inWords(this.conversation.experts) || "As trained";
    this.besideWith(node, this.conversation.experts, title[0].toUpperCase() + title.slice(1));
  }

  besideWith(node, experts, title, expert) {
    const request = structuredClone(this.requestOf(node));
    const { body } = request;
    body.finemoe = { ...body.finemoe, routing: true, experts };
    for (const name of ["disabled", "forced"]) if (!Object.keys(experts[name] ?? {}).length) delete experts[name];
    if (!Object.keys(experts).length) delete body.finemoe.experts;
    this.showBeside(node, request, title, experts, undefined, expert);
  }

  besideModels(node, other, ready) {
    const request = this.requestAfter(node.parent, { model: other, experts: {}, seed: node.request.body.seed });
    this.host.cardsOf(other);
    this.showBeside(node, request, `Two models: ${node.model} and ${other.id}`, null, ready);
  }

  showBeside(node, request, title, experts, ready, expert) {
    this.closeBeside();
    const message = this.messages.get(node.id);
    if (!message) return;
    const trace = () => (node === this.answering ? this.live : traceOf(node));
    const original = { title: experts ? "Original" : node.model, get content() { return node.content; }, get trace() { return trace(); } };
    const box = new Beside({ original, request, title, name: experts ? title : request.body.model, expert, two: !experts, curl: (each) => this.host.showCurl(each),
      onClose: () => { message.element.classList.remove("comparing"); this.beside = null; message.element.querySelector("button")?.focus(); },
      onToken: (shown, at, pinned, view) => this.token(node, shown, at, pinned, view),
      actions: (result) => [
        result.content ? button("Keep as a version", () => this.keep(node, request, result)) : "",
        experts && !result.error ? button("Keep for the next answers", () => { this.conversation.experts = experts; save(this.conversation); this.host.changed(); box.told.textContent = `Kept: the next answers are made ${inWords(experts) || "as trained"}.`; }) : "",
      ] });
    this.beside = { box, message };
    // While both models write, the answer itself stays in sight.
    fill(message.beside, box.element);
    Promise.resolve(ready).then(() => { if (this.beside?.box === box) message.element.classList.add("comparing"); });
    box.run(ready);
    this.host.comparing();
    box.element.scrollIntoView({ block: "start" });
  }

  keep(node, request, result) {
    const fresh = add(this.conversation, node.parent, { role: "assistant", model: request.body.model, request: kept(request), content: result.content,
      finish: result.finish, usage: result.usage, ...(node.system ? { system: node.system } : {}),
      ...(result.reasoning ? { reasoning: result.reasoning } : {}), ...(result.error ? { error: result.error } : {}) });
    if (result.trace.tokens.length) saveTrace(fresh, result.trace);
    save(this.conversation);
    this.render();
    this.focusOn(fresh);
  }

  closeBeside() {
    this.release();
    this.beside?.box.destroy();
    this.beside?.message.element.classList.remove("comparing");
    this.beside = null;
  }

  atEnd() { return this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 60; }

  toEnd() { this.scroller.scrollTop = this.scroller.scrollHeight; }
}
