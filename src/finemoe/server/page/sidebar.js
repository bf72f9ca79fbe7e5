// The conversations that the browser keeps.

import { ask, button, byId, el, fill } from "./dom.js";
import { exported, forget, imported, list, load, save } from "./store.js";
import { titleOf } from "./tree.js";

/** `open(conversation or null)` shows a conversation (null: a new one); `current()` is the one shown. */
export class Sidebar {
  constructor({ open, current, trouble }) {
    Object.assign(this, { open, current, trouble });
    byId("new").addEventListener("click", () => open(null));
    byId("export").addEventListener("click", () => this.export(current()));
    byId("import").addEventListener("click", () => this.import());
    // Another tab of this page has written.
    window.addEventListener("storage", () => this.draw());
    this.draw();
  }

  draw() {
    const shown = this.current()?.id;
    const box = byId("conversations");
    const items = list().map(({ id, title }) => el(id === shown ? "li.current" : "li", {},
      button(title, () => this.open(load(id)), { class: "open", "aria-current": id === shown ? "true" : null }),
      el("span.item-actions", {},
        button("✎", () => this.rename(id), { class: "plain", "aria-label": `Rename ${title}`, title: "Rename" }),
        button("×", () => this.delete(id, title), { class: "plain", "aria-label": `Delete ${title}`, title: "Delete" }))));
    fill(box, ...(items.length ? items : [el("li.quiet", {}, "Conversations stay in this browser.")]));
  }

  async rename(id) {
    // The one that is shown is changed in place, lest the next save take the new name back.
    const conversation = id === this.current().id ? this.current() : load(id);
    const title = await ask("Rename the conversation", { label: "Name", value: titleOf(conversation), ok: "Rename" });
    if (title === null) return;
    conversation.title = title.trim().slice(0, 200);
    save(conversation);
    this.draw();
  }

  async delete(id, title) {
    if (!await ask("Delete the conversation?", { text: `"${title}" and all its versions are lost.`, ok: "Delete" })) return;
    const conversation = load(id);
    if (conversation) forget(conversation);
    if (id === this.current().id) this.open(null);
    else this.draw();
  }

  export(conversation) {
    const blob = new Blob([JSON.stringify(exported(conversation), null, 1)], { type: "application/json" });
    const name = titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "conversation";
    const link = el("a", { href: URL.createObjectURL(blob), download: `${name}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  import() {
    const input = el("input", { type: "file", accept: ".json,application/json", onchange: async () => {
      const [file] = input.files;
      if (!file) return;
      try {
        if (file.size > 50_000_000) throw new Error("This file is larger than 50 MB.");
        const conversation = imported(await file.text());
        save(conversation);
        this.trouble("");
        this.open(conversation);
      } catch (error) {
        this.trouble(error.message);
      }
    } });
    input.click();
  }
}
