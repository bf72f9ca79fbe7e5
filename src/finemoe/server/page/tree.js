// A conversation is a tree: editing and retrying add a sibling. `chosen` remembers which child is shown.

export const ROOT = "root";
export const ROLES = ["user", "assistant"];

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

export function newConversation(model = "") {
  return { id: newId(), title: "", named: false, updated: Date.now(), model, system: "", experts: {}, nodes: {}, chosen: {} };
}

export function childrenOf(conversation, parent) {
  // Objects keep the order of insertion, which is the order of the versions.
  return Object.values(conversation.nodes).filter((node) => node.parent === parent);
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  const way = [];
  let parent = ROOT;
  for (;;) {
    const node = conversation.nodes[conversation.chosen[parent]];
    if (!node || node.parent !== parent || way.length > 10000) return way;
    way.push(node);
    parent = node.id;
  }
}

/** All that stands before the children of `id`, first to last, whichever versions are shown. */
export function until(conversation, id) {
  const way = [];
  for (let node = conversation.nodes[id]; node && way.length < 10000; node = conversation.nodes[node.parent]) way.unshift(node);
  return way;
}

export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  return node;
}

export function versions(conversation, node) {
  const all = childrenOf(conversation, node.parent);
  return { all, at: all.indexOf(node) };
}

export function choose(conversation, node) {
  conversation.chosen[node.parent] = node.id;
}

/**
 * Takes in what another tab has made of the same conversation. Messages at the same place become versions; of one that both
 * have, the one written last counts. What was deleted there goes here too, but for the ids in `held`.
 */
export function merge(conversation, other, held = new Set()) {
  if (!other?.nodes) return;
  const { nodes, chosen } = conversation;
  const gone = new Set([...(conversation.gone ?? []), ...(other.gone ?? []).filter((id) => !held.has(id))]);
  for (const [id, node] of Object.entries(other.nodes)) {
    if (gone.has(id)) continue;
    if (!nodes[id]) nodes[id] = node;
    else if ((node.written ?? 0) > (nodes[id].written ?? 0)) Object.assign(nodes[id], node);
  }
  for (const id of gone) { delete nodes[id]; delete chosen[id]; }
  for (const [parent, child] of Object.entries(other.chosen)) if (!nodes[chosen[parent]] && nodes[child]) chosen[parent] = child;
  if (gone.size) conversation.gone = [...gone].slice(-2000);
}

/** Takes a message and all that follows it away, and returns it; a sibling is shown in its place. */
export function remove(conversation, node) {
  const gone = [node];
  for (let at = 0; at < gone.length; at += 1) gone.push(...childrenOf(conversation, gone[at].id));
  const { all, at } = versions(conversation, node);
  const next = all[at - 1] ?? all[at + 1];
  conversation.gone = [...(conversation.gone ?? []), ...gone.map((each) => each.id)]; // lest another tab bring it back
  for (const each of gone) {
    delete conversation.nodes[each.id];
    delete conversation.chosen[each.id];
  }
  if (next) conversation.chosen[node.parent] = next.id;
  else delete conversation.chosen[node.parent];
  return gone;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation)[0];
  const line = (first?.content ?? "").trim().split("\n")[0];
  return line ? (line.length > 60 ? `${line.slice(0, 57)}...` : line) : "New conversation";
}
