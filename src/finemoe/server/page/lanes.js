// Tokens with a lane under each: a column for each layer, its experts stacked, as high as their gates.
// Tokens are elements (they can be pointed at and read); lanes are drawn on one canvas that covers what is near the window,
// so that 2,000 tokens of 12 layers cost no more than a screenful.

import { colourOf } from "./colours.js";
import { el, onceAFrame } from "./dom.js";

const PER_ROW = 16; // columns beside each other; a deeper model gets another row
const ROW = 26;
const MARGIN = 400; // drawn above and below the window, so that most scrolling draws nothing

const views = new Set();
let highlighted = null; // {model, layer, expert}

export function highlight(expert) {
  if (highlighted?.model === expert?.model && highlighted?.layer === expert?.layer && highlighted?.expert === expert?.expert) return;
  highlighted = expert;
  redrawAll();
}

export const redrawAll = () => views.forEach((view) => view.draw(true));

document.addEventListener("scroll", onceAFrame(() => views.forEach((view) => view.draw(false))), { capture: true, passive: true });
window.addEventListener("resize", onceAFrame(redrawAll));

/** White space that would not be seen, as signs. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→");

/** Text with signs at its white space. The style draws them: they are no text. */
const marked = (text) => text.split(/([ \t\n])/).map((part) => ({ " ": () => el("i.sp", {}, " "), "\t": () => el("i.tab", {}, "\t"), "\n": () => el("i.nl") })[part]?.() ?? part);

// Line breaks of the layout are not copied, and those of the text are.
document.addEventListener("copy", (event) => {
  const range = getSelection().rangeCount ? getSelection().getRangeAt(0) : null;
  const { commonAncestorContainer: box } = range ?? {};
  if (!range || range.collapsed || !(box.closest ? box : box.parentElement).closest(".tokens")) return;
  const copied = range.cloneContents();
  for (const sign of copied.querySelectorAll(".nl")) sign.textContent = "\n";
  event.clipboardData.setData("text/plain", copied.textContent);
  event.preventDefault();
});

/** How a token is called, where its text alone would say nothing. */
export function nameOf(text) {
  if (text === "") return "part of the character before, or a sign without text";
  if (!text.trim()) return [...text].map((char) => ({ " ": "space", "\n": "new line", "\t": "tab" })[char] ?? "blank").join(", ");
  return text.replaceAll("\n", " new line ");
}

export class TokenView {
  /** `onToken(index, pinned)` is told of what is pointed at (or focused), and of what was clicked. */
  constructor(trace, { label, onToken = () => {} }) {
    this.trace = trace;
    this.onToken = onToken;
    this.canvas = el("canvas.lanes", { "aria-hidden": "true" });
    this.element = el("div.tokens", { role: "group", "aria-label": `${label}. Arrow keys go from token to token.` }, this.canvas);
    this.spans = [];
    this.places = []; // [left, top, width] of each token, as laid out
    this.current = 0;
    this.scale = []; // the largest sum of gates seen, by layer
    this.listen();
    this.observer = new ResizeObserver(() => {
      const width = this.element.clientWidth;
      if (!width) return;
      if (width !== this.width) { this.width = width; this.places = []; }
      this.draw(true);
    });
    this.observer.observe(this.element);
    views.add(this);
    this.update();
  }

  destroy() {
    this.gone = true;
    this.observer.disconnect();
    views.delete(this);
  }

  get columns() { return Math.min(this.trace.layers.length, PER_ROW); }

  get rows() { return Math.ceil(this.trace.layers.length / PER_ROW); }

  /** Takes in the tokens that are new since the last time. */
  update() {
    const { tokens, layers } = this.trace;
    if (!tokens.length) return;
    if (layers.length !== this.known) {
      this.known = layers.length;
      // Custom properties are allowed where style attributes are not.
      this.element.style.setProperty("--lane-width", `${Math.max(18, this.columns * (this.columns > 8 ? 3 : 5))}px`);
      this.element.style.setProperty("--lane-height", `${this.rows * ROW}px`);
      this.places = [];
    }
    for (let at = this.spans.length; at < tokens.length; at += 1) this.append(at);
    this.places.length = Math.min(this.places.length, Math.max(0, this.wordStart ?? 0));
    this.draw(true);
  }

