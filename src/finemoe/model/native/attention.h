// softmax(scale · q kᵀ) v over spans of keys, and its gradient, without ever holding all scores (Dao et al., 2022).
#pragma once

#include <bit>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "swiglu.h"

namespace finemoe {

// A tensor [batch, heads, rows, width] of which only the width must be contiguous. With an index, the rows of all
// sequences lie in one store, and row r of sequence b is number index[b][r] of it.
struct Heads {
  float* base;
  int64_t batch_stride, head_stride, row_stride;
  const int64_t* index = nullptr;
  int64_t index_stride = 0;
  float* at(int64_t b, int64_t head, int64_t row) const {
    if (index) return base + head * head_stride + index[b * index_stride + row] * row_stride;
    return base + b * batch_stride + head * head_stride + row * row_stride;
  }
  // Those from `row` on, to be read one by one.
  Rows rows(int64_t b, int64_t head, int64_t row) const {
    if (index) return {base + head * head_stride, row_stride, index + b * index_stride + row};
    return {at(b, head, row), row_stride};
  }
  // Where no index scatters them.
  Strided strided(int64_t b, int64_t head, int64_t row) const { return {at(b, head, row), row_stride}; }
};

struct Span {
  int64_t first, last;  // keys first ... last - 1
  bool empty() const { return first >= last; }
};

struct Attention {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  Heads query, key, value, output;
  // [batch, heads, queries]: the largest product, and the logarithm of the sum of weights relative to it. Apart, as
  // their sum would lose the logarithm where products are large. Null: not wanted.
  float *top, *log_sum;
  const int64_t *first, *last;  // [batch, queries]: what a query sees; null: from key 0, up to the query's own place
  float scale;

  int64_t group() const { return heads / kv_heads; }
  Span span(int64_t b, int64_t i) const {
    const int64_t to = std::clamp<int64_t>(last ? last[b * queries + i] : i + 1, 0, keys);
    return {first ? std::clamp<int64_t>(first[b * queries + i], 0, to) : 0, to};
  }
  // From the first key that any of these queries sees to the last.
  Span hull(int64_t b, int64_t from, int64_t to) const {
    Span all{keys, 0};
    for (int64_t i = from; i < to; ++i) {
      const Span one = span(b, i);
      if (!one.empty()) all = {std::min(all.first, one.first), std::max(all.last, one.last)};
    }
    return all;
  }
};

void attention_forward(const Attention& x);

// With every product added in the order in which the gradient adds it, however few rows there are.
void attention_forward_packed(const Attention& x);

// Whether the forward pass reads so few rows of queries straight from memory, and adds in another order.
bool reads_directly(const Attention& x);

struct AttentionGradients {
  Heads output;  // what flows in
  Heads query, key, value;
};

void attention_backward(const Attention& x, const AttentionGradients& grad);

// ---- right-hand sides of products, packed once for many tiles of rows -----------------------------------------------

inline int64_t whole_panels(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

// Numbers of one thread that keep their memory from call to call: fresh pages would cost more than a tile's products.
template <int kPurpose>
float* workspace(int64_t count) {
  static thread_local std::vector<float> mine;
  if (static_cast<int64_t>(mine.size()) < count) mine.resize(count);
  return mine.data();
}

// B[k][j] = rows[j][k], in pieces of at most kDepth.
struct Across {
  float* panels;
  int64_t depth, columns = 0;

  static int64_t size(int64_t depth, int64_t columns) { return depth * whole_panels(columns); }

  template <class Pack>
  void pack(const Pack& packed, int64_t count) {
    columns = whole_panels(count);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t piece = std::min(kDepth, depth - k);
      for (int64_t j = 0; j < count; j += kColumns)
        packed(k, piece, j, std::min<int64_t>(kColumns, count - j), panels + k * columns + j * piece);
    }
  }

  void pack(const float* rows, int64_t stride, int64_t count) { pack(PackTransposed{rows, stride}, count); }

  // c[i][j] = sum over k of rows[i][k] B[k][j], for at most kRows rows and the panels of columns from ... to - 1; rows
  // of c lie kPanelStride apart.
  void multiply(const float* rows, int64_t stride, int64_t count, int64_t from, int64_t to, float* c) const {
    float* a = scratch().a;
    const MicroKernel kernel = pick_micro_kernel<false>(count, kColumns);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t piece = std::min(kDepth, depth - k);
      PackRows{{rows, stride}}(0, count, k, piece, a);
      for (int64_t j = from; j < to; j += kColumns)
        kernel(piece, a, panels + k * columns + j * piece, c + j, kPanelStride, k > 0);
    }
  }
};

