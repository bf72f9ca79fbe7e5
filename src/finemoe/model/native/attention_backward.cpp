#include "attention.h"

namespace finemoe {
namespace {

constexpr int64_t kKeys = 128 / kRows * kRows;  // of one block
#if defined(__AVX512F__)
static_assert(kKeys == 126);  // whatever the tile, since sums over keys are cut there
#endif
constexpr int64_t kTrips = 400 * 1024 / 4;      // most numbers of the four packed copies of a block of queries

// Queries in one block: as many whatever the tile is, since sums over queries are cut there.
int64_t block_size(const Attention& x) {
  constexpr int64_t kWhole = std::max(kColumns, 4 * kLanes);
  const int64_t fitting = kTrips / (2 * (x.width + x.value_width)) / kWhole * kWhole;
  return std::clamp<int64_t>(fitting, kWhole, kDepth);
}

// a b + c, rounded as in the products: once, where the machine can.
inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// What the keys meet of kColumns queries.
struct Panel {
  Span hull;   // keys that any of them sees
  Span solid;  // keys that all of them see
};

// A block of queries of one head, packed both ways, and what flows back to their output.
struct Queries {
  const Attention& x;
  int64_t b, head, start, count;
  Across across, flow_across;
  Along along, flow_along;
  float *top, *log_sum, *delta;
  int32_t *first, *last;
  Panel panels[kDepth / kColumns];

  Queries(const Attention& attention, float* space, int64_t size)
      : x(attention), across{space, x.width}, flow_across{(space += Across::size(x.width, size)), x.value_width},
        along{(space += Across::size(x.value_width, size)), x.width},
        flow_along{(space += Along::size(size, x.width)), x.value_width},
        top(space += Along::size(size, x.value_width)), log_sum(space += size), delta(space += size),
        first(reinterpret_cast<int32_t*>(space += size)), last(reinterpret_cast<int32_t*>(space += size)) {}

  static int64_t numbers(const Attention& x, int64_t size) {
    return 2 * Across::size(x.width + x.value_width, size) + 2 * size * kColumns + 5 * size;
  }

  void take(const AttentionGradients& grad, int64_t batch, int64_t of, int64_t from, int64_t length) {
    b = batch, head = of, start = from, count = length;
    const float* query = x.query.at(b, head, start);
    const float* flow = grad.output.at(b, head, start);
    across.pack(query, x.query.row_stride, count);
    along.pack(query, x.query.row_stride, count);
    flow_across.pack(flow, grad.output.row_stride, count);
    flow_along.pack(flow, grad.output.row_stride, count);
    for (int64_t p = 0; p < count; p += kColumns) panels[p / kColumns] = {{x.keys, 0}, {0, x.keys}};
    for (int64_t i = 0; i < whole_panels(count); ++i) {
      const Span seen = i < count ? x.span(b, start + i) : Span{0, 0};
      first[i] = seen.first, last[i] = seen.last;
      const int64_t row = (b * x.heads + head) * x.queries + start + i;
      top[i] = i < count ? x.top[row] : 0.0f;
      log_sum[i] = i < count ? x.log_sum[row] : 0.0f;
      delta[i] = i < count ? dot(flow + i * grad.output.row_stride, x.output.at(b, head, start + i)) : 0.0f;
      Panel& panel = panels[i / kColumns];
      panel.solid = {std::max(panel.solid.first, seen.first), std::min(panel.solid.last, seen.last)};
      if (!seen.empty()) panel.hull = {std::min(panel.hull.first, seen.first), std::max(panel.hull.last, seen.last)};
    }
  }

  // Added in the order of `Across::multiply`: where one key has all the weight, this is to the bit what flows to that
  // weight, and their difference, which keys of any size are multiplied by, is 0.
  float dot(const float* a, const float* c) const {
    float all = 0;
    for (int64_t k = 0; k < x.value_width; k += kDepth) {
      float piece = 0;
      for (int64_t j = k; j < std::min(k + kDepth, x.value_width); ++j) piece = multiply_add(a[j], c[j], piece);
      all = k ? all + piece : piece;
    }
    return all;
  }

