// All that goes over the wire, and the same as curl. The key lives in sessionStorage and in no log.

const KEY = "finemoe.key";
const made = []; // the last requests, newest first: {method, path, body, status}
let askForKey = async () => null;

export const requests = () => made;
export function onKeyWanted(callback) { askForKey = callback; }

export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

function key() {
  try { return sessionStorage.getItem(KEY); } catch { return null; }
}

async function failure(response) {
  let error = null;
  try { error = (await response.json()).error; } catch { /* not ours: a proxy, perhaps */ }
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(error?.message ?? `The server answered ${response.status}.`,
    { status: response.status, param: error?.param ?? null, code: error?.code ?? null, retryAfter: Number.isFinite(after) ? after : null });
}

async function request(method, path, body, signal) {
  const entry = { method, path, body, status: "sent" };
  made.unshift(entry);
  made.length = Math.min(made.length, 40);
  for (;;) {
    const headers = {};
    if (body) headers["Content-Type"] = "application/json";
    const sent = key();
    if (sent) headers.Authorization = `Bearer ${sent}`;
    let response;
    try {
      response = await fetch(path, { method, headers, body: body ? JSON.stringify(body) : undefined, signal });
    } catch (error) {
      entry.status = error.name === "AbortError" ? "stopped" : "no answer";
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it still running?");
    }
    entry.status = response.status;
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (key() !== sent) continue; // another request has got one meanwhile
    const given = await askForKey(Boolean(sent));
    if (!given) throw await failure(response);
    try { sessionStorage.setItem(KEY, given); } catch { throw new ApiError("The browser keeps no key for this page."); }
  }
}

export async function models() {
  return (await (await request("GET", "v1/models")).json()).data;
}

/** {layer: {expert: card}}, or null where no analysis of the model exists. */
export async function expertCards(id) {
  try {
    return (await (await request("GET", `v1/models/${encodeURIComponent(id)}/experts`)).json()).experts;
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); }, { once: true });
  });
}

/** The chunks of a streamed answer. A full server is asked again; `onWait(seconds)` is told. */
export async function* stream(path, body, signal, onWait = () => {}) {
  let response;
  for (let attempt = 0; ; attempt += 1) {
    try {
      response = await request("POST", path, body, signal);
      break;
    } catch (error) {
      if (![429, 503].includes(error.status) || error.retryAfter === null || error.retryAfter > 60 || attempt >= 3) throw error;
      onWait(error.retryAfter);
      await pause(error.retryAfter, signal);
    }
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let ended = false;
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke in the middle of the answer.");
      }
      if (piece.done) break;
      buffer += piece.value;
      // An event ends at an empty line; the last piece may be half an event.
      const events = buffer.split(/\r?\n\r?\n/);
      buffer = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (!data) continue;
        if (data === "[DONE]") { ended = true; continue; }
        let chunk;
        try { chunk = JSON.parse(data); } catch { throw new ApiError("The server sent a chunk that is not JSON."); }
        if (chunk.error) throw new ApiError(chunk.error.message ?? "The server broke the answer off.");
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new ApiError("The answer ended without its end mark; a part may be missing.");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as a command; the key is a variable in it. */
export function curl({ method, path, body }) {
  const address = new URL(path, document.baseURI).href;
  const lines = [`curl ${body?.stream ? "-N " : ""}${quoted(address)}`];
  if (method !== "GET" && !body) lines[0] += ` -X ${method}`;
  if (key()) lines.push(`  -H "Authorization: Bearer $FINEMOE_API_KEY"`);
  if (body) {
    lines.push("  -H 'Content-Type: application/json'");
    lines.push(`  -d ${quoted(JSON.stringify(body, null, 1))}`);
  }
  return lines.join(" \\\n");
}
