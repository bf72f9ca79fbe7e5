#include "attention.h"

#include <cmath>

namespace finemoe {
namespace {

constexpr int64_t kKeys = 256;  // of one block: packed, with their values, they stay in the second cache
constexpr int64_t kDirect = 16;  // up to this many rows, packing would cost more than it saves
constexpr int64_t kFew = 28;     // up to this many queries the keys, and sums over them, are cut: whatever the tile is
constexpr int64_t kMostRows = std::max<int64_t>(kRows, kDirect);
static_assert(kKeys <= kDepth && kKeys % kColumns == 0);

struct Task {
  int64_t batch, kv_head, from, to;  // queries from ... to - 1 of every head that shares the keys
  Span keys;                         // nothing beyond them
};

// Running maximum of the products, and sum of the weights, of one query.
struct Softmax {
  float top = -kNoLimit, sum = 0;

  // Scores from ... to - 1 become weights, the others of `width`, which is whole vectors, 0. Returns what the weights
  // of earlier keys shrink by.
  float take(float* scores, int64_t from, int64_t to, int64_t width, float scale) {
    if (from >= to) {
      std::fill(scores, scores + width, 0.0f);
      return 1.0f;
    }
    std::fill(scores, scores + from, -kNoLimit);
    std::fill(scores + to, scores + width, -kNoLimit);
    Vector high = load(scores);
    for (int64_t j = kLanes; j < width; j += kLanes) high = maximum(high, load(scores + j));
    const float before = top;
    for (int lane = 0; lane < kLanes; ++lane) top = std::max(top, high[lane]);
    const bool nothing = top == -kNoLimit;  // no number above minus infinity so far
    Vector added{};
    for (int64_t j = 0; j < width; j += kLanes) {
      const Vector score = load(scores + j);
      // The difference first: of large products it is exact, and of the largest it is 0.
      const Vector weight = nothing ? (score == score ? Vector{} : score) : weight_of((score - top) * scale);
      store(scores + j, weight);
      added += weight;
    }
    const float shrink = before == top ? 1.0f : std::exp((before - top) * scale);
    sum = sum * shrink + total(added);
    return shrink;
  }
};

void scale_row(float* row, int64_t width, float factor) {
  for (int64_t j = 0; j < width; ++j) row[j] *= factor;
}

// sums[i] lane by lane, all at once: lane i of the result is the total of sums[i].
template <int kStep = 1>
Vector totals(Vector* sums) {
  constexpr int kLeft = kLanes / kStep;  // vectors
  for (int i = 0; i < kLeft; i += 2) {
    Vector low = sums[i], high = sums[i + 1];
    swap_lanes<kStep>(low, high, std::make_integer_sequence<int, kLanes>{});
    sums[i / 2] = low + high;
  }
  if constexpr (kLeft > 2)
    return totals<2 * kStep>(sums);
  else
    return sums[0];
}

// scores[i][key] = queries[i] · keys[key], read straight from memory; up to kLanes - 1 more scores are overwritten.
template <class Lines>
void score_rows(const float* queries, int64_t query_stride, int64_t rows, const Lines& keys, int64_t count,
                int64_t width, float* scores) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const float* key[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) key[lane] = keys[std::min(first + lane, count - 1)];
    for (int64_t i = 0; i < rows; ++i) {
      const float* query = queries + i * query_stride;
      Vector sums[kLanes] = {};
      int64_t k = 0;
      for (; k + kLanes <= width; k += kLanes) {
        const Vector part = load(query + k);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += part * load(key[lane] + k);
      }
      if (k < width) {
        const Vector part = load_some(query + k, width - k);
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += part * load_some(key[lane] + k, width - k);
      }
      store(scores + i * kPanelStride + first, totals(sums));
    }
  }
}

// One block of keys, met by tiles of queries.
struct Block {
  const Attention& x;
  const Task& task;
  int64_t start, count;  // keys start ... start + count - 1
  bool direct;           // not packed
  Across keys;
  Along values;

  void pack() {
    if (direct) return;
    const Rows key = x.key.rows(task.batch, task.kv_head, start);
    x.key.index ? keys.pack(PackTransposedRows{key}, count) : keys.pack(key.base, key.stride, count);
    values.pack(x.value.rows(task.batch, task.kv_head, start), count);
  }

  // Keys of this block that queries with this span see, counted from the block's start.
  Span within(Span seen) const {
    return {std::max(seen.first - start, int64_t{0}), std::min(seen.last - start, count)};
  }

