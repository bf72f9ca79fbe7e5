// Markdown as nodes. No HTML is read, no picture is loaded, links go to http and https alone.

import { button, copy, el } from "./dom.js";
import { formula } from "./formulas.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH_OPEN = /^\s*(\$\$|\\\[)/;
const DEEPEST = 8;

/** The blocks of a text as pieces of source. */
function blocks(lines) {
  const found = [];
  let at = 0;
  const until = (stop) => {
    const start = at;
    at += 1;
    while (at < lines.length && !stop(lines[at])) at += 1;
    return lines.slice(start, at);
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    const math = line.match(MATH_OPEN);
    if (!line.trim()) { at += 1; continue; }
    if (fence) {
      const piece = until((each) => each.trim().startsWith(fence[1]) && !each.trim().slice(fence[1].length).replaceAll(fence[1][0], ""));
      at += 1;
      found.push({ kind: "code", lines: piece.slice(1), language: fence[2].trim().split(/\s+/)[0] });
    } else if (math) {
      const close = math[1] === "$$" ? "$$" : "\\]";
      const text = [];
      let rest = line.trim().slice(2);
      for (; ; rest = lines[at]) {
        at += 1;
        const end = rest.indexOf(close);
        if (end >= 0) { text.push(rest.slice(0, end)); if (rest.slice(end + 2).trim()) lines[at -= 1] = rest.slice(end + 2); break; }
        text.push(rest);
        if (at >= lines.length) break;
      }
      found.push({ kind: "math", lines: text });
    } else if (HEADING.test(line)) { at += 1; found.push({ kind: "heading", lines: [line] }); }
    else if (RULE.test(line)) { at += 1; found.push({ kind: "rule", lines: [] }); }
    else if (/^ {0,3}>/.test(line)) found.push({ kind: "quote", lines: until((each) => !/^ {0,3}>/.test(each)) });
    else if (ITEM.test(line)) {
      // A list goes on over empty lines as long as an item or something indented follows.
      found.push({ kind: "list", lines: until((each, next = lines[at + 1]) =>
        each.trim() ? !ITEM.test(each) && !/^\s/.test(each) && !lines[at - 1]?.trim() : !(next !== undefined && (ITEM.test(next) || /^\s+\S/.test(next)))) });
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      found.push({ kind: "table", lines: until((each) => !each.trim() || !each.includes("|")) });
    } else {
      found.push({ kind: "text", lines: until((each) => !each.trim() || FENCE.test(each) || HEADING.test(each) || RULE.test(each)
        || MATH_OPEN.test(each) || /^ {0,3}>/.test(each) || ITEM.test(each)) });
    }
  }
  return found;
}

