// From a conversation and the settings to a request, and from the stream to an answer.

import { stream } from "./api.js";
import { mend, newTrace, take } from "./trace.js";

export const CHAT = "v1/chat/completions";
export const TEXT = "v1/completions";

/** {disabled, forced, active, shared} without what says nothing; undefined if nothing is left. */
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

function conversationOf(nodes, system, chat) {
  // A model without a template continues text: everything so far, as it stands.
  if (!chat) return { prompt: nodes.map(({ content }) => content).join("") };
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of nodes) {
    if (content) messages.push({ role, content });
    // Nothing came of the message before (it was refused, say): two messages of a user in a row are an error to many templates.
    else if (role === "assistant" && messages.at(-1)?.role === "user") messages.pop();
  }
  return { messages };
}

/** The request for the answer to `messages`; {path, body}. Settings that are empty are left to the server. */
export function requestFor({ model, messages, system, settings, experts, routing, seed }) {
  const facts = model.finemoe ?? {};
  const chat = facts.chat !== false;
  const body = { model: model.id, ...conversationOf(messages, system, chat), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty"]) {
    if (typeof settings[name] === "number") body[name] = settings[name];
  }
  // The completions of OpenAI end after 16 tokens unless told otherwise, which is no length to look at.
  if (!chat && body.max_tokens === undefined) body.max_tokens = Math.max(16, Math.min(128, (facts.context ?? 256) - tokensOf(messages, model.id)));
  if (settings.stop?.length) body.stop = settings.stop;
  body.seed = seed;
  if (routing && settings.alternatives > 0) {
    if (chat) Object.assign(body, { logprobs: true, top_logprobs: settings.alternatives });
    else body.logprobs = settings.alternatives;
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

/** About how many tokens messages have, rather too many than too few: what the last usage says, and the text since. */
function tokensOf(messages, model) {
  const last = messages.findLastIndex((message) => message.usage && message.model === model);
  const known = last < 0 ? 0 : messages[last].usage.prompt_tokens + messages[last].usage.completion_tokens;
  const text = messages.slice(last + 1).reduce((sum, message) => sum + message.content.length, 0);
  // Text is not always cut again as it was written.
  return Math.ceil(known * 1.1 + text / 1.5) + 8;
}

/** What a message keeps of its request: all but the conversation, which stands in the messages before it. */
export function kept({ method, path, body: { messages, prompt, ...body } }) {
  return { method, path, body };
}

/** The whole request again. */
export function whole(request, messages, system) {
  const { model, ...rest } = request.body;
  return { ...request, body: { model, ...conversationOf(messages, system, request.path === CHAT), ...rest } };
}

/** A seed is always sent, so that the same request can be made again with one thing changed. */
export const seedFor = (settings) => (Number.isInteger(settings.seed) ? settings.seed : Math.floor(Math.random() * 2 ** 31));

/**
 * Runs a request; `onChange(answer)` after each chunk. Returns the answer in the end, also of a request that was stopped
 * or failed: {content, reasoning, calls, trace, finish, usage, timing, error}.
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
    else result.error = error.message;
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
