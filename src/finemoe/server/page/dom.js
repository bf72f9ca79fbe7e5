// Elements are built node by node. Nothing on this page goes through innerHTML: what a model writes is untrusted text.

/** el("button.strong", {type: "button", onclick: f, "aria-label": "..."}, "Send") */
export function el(spec, props = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    // Handlers are never attributes, which a strict Content-Security-Policy forbids.
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...flat(children));
  return node;
}

const flat = (children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false && child !== "");

/** Puts children, also nested in lists, in place of what a box holds. */
export function fill(box, ...children) {
  box.replaceChildren(...flat(children));
}

export function button(text, onclick, props = {}) {
  return el("button", { type: "button", onclick, ...props }, text);
}

export const byId = (id) => document.getElementById(id);

/** What a screen reader says now; the same sentence twice in a row is said twice. */
export function say(text) {
  const status = byId("status");
  status.textContent = "";
  requestAnimationFrame(() => { status.textContent = text; });
}

/** Copies, and says so on the button for a moment. */
export async function copy(text, from) {
  const before = from.textContent;
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    // No clipboard without a secure context (an address in the network): select the old way.
    const area = el("textarea", { "aria-hidden": "true", class: "sr" });
    area.value = text;
    (from.closest("dialog") ?? document.body).append(area);
    area.select();
    from.textContent = document.execCommand("copy") ? "Copied" : "Copy failed";
    area.remove();
  }
  say(from.textContent);
  setTimeout(() => { from.textContent = before; }, 1500);
}

/** A modal dialog with a title and a way out; it is removed when closed. */
export function dialog(title, content, { wide = false } = {}) {
  const heading = el("h2", { id: `dialog-${title.replace(/\W+/g, "-")}` }, title);
  const box = el(`dialog${wide ? ".wide" : ""}`, { "aria-labelledby": heading.id },
    el("div.dialog-head", {}, heading, button("×", () => box.close(), { class: "plain", "aria-label": "Close" })),
    content);
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  document.body.append(box);
  box.showModal();
  return box;
}

/** A question with a field (or none), answered with the text, true, or null. */
export function ask(title, { value, label, ok = "OK", type = "text", text } = {}) {
  return new Promise((resolve) => {
    let answer = null;
    const field = label ? el("input", { type, value: value ?? "", "aria-label": label, autocomplete: "off" }) : null;
    const form = el("form", { onsubmit: (event) => { event.preventDefault(); answer = field ? field.value : true; box.close(); } },
      text ? el("p", {}, text) : null,
      field ? el("label.field", {}, label, field) : null,
      el("div.row.end", {}, button("Cancel", () => box.close()), el("button.strong", { type: "submit" }, ok)));
    const box = dialog(title, form);
    box.addEventListener("close", () => resolve(answer));
    field?.select();
  });
}

/** Calls back at most once a frame; what takes long has to wait. */
export function onceAFrame(callback) {
  let waiting = false;
  const run = () => {
    const start = performance.now();
    waiting = false;
    callback();
    const took = performance.now() - start;
    if (took < 12) return;
    waiting = true;
    setTimeout(() => { waiting = false; if (again) request(); }, took * 3);
  };
  let again = false;
  const request = () => {
    again = waiting;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(run);
  };
  return request;
}