  // Columns of the panels that see any of these keys; a panel between them may not.
  Span columns(Span keys) const {
    Span found{count, 0};
    for (int64_t p = 0; p < count; p += kColumns) {
      const Span& hull = panels[p / kColumns].hull;
      if (std::max(hull.first, keys.first) < std::min(hull.last, keys.last))
        found = {std::min(found.first, p), p + kColumns};
    }
    return found;
  }

  // For one key: scores become weights, and what flows to the weights becomes what flows to the products q k.
  void weigh(int64_t key, Span columns, float* scores, float* flows) const {
    for (int64_t p = columns.first; p < columns.last; p += kColumns) {
      const Span& solid = panels[p / kColumns].solid;
      const bool all = solid.first <= key && key < solid.last;
      for (int64_t j = p; j < p + kColumns; j += kLanes) {
        Vector weight = weight_of((load(scores + j) - load(top + j)) * x.scale - load(log_sum + j));
        Vector flow = weight * (load(flows + j) - load(delta + j)) * x.scale;
        if (!all) {
          IntVector from, to;
          std::memcpy(&from, first + j, sizeof from);
          std::memcpy(&to, last + j, sizeof to);
          const int32_t k = static_cast<int32_t>(key);
          weight = from <= k ? weight : Vector{};
          weight = to > k ? weight : Vector{};
          flow = from <= k ? flow : Vector{};  // 0 times what is not finite would not be 0
          flow = to > k ? flow : Vector{};
        }
        store(scores + j, weight);
        store(flows + j, flow);
      }
    }
  }
};

// Gradients of one head of keys and values, from the queries that one part of the work has.
struct Part {
  const Attention& x;
  const AttentionGradients& grad;
  int64_t b, kv_head;
  Queries& queries;
  float *scores, *flows;  // rows of kPanelStride: of one tile of keys, and of one block
  Along keys;

  // Queries' block against keys start ... start + count - 1.
  void meet(int64_t start, int64_t count) {
    keys.pack(x.key.at(b, kv_head, start), x.key.row_stride, count);
    for (int64_t k = 0; k < count; k += kRows)
      tile(start + k, std::min<int64_t>(kRows, count - k), flows + k * kPanelStride);
    for (int64_t i = 0; i < queries.count; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, queries.count - i), from = queries.start + i;
      const Span hull = x.hull(b, from, from + rows);
      const Span seen{std::max(hull.first - start, int64_t{0}), std::min(hull.last - start, count)};
      if (seen.empty()) continue;
      float* a = scratch().a;
      const Rows flow{flows + seen.first * kPanelStride, kPanelStride};
      PackColumns{flow, kPanelStride}(i, rows, 0, seen.last - seen.first, a);
      keys.multiply<true>(a, rows, seen.first, seen.last, grad.query.at(b, queries.head, from), grad.query.row_stride,
                          true);
    }
  }

  void tile(int64_t key, int64_t rows, float* flow) {
    const Span columns = queries.columns({key, key + rows});
    const int64_t width = whole_panels(queries.count);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = flow + r * kPanelStride;
      std::fill(row, row + std::min(columns.first, width), 0.0f);
      std::fill(row + std::max(columns.last, int64_t{0}), row + width, 0.0f);
    }
    if (columns.empty()) return;
    queries.across.multiply(x.key.at(b, kv_head, key), x.key.row_stride, rows, columns.first, columns.last, scores);
    queries.flow_across.multiply(x.value.at(b, kv_head, key), x.value.row_stride, rows, columns.first, columns.last,
                                 flow);
    for (int64_t r = 0; r < rows; ++r)
      queries.weigh(key + r, columns, scores + r * kPanelStride, flow + r * kPanelStride);
    const int64_t to = std::min(columns.last, queries.count);
    queries.along.multiply<false>(flow + columns.first, rows, columns.first, to, grad.key.at(b, kv_head, key),
                                  grad.key.row_stride, true);
    queries.flow_along.multiply<false>(scores + columns.first, rows, columns.first, to, grad.value.at(b, kv_head, key),
                                       grad.value.row_stride, true);
  }
};

void clear(const Heads& states, int64_t b, int64_t head, int64_t from, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::fill_n(states.at(b, head, from + i), width, 0.0f);
}