  // What queries from ... from + rows - 1 of a head take from here. `begun`: their output holds earlier keys.
  bool meet(int64_t head, int64_t from, int64_t rows, Softmax* state, bool begun) const {
    const Span seen = within(x.hull(task.batch, from, from + rows));
    if (seen.empty()) return begun;
    alignas(64) float scores[kMostRows * kPanelStride];
    const int64_t left = seen.first / kColumns * kColumns, right = whole_panels(seen.last);
    const float* query = x.query.at(task.batch, head, from);
    float* out = x.output.at(task.batch, head, from);
    if (direct)
      score_directly(query, rows, {left, seen.last}, scores + left);
    else
      keys.multiply(query, x.query.row_stride, rows, left, right, scores);
    for (int64_t r = 0; r < rows; ++r) {
      const Span own = within(x.span(task.batch, from + r));
      const float shrink =
          state[r].take(scores + r * kPanelStride + left, own.first - left, own.last - left, right - left, x.scale);
      if (begun && shrink != 1.0f) scale_row(out + r * x.output.row_stride, x.value_width, shrink);
    }
    if (direct)
      mix_directly(scores + seen.first, rows, seen, out, begun);
    else
      values.multiply<false>(scores + seen.first, rows, seen.first, seen.last, out, x.output.row_stride, begun);
    return true;
  }

  void score_directly(const float* query, int64_t rows, Span seen, float* scores) const {
    const auto score = [&](const auto& lines) {
      score_rows(query, x.query.row_stride, rows, lines, seen.last - seen.first, x.width, scores);
    };
    const int64_t from = start + seen.first;
    x.key.index ? score(x.key.rows(task.batch, task.kv_head, from))
                : score(x.key.strided(task.batch, task.kv_head, from));
  }

  void mix_directly(const float* weights, int64_t rows, Span seen, float* output, bool add) const {
    float* out[kDirect];
    for (int64_t r = 0; r < rows; ++r) out[r] = output + r * x.output.row_stride;
    const auto mix = [&](const auto& lines) {
      mix_rows(weights, kPanelStride, rows, lines, seen.last - seen.first, x.value_width, out, add);
    };
    const int64_t from = start + seen.first;
    x.value.index ? mix(x.value.rows(task.batch, task.kv_head, from))
                  : mix(x.value.strided(task.batch, task.kv_head, from));
  }
};

// What a query gets that sees nothing: 0. Where it sees keys, all of them at minus infinity, the softmax is of 0 / 0.
float nothing_seen(bool sees_keys) { return sees_keys ? std::numeric_limits<float>::quiet_NaN() : 0.0f; }

void finish(const Attention& x, const Task& task, int64_t head, int64_t i, const Softmax& state) {
  float* out = x.output.at(task.batch, head, i);
  const Span seen = x.span(task.batch, i);
  float log_sum = std::log(state.sum);
  if (state.sum == 0) {
    log_sum = nothing_seen(!seen.empty() && task.keys.first <= seen.first && seen.last <= task.keys.last);
    std::fill(out, out + x.value_width, log_sum);
  } else {
    scale_row(out, x.value_width, 1.0f / state.sum);
  }
  if (!x.top) return;
  const int64_t row = (task.batch * x.heads + head) * x.queries + i;
  x.top[row] = state.top, x.log_sum[row] = log_sum;
}

void run(const Attention& x, const Task& task, bool direct) {
  const int64_t length = task.to - task.from, group = x.group();
  const Span seen = x.hull(task.batch, task.from, task.to);
  const int64_t height = direct ? kDirect : kRows, tiles = (length + height - 1) / height;
  float* space = direct ? nullptr : workspace<0>(Across::size(x.width, kKeys) + Along::size(kKeys, x.value_width));
  std::vector<Softmax> states(group * length);
  std::vector<char> begun(group * tiles);
  const int64_t first = std::max(seen.first, task.keys.first) / kKeys * kKeys;
  const int64_t last = std::min(seen.last, task.keys.last);
  for (int64_t start = first; start < last; start += kKeys) {
    Block block{x, task, start, std::min(kKeys, last - start), direct, {space, x.width},
                {space + Across::size(x.width, kKeys), x.value_width}};
    block.pack();
    for (int64_t member = 0; member < group; ++member)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t from = tile * height, rows = std::min(height, length - from);
        char& old = begun[member * tiles + tile];
        old = block.meet(task.kv_head * group + member, task.from + from, rows, &states[member * length + from], old);
      }
  }
  for (int64_t member = 0; member < group; ++member)
    for (int64_t i = 0; i < length; ++i)
      finish(x, task, task.kv_head * group + member, task.from + i, states[member * length + i]);
}

