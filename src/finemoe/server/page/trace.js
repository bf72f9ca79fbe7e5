// What is known of each token of an answer. Short names, because a trace is kept in the browser:
//   {model, layers: [1, 2], tokens: [{t: text, i: id, p: log-probability, e: [[ids] by layer], g: [[gates] by layer], s: [shared by layer]}],
//    a: [[[text, log-probability], ...] by token]}

export const newTrace = (model) => ({ model, layers: [], tokens: [], a: [] });

const UNKNOWN = "\ufffd";

const short = (number) => (typeof number === "number" ? Math.round(number * 10000) / 10000 : null);

function indexOf(trace, layer) {
  const at = trace.layers.indexOf(layer);
  if (at >= 0) return at;
  trace.layers.push(layer);
  return trace.layers.length - 1;
}

/** Takes in a choice of a chunk, in the shape of chat or of completions. */
export function take(trace, choice) {
  for (const token of choice.finemoe?.tokens ?? []) {
    const row = { t: token.token ?? "", i: token.id, p: short(token.logprob), e: [], g: [], s: [] };
    const layers = Object.keys(token.experts ?? {}).map(Number).sort((a, b) => a - b);
    for (const layer of layers) {
      const at = indexOf(trace, layer);
      row.e[at] = token.experts[layer];
      row.g[at] = (token.gates?.[layer] ?? []).map(short);
      if (token.shared?.[layer] !== undefined) row.s[at] = short(token.shared[layer]);
    }
    trace.tokens.push(row);
  }
  const known = choice.logprobs;
  if (Array.isArray(known?.content)) {
    for (const each of known.content) {
      if (each.token?.includes(UNKNOWN)) (trace.bytes ??= {})[trace.a.length] = each.bytes;
      trace.a.push((each.top_logprobs ?? []).map((other) => [other.token, short(other.logprob)]));
    }
  } else if (Array.isArray(known?.tokens)) {
    known.tokens.forEach((token, at) => {
      // OpenAI's spelling of half a character: bytes:\xe2\x80
      if (/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) (trace.bytes ??= {})[trace.a.length] = token.match(/[0-9a-f]{2}(?=\\|$)/g).map((hex) => Number.parseInt(hex, 16));
      const others = Object.entries(known.top_logprobs?.[at] ?? {});
      trace.a.push(others.map(([text, logprob]) => [text, short(logprob)]).sort((a, b) => b[1] - a[1]));
    });
  }
}

/**
 * Characters of several tokens: the first of them shows the whole character, the others nothing.
 */
export function mend(trace) {
  const { bytes = {}, tokens } = trace;
  delete trace.bytes;
  for (let at = 0; at < tokens.length; at += 1) {
    if (!bytes[at]) continue;
    const run = [];
    let end = at;
    while (bytes[end]) { run.push(...bytes[end]); end += 1; }
    const text = new TextDecoder().decode(new Uint8Array(run));
    if (!text.includes(UNKNOWN)) {
      tokens.slice(at, end).forEach((token, index) => { token.t = index ? "" : text; });
      trace.mended = true;
    }
    at = end;
  }
}

/** Of a trace from a file only what has the right shape. */
export function cleaned(data) {
  const numbers = (list) => (Array.isArray(list) ? list.map((each) => (Number.isFinite(each) ? each : 0)) : []);
  const layers = numbers(data.layers);
  const tokens = data.tokens.filter((token) => typeof token?.t === "string").map((token) => ({
    t: token.t, i: Number(token.i) || 0, p: Number.isFinite(token.p) ? token.p : null, s: numbers(token.s),
    e: layers.map((_, at) => numbers(token.e?.[at])), g: layers.map((_, at) => numbers(token.g?.[at])),
  }));
  const a = Array.isArray(data.a) ? data.a.map((list) => (Array.isArray(list) ? list : [])
    .filter((pair) => typeof pair?.[0] === "string" && Number.isFinite(pair[1])).map(([text, logprob]) => [text, logprob])) : [];
  return { model: typeof data.model === "string" ? data.model : "", layers, tokens, a };
}

/** An answer without a trace as words. */
export function wordsAsTrace(text) {
  return { layers: [], tokens: (text.match(/\s*\S+|\s+$/g) ?? []).map((t) => ({ t, p: null, e: [], g: [], s: [] })), a: [] };
}

/** How often each expert was chosen: {layers, counts: [Map(expert -> tokens)], tokens}. */
export function loadOf(traces) {
  const counts = new Map();
  let tokens = 0;
  for (const trace of traces) {
    tokens += trace.tokens.length;
    for (const token of trace.tokens) {
      trace.layers.forEach((layer, at) => {
        if (!token.e[at]) return;
        if (!counts.has(layer)) counts.set(layer, new Map());
        const row = counts.get(layer);
        for (const expert of token.e[at]) row.set(expert, (row.get(expert) ?? 0) + 1);
      });
    }
  }
  const layers = [...counts.keys()].sort((a, b) => a - b);
  return { layers, counts: layers.map((layer) => counts.get(layer)), tokens };
}

/**
 * Which tokens differ: two arrays of booleans, by a longest common subsequence of the tokens between the common
 * beginning and the common end.
 */
export function differences(left, right) {
  const marks = [new Array(left.length).fill(true), new Array(right.length).fill(true)];
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  let end = 0;
  while (end < left.length - start && end < right.length - start && left[left.length - 1 - end] === right[right.length - 1 - end]) end += 1;
  marks[0].fill(false, 0, start).fill(false, left.length - end);
  marks[1].fill(false, 0, start).fill(false, right.length - end);
  const rows = left.length - start - end;
  const columns = right.length - start - end;
  // 4 million cells are 8 MB and a moment; beyond that all of the middle counts as different.
  if (rows * columns > 4_000_000) return { marks, start };
  const width = columns + 1;
  const table = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      table[i * width + j] = left[start + i] === right[start + j] ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns;) {
    if (left[start + i] === right[start + j]) {
      marks[0][start + i] = false;
      marks[1][start + j] = false;
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return { marks, start };
}
