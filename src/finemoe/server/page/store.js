// What the browser keeps: a key for each conversation, and one for each answer's trace, so that a full
// storage costs the oldest traces and never a message.

import { CHAT, TEXT } from "./answering.js";
import { cleaned } from "./trace.js";
import { ROLES, ROOT, merge, newConversation, newId, path, titleOf } from "./tree.js";

const CONVERSATION = "finemoe.conversation.";
const TRACE = "finemoe.trace.";
const cache = new Map(); // traces of this visit, by key
let warn = () => {};

export function onStorageTrouble(callback) { warn = callback; }

export function read(name, otherwise) {
  try {
    const text = localStorage.getItem(name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

function keysOf(prefix) {
  try { return Object.keys(localStorage).filter((name) => name.startsWith(prefix)); } catch { return []; }
}

export function write(name, value) {
  const text = JSON.stringify(value);
  for (;;) {
    try {
      localStorage.setItem(name, text);
      return true;
    } catch (error) {
      // Full: the oldest traces go first. Their names begin with the time in base 36, all of one length.
      const oldest = keysOf(TRACE).filter((each) => each !== name).sort()[0];
      if (error.name === "QuotaExceededError" && oldest) { localStorage.removeItem(oldest); continue; }
      warn("The browser has no room left for this conversation. Export it, or delete old ones.");
      return false;
    }
  }
}

export function list() {
  const found = [];
  for (const name of keysOf(CONVERSATION)) {
    const conversation = read(name, null);
    if (conversation?.id) found.push({ id: conversation.id, title: titleOf(conversation), updated: conversation.updated });
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Calls back with what another tab has written of a conversation. */
export function onOtherTab(callback) {
  window.addEventListener("storage", ({ key }) => { if (key?.startsWith(CONVERSATION)) callback(read(key, null)); });
}

export const load = (id) => read(CONVERSATION + id, null);

/** What another tab has written meanwhile is taken in first; what is on the screen stays. */
export function save(conversation) {
  merge(conversation, load(conversation.id), new Set(path(conversation).map((node) => node.id)));
  conversation.updated = Date.now();
  write(CONVERSATION + conversation.id, conversation);
}

export function forget(conversation) {
  for (const node of Object.values(conversation.nodes)) forgetTrace(node);
  localStorage.removeItem(CONVERSATION + conversation.id);
}

export function saveTrace(node, trace) {
  node.trace ??= `${TRACE}${newId()}`;
  cache.set(node.trace, trace);
  write(node.trace, trace);
}

export function traceOf(node) {
  if (!node.trace) return null;
  if (!cache.has(node.trace)) cache.set(node.trace, read(node.trace, null));
  return cache.get(node.trace);
}

export function forgetTrace(node) {
  if (!node.trace) return;
  cache.delete(node.trace);
  try { localStorage.removeItem(node.trace); } catch { /* nothing was kept */ }
}

export function exported(conversation) {
  const traces = {};
  for (const node of Object.values(conversation.nodes)) {
    const trace = traceOf(node);
    if (trace) traces[node.id] = trace;
  }
  const nodes = Object.fromEntries(Object.entries(conversation.nodes).map(([id, { trace, ...node }]) => [id, node]));
  return { format: "finemoe-conversation", version: 1, ...conversation, gone: undefined, title: titleOf(conversation), nodes, traces };
}

/** A conversation from a file: one of ours, or any {"messages": [{role, content}]}. */
export function imported(text) {
  let data;
  try { data = JSON.parse(text); } catch { throw new Error("This file is not JSON."); }
  const conversation = newConversation(typeof data?.model === "string" ? data.model : "");
  if (typeof data?.system === "string") conversation.system = data.system;
  if (typeof data?.title === "string") conversation.title = data.title.slice(0, 200);
  const messages = Array.isArray(data) ? data : data?.messages;
  if (data?.format === "finemoe-conversation") importTree(conversation, data);
  else if (Array.isArray(messages)) importMessages(conversation, messages);
  else throw new Error("This file holds no conversation: neither one of finemoe nor a list of messages.");
  return conversation;
}

function importMessages(conversation, messages) {
  let parent = ROOT;
  for (const message of messages) {
    if (typeof message?.content !== "string") throw new Error("A message of this file has no text.");
    if (message.role === "system") { conversation.system = message.content; continue; }
    if (!ROLES.includes(message.role)) throw new Error(`A message of this file has the role ${JSON.stringify(message.role)}.`);
    const node = { id: newId(), parent, created: Date.now(), role: message.role, content: message.content };
    conversation.nodes[node.id] = node;
    conversation.chosen[parent] = node.id;
    parent = node.id;
  }
}

function importTree(conversation, data) {
  if (data.version !== 1) throw new Error(`This file has version ${data.version}; this page reads version 1.`);
  // New names: files imported twice share no traces, and no name of a file becomes a key.
  const names = new Map([[ROOT, ROOT]]);
  const nodes = Object.values(data.nodes ?? {});
  for (const node of nodes) {
    if (typeof node?.id !== "string" || typeof node.content !== "string" || !ROLES.includes(node.role)) throw new Error("A message of this file is damaged.");
    names.set(node.id, newId() + names.size.toString(36));
  }
  for (const node of nodes) {
    if (!names.has(node.parent)) throw new Error("A message of this file answers one that is missing.");
    const copy = { id: names.get(node.id), parent: names.get(node.parent), role: node.role, content: node.content,
      created: Number(node.created) || Date.now() };
    for (const field of ["reasoning", "model", "finish", "error", "system"]) if (typeof node[field] === "string") copy[field] = node[field];
    if (Number.isInteger(node.usage?.prompt_tokens) && Number.isInteger(node.usage.completion_tokens)) copy.usage = node.usage;
    // A file may not say where a request goes.
    if ([CHAT, TEXT].includes(node.request?.path) && node.request.body?.model) copy.request = { method: "POST", path: node.request.path, body: node.request.body };
    conversation.nodes[copy.id] = copy;
    const trace = data.traces?.[node.id];
    if (Array.isArray(trace?.layers) && Array.isArray(trace?.tokens)) saveTrace(copy, cleaned(trace));
  }
  for (const [parent, child] of Object.entries(data.chosen ?? {})) {
    if (names.has(parent) && names.has(child)) conversation.chosen[names.get(parent)] = names.get(child);
  }
}