// Chunks of queries, long ones where that leaves enough for all threads; the last, which see most, come first.
std::vector<Task> cut(const Attention& x) {
  const int64_t pairs = std::max<int64_t>(x.batch * x.kv_heads, 1), wanted = 4 * at::get_num_threads() / pairs + 1;
  const int64_t most = std::max<int64_t>(36 / x.group(), 4);  // tiles: their output and queries stay near
  const int64_t chunk = std::clamp<int64_t>(x.queries / (wanted * kRows), 4, most) * kRows;
  std::vector<Task> tasks;
  for (int64_t from = (x.queries - 1) / chunk * chunk; from >= 0; from -= chunk)
    for (int64_t b = 0; b < x.batch; ++b)
      for (int64_t h = 0; h < x.kv_heads; ++h)
        tasks.push_back({b, h, from, std::min(from + chunk, x.queries), {0, x.keys}});
  return tasks;
}

// One query a row: heads that share their keys become queries of one head.
struct Folded {
  Attention x;
  std::vector<int64_t> first, last;

  explicit Folded(const Attention& from) : x(from) {
    const int64_t group = from.group();
    for (int64_t b = 0; b < x.batch; ++b) {
      const Span seen = x.span(b, 0);
      first.insert(first.end(), group, seen.first);
      last.insert(last.end(), group, seen.last);
    }
    x.heads = x.kv_heads;
    x.queries = group;
    for (Heads* states : {&x.query, &x.output}) {
      states->row_stride = states->head_stride;
      states->head_stride *= group;
    }
    x.first = first.data();
    x.last = last.data();
  }
};

// Few rows over many keys: the keys are cut into parts, each with an output of its own, which are then weighed.
void forward_in_parts(const Attention& x, int64_t parts, bool direct) {
  const int64_t rows = x.batch * x.heads * x.queries;
  float* space = workspace<1>(parts * rows * (x.value_width + 2));
  const int64_t length = (x.keys + parts * kKeys - 1) / (parts * kKeys) * kKeys;
  const int64_t pairs = x.batch * x.kv_heads;
  share_tasks(parts * pairs, [&](int64_t task) {
    const int64_t part = task / pairs, pair = task % pairs;
    Attention own = x;
    own.output = {space + part * rows * x.value_width, x.heads * x.queries * x.value_width, x.queries * x.value_width,
                  x.value_width};
    own.top = space + parts * rows * x.value_width + part * rows;
    own.log_sum = own.top + parts * rows;
    run(own, {pair / x.kv_heads, pair % x.kv_heads, 0, x.queries, {part * length, (part + 1) * length}}, direct);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const float *tops = space + parts * rows * x.value_width + row, *log_sums = tops + parts * rows;
    float top = -kNoLimit, all = 0;
    for (int64_t part = 0; part < parts; ++part) top = std::max(top, tops[part * rows]);
    float* out = x.output.at(row / x.queries / x.heads, row / x.queries % x.heads, row % x.queries);
    std::fill(out, out + x.value_width, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      const float own = tops[part * rows], log_sum = log_sums[part * rows];  // the latter NaN where a weight was
      const float weight = own == -kNoLimit ? (log_sum == log_sum ? 0.0f : log_sum)
                                            : std::exp((own - top) * x.scale + log_sum);
      if (weight == 0) continue;
      const float* from = space + (part * rows + row) * x.value_width;
      for (int64_t j = 0; j < x.value_width; ++j) out[j] += weight * from[j];
      all += weight;
    }
    float log_sum = std::log(all);
    if (all == 0) {
      log_sum = nothing_seen(!x.span(row / x.queries / x.heads, row % x.queries).empty());
      std::fill(out, out + x.value_width, log_sum);
    } else {
      scale_row(out, x.value_width, 1.0f / all);
    }
    if (x.top) x.top[row] = top, x.log_sum[row] = log_sum;
  }
}

void forward(const Attention& x, bool direct) {
  if (x.batch * x.heads * x.queries == 0) return;
  if (x.queries == 1 && x.group() > 1) return forward(Folded(x).x, direct);
  const int64_t pairs = x.batch * x.kv_heads;
  if (x.queries <= kFew && pairs < 4 && x.keys > kKeys)
    return forward_in_parts(x, std::min<int64_t>(8, (x.keys + kKeys - 1) / kKeys), direct);
  const std::vector<Task> tasks = cut(x);
  share_tasks(tasks.size(), [&](int64_t task) { run(x, tasks[task], direct); });
}

}  // namespace

// By all rows of a head of keys, not those of a chunk: chunks depend on the number of threads.
bool reads_directly(const Attention& x) { return x.group() * x.queries <= kDirect; }

void attention_forward(const Attention& x) { forward(x, reads_directly(x)); }

void attention_forward_packed(const Attention& x) { forward(x, false); }

}  // namespace finemoe
