// One message on the page.

import { button, copy, el, fill } from "./dom.js";
import { TokenView } from "./lanes.js";
import { update } from "./markdown.js";
import { versions } from "./tree.js";

const ENDS = { length: "stopped at the length limit", stopped: "stopped by you", left: "stopped when you left", tool_calls: "asks for a tool", error: "broke off" };
const CUT = { cut: "the page was closed before the answer was whole.", writing: "unless another tab is still writing it." };

export class Message {
  /** `does` holds the actions: edit, retry, choose, curl, remove, token; `trace` the tokens of the answer, or null. */
  constructor(node, { conversation, model, trace, experts, chat, does }) {
    Object.assign(this, { node, trace, does, chat, experts });
    this.asTokens = experts && node.role === "assistant" && (trace?.layers.length ?? 0) > 0;
    this.head = el("div.message-head");
    this.reasoning = el("div.markdown");
    this.thinking = el("details.reasoning", { hidden: true }, el("summary", {}, "Reasoning"), this.reasoning);
    this.body = el("div.message-body");
    this.foot = el("div.message-foot");
    this.beside = el("div.beside");
    const who = node.role === "user" ? (chat ? "You" : "Text") : node.model || model || "Answer";
    this.element = el(`article.message.${node.role}`, { "aria-label": `${who} ${node.role === "user" ? "wrote" : "answered"}` },
      this.head, this.thinking, this.body, this.beside, this.foot);
    this.who = who;
    this.fill(conversation);
    this.show();
  }

  fill(conversation) {
    const { node, does } = this;
    const { all, at } = versions(conversation, node);
    fill(this.head, el("h2.who", {}, this.who), all.length > 1 ? el("span.versions", { role: "group", "aria-label": "Versions" },
      button("<", () => does.choose(all[at - 1]), { disabled: at === 0, "aria-label": "Earlier version", class: "plain" }),
      el("span", {}, el("span.sr", {}, "version "), `${at + 1}/${all.length}`),
      button(">", () => does.choose(all[at + 1]), { disabled: at === all.length - 1, "aria-label": "Later version", class: "plain" })) : "");
    if (this.busy) {
      this.foot.replaceChildren();
      return;
    }
    const copied = button("Copy", () => copy(node.content, copied));
    fill(this.foot, copied,
      node.role === "user" ? button("Edit", () => this.edit()) : button("Retry", () => does.retry(node)),
      CUT[node.finish] && !this.chat ? button("Continue", () => does.goOn(node)) : "",
      this.trace?.tokens.length ? button(this.asTokens ? "Show as text" : this.trace.layers.length ? "Show experts" : "Show tokens", () => {
        this.asTokens = !this.asTokens;
        this.fill(conversation);
        this.show();
      }) : "",
      node.request ? button("curl", () => does.curl(node)) : "",
      button("Delete", () => does.remove(node)),
      el("span.facts", {}, this.facts()));
    if (this.experts && node.content && node.role === "assistant" && !this.trace) this.foot.append(el("span.facts", {}, "made without the expert view: Retry shows its experts"));
    if (CUT[node.finish]) this.foot.prepend(el("p.problem", {}, el("strong", {}, "Cut off: "), CUT[node.finish]));
    if (node.error) this.foot.prepend(el("p.problem", {}, el("strong", {}, "Broke off: "), node.error));
  }

  facts() {
    const { node } = this;
    const facts = [];
    if (ENDS[node.finish]) facts.push(ENDS[node.finish]);
    if (node.usage?.completion_tokens) facts.push(`${node.usage.completion_tokens} tokens`);
    if (node.usage?.seconds > 0 && node.usage?.completion_tokens) facts.push(`${(node.usage.completion_tokens / node.usage.seconds).toFixed(1)} a second`);
    if (node.usage?.tokens_per_pass > 1) facts.push(`${node.usage.tokens_per_pass.toFixed(1)} a pass`);
    if (Number.isInteger(node.request?.body?.seed)) facts.push(`seed ${node.request.body.seed}`);
    return facts.join(" · ");
  }

  /** Draws the message anew, as text or as tokens. */
  show() {
    this.view?.destroy();
    this.view = null;
    this.body.replaceChildren();
    if (this.asTokens) {
      this.view = new TokenView(this.trace, { label: "The answer, token by token", onToken: (at, pinned) => this.does.token(this, this.trace, at, pinned, this.view) });
      this.body.append(this.view.element);
    } else {
      this.text = el("div.markdown");
      this.body.append(this.text);
    }
    this.change();
  }

  /** The text or the tokens have grown. */
  change() {
    const { node } = this;
    this.thinking.hidden = !node.reasoning;
    if (node.reasoning) update(this.reasoning, node.reasoning);
    if (this.view) this.view.update();
    else if (node.role === "user" || !this.chat) {
      this.text.className = "plain-text";
      this.text.textContent = node.content;
    } else update(this.text, node.content);
    for (const call of node.calls ?? []) if (!this.busy) this.body.append(el("pre", {}, el("code", {}, `${call.name}(${call.arguments})`)));
    this.element.classList.toggle("empty", !node.content);
  }

  streaming(busy, conversation) {
    this.busy = busy;
    this.element.classList.toggle("busy", busy);
    this.element.setAttribute("aria-busy", String(busy));
    this.fill(conversation);
  }

  edit() {
    const field = el("textarea", { "aria-label": "Edit the message", rows: Math.min(12, this.node.content.split("\n").length + 1), value: this.node.content });
    const leave = () => { this.show(); this.foot.hidden = false; this.foot.querySelectorAll("button")[1]?.focus(); };
    const form = el("form.edit", {
      onsubmit: (event) => { event.preventDefault(); this.does.edit(this.node, field.value); },
      onkeydown: (event) => {
        if (event.key === "Escape") { event.stopPropagation(); leave(); }
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
      },
    }, field, el("div.row.end", {}, button("Cancel", leave), el("button.strong", { type: "submit" }, "Send as a new version")));
    fill(this.body, form);
    this.foot.hidden = true;
    field.focus();
  }

  destroy() { this.view?.destroy(); }
}
