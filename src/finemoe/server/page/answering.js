// From a conversation and the settings to a request, and from the stream to an answer.

import { stream } from "./api.js";
import { mend, newTrace, take } from "./trace.js";

export const CHAT = "v1/chat/completions";
export const TEXT = "v1/completions";

/** `experts` without what says nothing; undefined if nothing is left. */
function constraint(experts) {
  const out = {};
  for (const name of ["disabled", "forced"]) {
    const layers = Object.entries(experts?.[name] ?? {}).filter(([, ids]) => ids.length);
    if (layers.length) out[name] = Object.fromEntries(layers);
  }
  if (Number.isInteger(experts?.active)) out.active = experts.active;
  if (experts?.shared === false) out.shared = false;
  return Object.keys(out).length ? out : undefined;
}

/** Turns of a chat are set apart; the continuation of a text is not. */
function joined(nodes) {
  const turn = (node) => node?.role === "assistant" && node.request?.path !== TEXT;
  return nodes.map((node, at) => (at && (turn(node) || turn(nodes[at - 1])) ? "\n\n" : "") + node.content).join("");
}

function conversationOf(nodes, system, chat) {
  // A model without a template continues text: everything so far, as it stands.
  if (!chat) return { prompt: joined(nodes.filter(({ content }) => content)) };
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of nodes) {
    const last = messages.at(-1);
    // Two messages of a user in a row (nothing came of the first) are an error to many templates.
    if (content && last?.role === role) last.content += (role === "user" ? "\n\n" : "") + content;
    else if (content) messages.push({ role, content });
  }
  return { messages };
}

/** What holds where a setting is empty: as `finemoe chat` has it, or the server. */
export const defaults = (chat) => ({ temperature: chat ? 0.8 : 1, top_p: chat ? 0.95 : 1, max_tokens: chat ? 512 : 128, min_p: 0, min_new_tokens: 0,
  repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0, alternatives: 5 });

/** The request for the answer to `messages`; {path, body}. Empty settings are the `defaults`. */
export function requestFor({ model, messages, system, settings, experts, routing, seed }) {
  const facts = model.finemoe ?? {};
  const chat = facts.chat !== false;
  const body = { model: model.id, ...conversationOf(messages, system, chat), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty"]) {
    if (typeof settings[name] === "number") body[name] = settings[name];
  }
  const usual = defaults(chat);
  if (chat) { body.temperature ??= usual.temperature; body.top_p ??= usual.top_p; }
  // The server ends a chat where the context does, and completions after 16 tokens, which is no length to look at.
  if (!chat || !(facts.context <= usual.max_tokens)) body.max_tokens ??= usual.max_tokens;
  if (settings.stop?.length) body.stop = settings.stop;
  body.seed = seed;
  const alternatives = settings.alternatives ?? usual.alternatives;
  if (routing && alternatives > 0) {
    if (chat) Object.assign(body, { logprobs: true, top_logprobs: alternatives });
    else body.logprobs = alternatives;
  }
  const ours = {};
  if (routing) ours.routing = true;
  const limits = constraint(experts);
  if (limits) ours.experts = limits;
  if (settings.guess && facts.guesses?.includes(settings.guess)) ours.guess = settings.guess;
  for (const name of ["top_k", "min_p", "repetition_penalty", "min_new_tokens"]) {
    if (typeof settings[name] === "number") ours[name] = settings[name];
  }
  if (settings.ignore_end) ours.ignore_end = true;
  if (Object.keys(ours).length) body.finemoe = ours;
  return { method: "POST", path: chat ? CHAT : TEXT, body };
}

/** How many tokens a server that refuses would write; 0 where it does not say. */
function room({ status, param, message }) {
  if (status !== 400 || param !== "max_tokens") return 0;
  return Number(message.match(/(?:ask for|above the) ([\d,]+)/)?.[1].replaceAll(",", "")) || 0;
}

const FULL = "Nothing more fits: the model can read no more at once. Shorten a message, or begin a new conversation.";

/** What a message keeps of its request: all but the messages before it. */
export function kept({ method, path, body: { messages, prompt, ...body } }) {
  return { method, path, body };
}

/** The whole request again. */
export function whole(request, messages, system) {
  const { model, ...rest } = request.body;
  return { ...request, body: { model, ...conversationOf(messages, system, request.path === CHAT), ...rest } };
}

/** A seed is always sent: the same request can be made again with one thing changed. */
export const seedFor = (settings) => (Number.isInteger(settings.seed) ? settings.seed : Math.floor(Math.random() * 2 ** 31));

/**
 * Runs a request; `onChange(answer)` after each chunk. Returns the answer in the end, also if stopped or failed.
 * Where less fits than `request` asks for, `request` is changed to what fits. {content, reasoning, calls, trace, finish, usage, timing, error}.
 */
export async function answer(request, { signal, onChange = () => {}, onWait } = {}) {
  const result = { content: "", reasoning: "", calls: [], trace: newTrace(request.body.model), finish: "", usage: null, error: "" };
  try {
    for await (const chunk of stream(request.path, request.body, signal, onWait)) {
      if (chunk.usage) result.usage = { ...chunk.usage, ...chunk.finemoe };
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      result.content += choice.delta?.content ?? choice.text ?? "";
      result.reasoning += choice.delta?.reasoning_content ?? "";
      for (const call of choice.delta?.tool_calls ?? []) takeCall(result.calls, call);
      take(result.trace, choice);
      if (choice.finish_reason) result.finish = choice.finish_reason;
      onChange(result);
    }
  } catch (error) {
    if (error.name === "AbortError") result.finish = "stopped";
    else if (room(error) && room(error) < request.body.max_tokens) {
      request.body.max_tokens = room(error);
      return answer(request, { signal, onChange, onWait });
    } else result.error = error.code === "context_length_exceeded" && /^the prompt has/i.test(error.message) ? `${FULL} (The server: ${error.message}.)` : error.message;
  }
  mend(result.trace);
  onChange(result);
  return result;
}

function takeCall(calls, piece) {
  const call = (calls[piece.index ?? 0] ??= { name: "", arguments: "" });
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}
