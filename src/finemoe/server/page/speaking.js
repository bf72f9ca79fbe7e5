// A streamed answer for a screen reader: whole sentences, a few seconds apart.

import { byId, fill, say } from "./dom.js";
import { settings } from "./settings.js";

const EVERY = 4000; // milliseconds

export class Speaker {
  constructor() {
    this.said = 0;
    this.last = performance.now();
    byId("live").replaceChildren();
    say("Answering.");
  }

  heard(text) {
    if (settings.quiet || performance.now() - this.last < EVERY) return;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((mark) => text.lastIndexOf(mark)));
    if (end < this.said) return;
    this.speak(text.slice(this.said, end + 1));
    this.said = end + 1;
  }

  speak(text) {
    this.last = performance.now();
    const line = document.createElement("p");
    line.textContent = text;
    fill(byId("live"), line);
  }

  done(text, error, stopped) {
    if (!settings.quiet && !stopped && text.length > this.said) this.speak(text.slice(this.said));
    say(error ? `The answer broke off: ${error}` : stopped ? "Stopped." : "The answer is finished.");
  }
}
