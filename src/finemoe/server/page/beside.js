// Two answers beside each other, with what differs marked token by token.

import { answer } from "./answering.js";
import { button, el, fill, onceAFrame, say } from "./dom.js";
import { TokenView } from "./lanes.js";
import { differences, wordsAsTrace } from "./trace.js";

/** The tokens of an answer, or its words. */
const seen = (content, trace) => (trace?.tokens.length ? trace : wordsAsTrace(content));

/** The largest change of a probability among the first `count` tokens. */
function changeOf(left, right, count) {
  let most = -1;
  for (let at = 0; at < count; at += 1) {
    const [before, after] = [left.tokens[at].p, right.tokens[at].p];
    if (Number.isFinite(before) && Number.isFinite(after)) most = Math.max(most, Math.abs(Math.exp(before) - Math.exp(after)));
  }
  return most < 0 ? "" : `The largest change of a probability ${count < left.tokens.length ? "before that " : ""}is ${most < 0.001 ? "below 0.001" : Number(most.toPrecision(2))}.`;
}

export class Beside {
  /**
   * `original`: {title, content, trace}, may still be growing; `request`: of the other; `title`: what is different;
   * `name`: of the other column;
   * `expert`: [layer, expert] if only that differs; `two`: two models write at once;
   * `actions(result)`: buttons for the finished answer; `onToken(trace, at, pinned, view)`.
   */
  constructor({ original, request, title, name = title, expert, two, actions, onToken, onClose, curl }) {
    Object.assign(this, { original, request, name, expert, two, actions, onToken, curl });
    this.controller = new AbortController();
    this.summary = el("p.summary", { role: "status" });
    this.buttons = el("div.row");
    this.told = el("p.quiet", { role: "status" });
    this.left = el("div.column");
    this.right = el("div.column");
    this.views = [];
    this.element = el("section.compare", { "aria-label": `Compared: ${title}` },
      el("div.row", {}, el("h3.grow", {}, title), button("×", () => { this.destroy(); onClose(); }, { class: "plain", "aria-label": "Close the comparison" })),
      this.summary, el("div.columns", {}, this.left, this.right), this.buttons, this.told);
  }

  draw(column, name, content, trace, index) {
    const given = seen(content, trace);
    this.views[index]?.destroy();
    this.views[index] = new TokenView(given, { label: name, onToken: (at, pinned) => { if (given.layers.length) this.onToken(given, at, pinned, this.views[index]); } });
    fill(column, el("h4", {}, name), this.views[index].element);
    return this.views[index];
  }

  /** Runs the request; ends when it has its answer. `ready` resolves when the original is finished. */
  async run(ready = Promise.resolve()) {
    const started = button("Stop", () => this.controller.abort());
    const writing = (names) => { this.summary.textContent = `${names} writing...`; };
    if (this.two) writing(`${this.original.title} and ${this.name} are`);
    else this.summary.textContent = "Answering again...";
    let done = false;
    if (this.two) ready.then(() => { if (!done) writing(`${this.original.title} has finished; ${this.name} is`); });
    fill(this.buttons, started);
    this.draw(this.left, this.original.title, this.original.content, this.original.trace, 0);
    let drawn = null;
    const grow = onceAFrame(() => {
      if (this.gone || this.finished) return;
      if (!drawn && this.result.trace.tokens.length) drawn = this.draw(this.right, this.name, "", this.result.trace, 1);
      drawn?.update();
      if (!drawn && this.result.content) fill(this.right, el("h4", {}, this.name), el("p.plain-text", {}, this.result.content));
    });
    fill(this.right, el("h4", {}, this.name), el("p.quiet", {}, "..."));
    const result = await answer(this.request, { signal: this.controller.signal, onChange: (now) => { this.result = now; grow(); },
      onWait: (seconds) => { this.summary.textContent = `The server is full; asking again in ${seconds} s.`; } });
    done = true;
    if (this.two) writing(`${this.name} has finished; ${this.original.title} is`);
    await ready;
    if (!this.gone) this.finish(result);
    return result;
  }

  finish(result) {
    this.finished = true;
    const left = this.draw(this.left, this.original.title, this.original.content, this.original.trace, 0);
    const right = this.draw(this.right, this.name, result.content, result.trace, 1);
    const texts = [left, right].map((view) => view.trace.tokens.map((token) => token.t));
    const { marks, start } = differences(...texts);
    left.mark(marks[0], "differs");
    right.mark(marks[1], "differs");
    const differing = marks[1].filter(Boolean).length;
    const gone = marks[0].filter(Boolean).length;
    this.summary.textContent = result.error ? `${this.name} broke off: ${result.error}`
      : [!differing && !gone ? "No token differs."
        : start ? `The same for the first ${start} tokens; then` : "From the first token on,", differing || gone
        ? `${differing} of ${texts[1].length} tokens are different (underlined), and ${gone} of the original are gone.` : "",
      this.use(left.trace), changeOf(left.trace, right.trace, start)].filter(Boolean).join(" ");
    say(this.summary.textContent);
    fill(this.buttons, ...this.actions(result), button("curl", () => this.curl(this.request)));
  }

  use(trace) {
    const [layer, expert] = this.expert ?? [];
    const at = trace.layers.indexOf(layer);
    if (at < 0) return "";
    return `${trace.tokens.filter((token) => token.e[at]?.includes(expert)).length} of ${trace.tokens.length} tokens had used expert ${expert} of layer ${layer}.`;
  }

  destroy() {
    this.gone = true;
    this.controller.abort();
    this.views.forEach((view) => view?.destroy());
    this.element.remove();
  }
}