function code(block) {
  const text = block.lines.join("\n");
  const take = button("Copy", () => copy(text, take), { class: "small", "aria-label": `Copy the ${block.language || "code"}` });
  return el("div.code", {}, el("div.code-head", {}, el("span", {}, block.language || "code"), take),
    el("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, el("code", {}, text)));
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(block) {
  const [head, , ...rows] = block.lines;
  const width = cells(head).length;
  return el("div.table", { tabindex: "0", role: "group", "aria-label": "Table" }, el("table", {},
    el("thead", {}, el("tr", {}, cells(head).map((cell) => el("th", { scope: "col" }, inline(cell))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, cells(row).slice(0, width).map((cell) => el("td", {}, inline(cell))))))));
}

function listOf(block, depth) {
  const [, indent, mark] = block.lines[0].match(ITEM);
  const inner = new RegExp(`^(?: {1,${Math.min(20, indent.length + mark.length + 1)}}|\\t)`);
  const items = [];
  for (const line of block.lines) {
    const item = line.match(ITEM);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    // What is indented belongs to the item: without its indentation it is a text of its own.
    else items.at(-1).push(line.replace(inner, ""));
  }
  const ordered = /\d/.test(mark);
  return el(ordered ? "ol" : "ul", ordered && Number.parseInt(mark, 10) !== 1 ? { start: Number.parseInt(mark, 10) } : {},
    items.map((lines) => el("li", {}, lines.length === 1 ? inline(lines[0]) : tight(lines, depth + 1))));
}

/** A first paragraph of an item without the distance of a paragraph. */
function tight(lines, depth) {
  const nodes = draw(lines, depth);
  if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes);
  return nodes;
}

function node(block, depth) {
  switch (block.kind) {
    case "code": return code(block);
    case "math": return el("div.formula", { tabindex: "0", role: "group", "aria-label": "Formula" }, formula(block.lines.join("\n"), true));
    case "heading": {
      const [, marks, text] = block.lines[0].match(HEADING);
      // Below the page's own h1 and h2, two levels keep the outline without gaps.
      return el(`${marks.length < 4 ? "h3" : "h4"}.level${marks.length}`, {}, inline(text));
    }
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, draw(block.lines.map((line) => line.replace(/^ {0,3}> ?/, "")), depth + 1));
    case "list": return listOf(block, depth);
    case "table": return table(block);
    default: return el("p", {}, inline(block.lines.join("\n")));
  }
}

function draw(lines, depth = 0) {
  if (depth > DEEPEST) return [el("p", {}, lines.join("\n"))];
  return blocks([...lines]).map((block) => node(block, depth));
}

const PAIRS = [["***", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const PLAIN = /^[^\\`$*_~[!<h\n]+/;

/** Nodes for the text of a line: one walk from left to right, with a bounded look ahead. */
export function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  const push = (each) => {
    if (plain) out.push(plain);
    plain = "";
    out.push(each);
  };
  for (let at = 0; at < text.length;) {
    const rest = text.slice(at, at + 2000);
    const run = rest.match(PLAIN);
    if (run) { plain += run[0]; at += run[0].length; continue; }
    const special = span(rest, plain.at(-1) ?? " ", depth);
    if (special) { push(special.node); at += special.length; }
    else if (rest[0] === "\n") { push(el("br")); at += 1; }
    else if (/^\\[!-/:-@[-`{-~]/.test(rest)) { plain += rest[1]; at += 2; }
    else { plain += rest[0]; at += 1; }
  }
  if (plain) out.push(plain);
  return out;
}

function span(rest, before, depth) {
  const tick = rest.match(/^(`+)([^]*?[^`])\1(?!`)/);
  if (tick) return { node: el("code", {}, tick[2].replace(/^ (.*) $/, "$1")), length: tick[0].length };
  const math = rest.match(/^\\\(([^]+?)\\\)/) ?? rest.match(/^\\\[([^]+?)\\\]/) ?? rest.match(/^\$\$([^$]+)\$\$/)
    // $5 and $6 are prices: no space inside the signs, no digit after them.
    ?? rest.match(/^\$([^\s$](?:[^$\n]*?[^\s$\\])?)\$(?!\d)/);
  if (math) return { node: formula(math[1]), length: math[0].length };
  const link = rest.match(/^!?\[([^\]\n]{0,300})\]\(\s*<?([^\s()<>]{1,1000}(?:\([^\s()]{0,200}\)[^\s()]{0,200})?)>?(?:\s+"[^"\n]{0,200}")?\s*\)/);
  if (link) return { node: anchor(link[2], link[1] ? inline(link[1], depth + 1) : link[2]), length: link[0].length };
  const bare = /\w/.test(before) ? null : rest.match(/^<?(https?:\/\/[^\s<>"')\]]{1,1000}[^\s<>"')\].,;:!?])>?/);
  if (bare) return { node: anchor(bare[1], bare[1]), length: bare[0].length };
  if (depth > DEEPEST) return null;
  for (const [mark, tag] of PAIRS) {
    if (!rest.startsWith(mark) || /^\s/.test(rest.slice(mark.length))) continue;
    if (mark[0] === "_" && /\w/.test(before)) continue;
    const end = closing(rest, mark);
    if (end < 0) continue;
    const inside = inline(rest.slice(mark.length, end), depth + 1);
    return { node: el(tag, {}, mark.length === 3 ? el("em", {}, inside) : inside), length: end + mark.length };
  }
  return null;
}

function closing(rest, mark) {
  for (let at = mark.length + 1; at <= rest.length - mark.length; at += 1) {
    if (rest[at] === "\\") { at += 1; continue; }
    if (!rest.startsWith(mark, at) || /\s/.test(rest[at - 1])) continue;
    // A single mark may not be half of a double one; an underscore inside a word is a name.
    if (mark.length === 1 && (rest[at + 1] === mark || rest[at - 1] === mark)) { at += 1; continue; }
    if (mark[0] === "_" && /\w/.test(rest[at + mark.length] ?? "")) continue;
    return at;
  }
  return -1;
}

function anchor(address, content) {
  let url = null;
  try { url = new URL(address); } catch { /* relative or nonsense: text */ }
  if (!url || !["http:", "https:"].includes(url.protocol)) return el("span", {}, content);
  return el("a", { href: url.href, rel: "noopener noreferrer nofollow", target: "_blank", title: url.href }, content);
}

/** Draws text into a box. Blocks that are as they were stay in place. */
export function update(box, text) {
  const wanted = blocks(text.split("\n"));
  const drawn = (box.drawn ??= []);
  wanted.forEach((block, at) => {
    const source = `${block.kind}\0${block.language ?? ""}\0${block.lines.join("\n")}`;
    if (drawn[at] === source) return;
    const fresh = node(block, 0);
    if (box.childNodes[at]) box.childNodes[at].replaceWith(fresh);
    else box.append(fresh);
    drawn[at] = source;
  });
  while (box.childNodes.length > wanted.length) box.lastChild.remove();
  drawn.length = wanted.length;
}