// B[k][j] = rows[k][j].
struct Along {
  float* panels;
  int64_t width, depth = 0;

  static int64_t size(int64_t depth, int64_t width) { return depth * whole_panels(width); }

  void pack(const float* rows, int64_t stride, int64_t count) { pack(Rows{rows, stride}, count); }

  void pack(const Rows& rows, int64_t count) {
    depth = count;
    for (int64_t j = 0; j < width; j += kColumns)
      PackStraight{rows}(0, depth, j, std::min<int64_t>(kColumns, width - j), panels + j * depth);
  }

  // c[i] becomes (or, with `add`, grows by) the sum over k in from ... to - 1 of a[i][k] B[k], at most kRows rows; `a`
  // starts at k = from.
  template <bool kDepthMajor>
  void multiply(const float* a, int64_t count, int64_t from, int64_t to, float* c, int64_t stride, bool add) const {
    for (int64_t j = 0; j < width; j += kColumns) {
      const int64_t columns = std::min<int64_t>(kColumns, width - j);
      const MicroKernel kernel = pick_micro_kernel<kDepthMajor>(count, columns);
      const float* panel = panels + j * depth + from * kColumns;
      if (columns == kColumns || columns == kColumns / 2) {
        kernel(to - from, a, panel, c + j, stride, add);
        continue;
      }
      float* tile = scratch().tile;
      kernel(to - from, a, panel, tile, kColumns, false);
      for (int64_t i = 0; i < count; ++i) put(tile + i * kColumns, columns, c + i * stride + j, add);
    }
  }
};

// out[i] becomes (or grows by) the sum over k of weights[i][k] rows[k], rows read straight from memory, kTogether
// vectors of each at once; the weights of two i lie `apart`. Returns the column that is next.
template <int kCount, int kTogether, class Lines>
int64_t mix_columns(int64_t j, const float* weights, int64_t apart, const Lines& rows, int64_t count, int64_t width,
                    float* const* out, bool add) {
  for (; j + kTogether * kLanes <= width; j += kTogether * kLanes) {
    Vector sum[kCount][kTogether];
    for (int i = 0; i < kCount; ++i)
      for (int v = 0; v < kTogether; ++v) sum[i][v] = add ? load(out[i] + j + v * kLanes) : Vector{};
    for (int64_t k = 0; k < count; ++k) {
      const float* row = rows[k] + j;
#pragma GCC unroll 16
      for (int v = 0; v < kTogether; ++v) {
        const Vector part = load(row + v * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) sum[i][v] += weights[i * apart + k] * part;
      }
    }
    for (int i = 0; i < kCount; ++i)
      for (int v = 0; v < kTogether; ++v) store(out[i] + j + v * kLanes, sum[i][v]);
  }
  if constexpr (kTogether > 1)
    return mix_columns<kCount, kTogether / 2>(j, weights, apart, rows, count, width, out, add);
  return j;
}

template <int kCount, class Lines>
void mix(const float* weights, int64_t apart, const Lines& rows, int64_t count, int64_t width, float* const* out,
         bool add) {
  constexpr int kMost = std::bit_floor(static_cast<unsigned>(kRows * kVectors / kCount));  // sums fill the registers
  const int64_t j = mix_columns<kCount, kMost>(0, weights, apart, rows, count, width, out, add);
  if (j == width) return;
  for (int i = 0; i < kCount; ++i) {
    if (!add) std::fill(out[i] + j, out[i] + width, 0.0f);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t q = j; q < width; ++q) out[i][q] += weights[i * apart + k] * rows[k][q];
  }
}

template <class Lines>
void mix_rows(const float* weights, int64_t apart, int64_t outputs, const Lines& rows, int64_t count, int64_t width,
              float* const* out, bool add) {
  for (int64_t i = 0; i < outputs; i += 4, weights += 4 * apart) switch (std::min<int64_t>(4, outputs - i)) {
      case 1: mix<1>(weights, apart, rows, count, width, out + i, add); break;
      case 2: mix<2>(weights, apart, rows, count, width, out + i, add); break;
      case 3: mix<3>(weights, apart, rows, count, width, out + i, add); break;
      default: mix<4>(weights, apart, rows, count, width, out + i, add);
    }
}

}  // namespace finemoe