  append(at) {
    const token = this.trace.tokens[at];
    const text = token.t;
    const before = this.trace.tokens[at - 1]?.t ?? "";
    // Tokens of a word stay on one line; a very long "word" (Chinese, base64) may break.
    const joined = /[\p{L}\p{N}]$/u.test(before) && /^[\p{L}\p{N}.,:;!?'’]/u.test(text);
    if (!this.word || !joined || this.word.textContent.length + text.length > 18) {
      this.word = el("span.word");
      this.wordStart = at;
      this.element.append(this.word);
    }
    const end = text.lastIndexOf("\n") + 1;
    const span = el("span.tok", { role: "button", tabindex: at === this.current ? "0" : "-1", "data-at": at }, text ? marked(end ? text.slice(0, end) : text) : el("i.none"));
    if (!text.trim()) span.setAttribute("aria-label", nameOf(text));
    this.word.append(span);
    this.spans.push(span);
    // One line is broken, however many breaks a token holds: an empty line would have no lane.
    if (end) {
      this.element.append(el("br"));
      this.word = null;
      // What follows in the same token (indentation, mostly) begins the next line.
      if (end < text.length) this.element.append(el("span.tail", { "data-at": at }, marked(text.slice(end))));
    }
    this.trace.layers.forEach((_, layer) => {
      const sum = (token.g[layer] ?? []).reduce((total, gate) => total + (gate ?? 0), 0);
      this.scale[layer] = Math.max(this.scale[layer] ?? 0, sum);
    });
  }

  /** Marks the tokens that differ: underlined and named, not only coloured. */
  mark(marks, word = "differs") {
    this.spans.forEach((span, at) => {
      span.classList.toggle("differs", Boolean(marks[at]));
      if (marks[at]) span.setAttribute("aria-label", `${nameOf(this.trace.tokens[at].t)}, ${word}`);
      else if (this.trace.tokens[at].t.trim()) span.removeAttribute("aria-label");
    });
    this.draw(true);
  }

  listen() {
    const at = (event) => {
      const span = event.target.closest?.("[data-at]");
      return span && this.element.contains(span) ? Number(span.dataset.at) : -1;
    };
    this.element.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && at(event) >= 0) this.onToken(at(event), false);
    });
    this.element.addEventListener("focusin", (event) => { if (at(event) >= 0) this.go(at(event), false); });
    this.element.addEventListener("click", (event) => { if (at(event) >= 0) { this.go(at(event), true); this.onToken(at(event), true); } });
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (step !== undefined) this.go(Math.max(0, Math.min(this.spans.length - 1, this.current + step)), true);
      else if (event.key === "Enter" || event.key === " ") this.onToken(this.current, true);
      else return;
      event.preventDefault();
    });
  }

  go(at, focus) {
    this.spans[this.current]?.setAttribute("tabindex", "-1");
    this.current = at;
    this.spans[at].setAttribute("tabindex", "0");
    if (focus && document.activeElement !== this.spans[at]) this.spans[at].focus();
    else this.onToken(at, false);
  }

  select(at) {
    this.spans[this.selected]?.classList.remove("selected");
    this.selected = at;
    this.spans[at]?.classList.add("selected");
  }

  measure() {
    for (let at = this.places.length; at < this.spans.length; at += 1) {
      const span = this.spans[at];
      this.places.push([span.offsetLeft, span.offsetTop + span.offsetHeight - this.rows * ROW, span.offsetWidth]);
    }
  }

  /** Draws what is near the window; without `force` only if the canvas no longer covers it. */
  draw(force) {
    if (!this.trace.layers.length || !this.element.isConnected) return;
    const box = this.element.getBoundingClientRect();
    if (!box.width || box.bottom < -MARGIN || box.top > innerHeight + MARGIN) { this.drawn = null; return; }
    const top = Math.max(0, -box.top - MARGIN);
    const bottom = Math.min(box.height, innerHeight - box.top + MARGIN);
    const needTop = Math.max(0, -box.top);
    const needBottom = Math.min(box.height, innerHeight - box.top);
    if (!force && this.drawn && this.drawn[0] <= needTop && this.drawn[1] >= needBottom) return;
    this.measure();
    this.drawn = [top, bottom];
    const ratio = Math.min(2, devicePixelRatio || 1);
    const { canvas } = this;
    canvas.width = Math.ceil(box.width * ratio);
    canvas.height = Math.ceil((bottom - top) * ratio);
    canvas.style.width = `${box.width}px`;
    canvas.style.height = `${bottom - top}px`;
    canvas.style.top = `${top}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.translate(0, -top);
    for (let at = 0; at < this.places.length; at += 1) {
      const y = this.places[at][1];
      if (y > bottom) break;
      if (y + this.rows * ROW >= top) this.lane(pen, at);
    }
  }

  lane(pen, at) {
    const [left, top, width] = this.places[at];
    const token = this.trace.tokens[at];
    const { model } = this.trace;
    // No wider than can be taken in at a glance.
    const step = Math.min((width - 4) / this.columns, Math.max(9, 40 / this.columns));
    this.trace.layers.forEach((layer, index) => {
      const experts = token.e[index];
      if (!experts?.length) return;
      const x = left + (index % PER_ROW) * step;
      let y = top + (Math.floor(index / PER_ROW) + 1) * ROW;
      const gates = token.g[index] ?? [];
      const room = (ROW - 3) / (this.scale[index] || 1);
      experts.forEach((expert, slot) => {
        // Without gates (a router that has none) all experts of a token weigh the same.
        const height = gates.length ? (gates[slot] ?? 0) * room : (ROW - 3) / experts.length;
        y -= height;
        pen.globalAlpha = !highlighted || (highlighted.layer === layer && highlighted.expert === expert && highlighted.model === model) ? 1 : 0.13;
        pen.fillStyle = colourOf(model, layer, expert);
        pen.fillRect(x, y, Math.max(1, step - 1), Math.max(0.5, height - 0.5));
      });
    });
    pen.globalAlpha = 1;
  }
}