// Every `parts`-th block of queries of the heads that share one head of keys.
void run(const Attention& x, const AttentionGradients& grad, int64_t b, int64_t kv_head, int64_t part, int64_t parts) {
  const int64_t size = block_size(x), blocks = (x.queries + size - 1) / size;
  float* space = workspace<0>(Queries::numbers(x, size) + (kKeys + kRows) * kPanelStride + Along::size(kKeys, x.width));
  float* scores = space;
  float* flows = scores + kRows * kPanelStride;
  float* keys = flows + kKeys * kPanelStride;
  Queries queries(x, keys + Along::size(kKeys, x.width), size);
  Part work{x, grad, b, kv_head, queries, scores, flows, {keys, x.width}};
  clear(grad.key, b, kv_head, 0, x.keys, x.width);
  clear(grad.value, b, kv_head, 0, x.keys, x.value_width);
  for (int64_t item = part; item < blocks * x.group(); item += parts) {
    const int64_t head = kv_head * x.group() + item / blocks, from = item % blocks * size;
    const int64_t length = std::min(size, x.queries - from);
    queries.take(grad, b, head, from, length);
    const Span seen = x.hull(b, from, from + length);
    clear(grad.query, b, head, from, length, x.width);
    for (int64_t start = seen.first; start < seen.last; start += kKeys)
      work.meet(start, std::min(kKeys, seen.last - start));
  }
}

// [batch, kv_heads, keys, width] of every part but the first, whose numbers are the result's own.
Heads piled(const Attention& x, float* base, int64_t width) {
  return {base, x.kv_heads * x.keys * width, x.keys * width, width};
}

void add_up(const Attention& x, const Heads& sum, const float* pile, int64_t parts, int64_t width) {
  const int64_t rows = x.batch * x.kv_heads * x.keys;
  share_range(rows, 256, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      float* out = sum.at(row / x.keys / x.kv_heads, row / x.keys % x.kv_heads, row % x.keys);
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t j = 0; j < width; ++j) out[j] += pile[(part * rows + row) * width + j];
    }
  });
}

// Few rows were added up in another order than the products here: where these are large, weights would not sum to 1. So
// the forward pass is computed again, in this order; for few rows that costs little.
struct Again {
  Attention x;
  std::unique_ptr<float[]> numbers;

  explicit Again(const Attention& given) : x(given) {
    if (!reads_directly(x)) return;
    const int64_t rows = x.batch * x.heads * x.queries, width = x.value_width;
    numbers.reset(new float[rows * (width + 2)]);
    x.top = numbers.get(), x.log_sum = x.top + rows;
    x.output = {x.log_sum + rows, x.heads * x.queries * width, x.queries * width, width};
    attention_forward_packed(x);
  }
};

}  // namespace

// Every task has a head of keys for itself. Where there are few, queries are dealt out to several parts, each with
// gradients of its own, added up in order: the result does not depend on the number of threads.
void attention_backward(const Attention& given, const AttentionGradients& grad) {
  const Again again(given);
  const Attention& x = again.x;
  const int64_t pairs = x.batch * x.kv_heads;
  if (pairs == 0) return;
  const int64_t items = (x.queries + block_size(x) - 1) / block_size(x) * x.group();
  const int64_t parts = std::clamp<int64_t>(16 / pairs, 1, std::max<int64_t>(items, 1));
  const int64_t numbers = pairs * x.keys, others = parts - 1;
  const std::unique_ptr<float[]> piles(new float[others * numbers * (x.width + x.value_width)]);
  float *pile = piles.get(), *value_pile = pile + others * numbers * x.width;
  share_tasks(parts * pairs, [&](int64_t task) {
    const int64_t part = task / pairs, pair = task % pairs;
    AttentionGradients own = grad;
    if (part) {
      own.key = piled(x, pile + (part - 1) * numbers * x.width, x.width);
      own.value = piled(x, value_pile + (part - 1) * numbers * x.value_width, x.value_width);
    }
    run(x, own, pair / x.kv_heads, pair % x.kv_heads, part, parts);
  });
  if (!others) return;
  add_up(x, grad.key, pile, others, x.width);
  add_up(x, grad.value, value_pile, others, x.value_width);
}

}  // namespace finemoe
