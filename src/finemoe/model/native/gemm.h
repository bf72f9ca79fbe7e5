// Single-threaded float32 matrix products C = A B, built from a register-tiled micro-kernel.
//
// A and B are described by how they are packed, so that a gather, a transposition or a scale costs no pass of its own.
// The sizes follow the width of the machine's vectors: the accumulators fill the registers, a packed slice of A stays
// in the first cache and a packed block of B in the second (Goto and van de Geijn, 2008).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace finemoe {

#ifndef FINEMOE_TILE  // which of several tiles, and how many columns at once: chosen by measuring (tile.py)
#define FINEMOE_TILE 0
#endif
#ifndef FINEMOE_BLOCK
#define FINEMOE_BLOCK 512
#endif

#if defined(__AVX512F__) && FINEMOE_TILE == 1
constexpr int kLanes = 16, kVectors = 4, kRows = 6;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2, kRows = 6;
#elif defined(__aarch64__) || defined(FINEMOE_SIZES_OF_ARM)  // which the tests set, on any machine
constexpr int kLanes = 4, kVectors = 4, kRows = 6;
#else
constexpr int kLanes = 4, kVectors = 2, kRows = 5;
#endif
constexpr int kColumns = kLanes * kVectors;  // of the tile that the registers hold
constexpr int64_t kDepth = 384;              // most of the shared dimension that is packed at once
constexpr int64_t kBlock = FINEMOE_BLOCK;    // columns of B that are packed at once; a multiple of kColumns
constexpr int64_t kPanelStride = kDepth + 16;  // not a power of two: rows of A must not share one cache set

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4)));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector splat(float x) { return Vector{} + x; }

// The lanes so numbered of a, and from kLanes on of b.
template <int... lane>
inline Vector pick_lanes(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, IntVector{lane...});
#endif
}

template <int kStep, int... lane>
inline Vector turned(Vector v, std::integer_sequence<int, lane...>) {
  return pick_lanes<(lane + kStep) % kLanes...>(v, v);
}

// The sum of all lanes, in halves: one after the other, each addition would wait for the one before.
inline float total(Vector v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  if constexpr (kLanes > 8) v += turned<8>(v, lanes);
  if constexpr (kLanes > 4) v += turned<4>(v, lanes);
  v += turned<2>(v, lanes);
  return v[0] + v[1];
}

// Row r of a matrix whose rows are looked up: `rows[r] / divisor` when there is a list, r itself when not.
struct Rows {
  const float* base;
  int64_t stride;
  const int64_t* index = nullptr;
  int64_t divisor = 1;
  const float* operator[](int64_t r) const { return base + (index ? index[r] / divisor : r) * stride; }
};

// The same where none is looked up.
struct Strided {
  const float* base;
  int64_t stride;
  const float* operator[](int64_t r) const { return base + r * stride; }
};

// ---- packing A: at most kRows rows of the result, `depth` deep ------------------------------------------------------

// A[i][k] = rows[i][k]; the panel keeps rows.
struct PackRows {
  static constexpr bool kDepthMajor = false;
  Rows rows;
  void operator()(int64_t i0, int64_t count, int64_t k0, int64_t depth, float* panel) const {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(panel + i * kPanelStride, rows[i0 + i] + k0, depth * sizeof(float));
  }
};

// A[i][k] = scale[k] rows[k][i] with rows of `width` numbers; the panel keeps columns. `scales` is read through the same
// index as the rows.
struct PackColumns {
  static constexpr bool kDepthMajor = true;
  Rows rows;
  int64_t width;
  const float* scales = nullptr;
  void operator()(int64_t i0, int64_t count, int64_t k0, int64_t depth, float* panel) const {
    constexpr int kWhole = (kRows + kLanes - 1) / kLanes;  // vectors: the excess is overwritten by the next column
    const bool whole = i0 + kWhole * kLanes <= width;
    for (int64_t k = 0; k < depth; ++k) {
      const float* source = rows[k0 + k] + i0;
      float* target = panel + k * kRows;
      const float scale = scales ? scales[rows.index ? rows.index[k0 + k] : k0 + k] : 1.0f;
      if (whole)
        for (int v = 0; v < kWhole; ++v) store(target + v * kLanes, scale * load(source + v * kLanes));
      else
        for (int64_t i = 0; i < count; ++i) target[i] = scale * source[i];
    }
  }
};

// ---- packing B: `depth` rows, kColumns columns, columns beyond `count` filled with zeros ---------------------------

// B[k][j] = rows[k][j].
struct PackStraight {
  Rows rows;
  void operator()(int64_t k0, int64_t depth, int64_t j0, int64_t count, float* panel) const {
    if (count == kColumns) {
      for (int64_t k = 0; k < depth; ++k) {
        const float* source = rows[k0 + k] + j0;
        for (int v = 0; v < kVectors; ++v) store(panel + k * kColumns + v * kLanes, load(source + v * kLanes));
      }
      return;
    }
    for (int64_t k = 0; k < depth; ++k) {
      std::memcpy(panel + k * kColumns, rows[k0 + k] + j0, count * sizeof(float));
      std::memset(panel + k * kColumns + count, 0, (kColumns - count) * sizeof(float));
    }
  }
};

template <int kStep, int... lane>
inline void swap_lanes(Vector& low, Vector& high, std::integer_sequence<int, lane...>) {
  const Vector a = low, b = high;
  low = pick_lanes<((lane & kStep) ? kLanes + lane - kStep : lane)...>(a, b);
  high = pick_lanes<((lane & kStep) ? kLanes + lane : lane + kStep)...>(a, b);
}

template <int kStep>
inline void transpose_stage(Vector* square) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep))
      swap_lanes<kStep>(square[i], square[i + kStep], std::make_integer_sequence<int, kLanes>{});
}

// kLanes x kLanes, in registers.
inline void transpose(Vector* square) {
  transpose_stage<1>(square);
  transpose_stage<2>(square);
  if constexpr (kLanes > 4) transpose_stage<4>(square);
  if constexpr (kLanes > 8) transpose_stage<8>(square);
}

// B[k][j] = weight[j][k]: a linear layer's weight, `[out, in]`.
struct PackTransposed {
  const float* weight;
  int64_t stride;
  void operator()(int64_t k0, int64_t depth, int64_t j0, int64_t count, float* panel) const {
    const float* corner = weight + j0 * stride + k0;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t filled = std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
      const float* source = corner + v * kLanes * stride;
      int64_t k = 0;
      for (; filled == kLanes && k + kLanes <= depth; k += kLanes) {
        Vector square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(source + i * stride + k);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kColumns + v * kLanes, square[i]);
      }
      for (; k < depth; ++k)
        for (int64_t i = 0; i < kLanes; ++i)
          panel[k * kColumns + v * kLanes + i] = i < filled ? source[i * stride + k] : 0.0f;
    }
  }
};

// The same, of rows that are looked up.
struct PackTransposedRows {
  Rows rows;
  void operator()(int64_t k0, int64_t depth, int64_t j0, int64_t count, float* panel) const {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t filled = std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
      const float* source[kLanes];
      for (int64_t i = 0; i < filled; ++i) source[i] = rows[j0 + v * kLanes + i] + k0;
      int64_t k = 0;
      for (; filled == kLanes && k + kLanes <= depth; k += kLanes) {
        Vector square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(source[i] + k);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kColumns + v * kLanes, square[i]);
      }
      for (; k < depth; ++k)
        for (int64_t i = 0; i < kLanes; ++i) panel[k * kColumns + v * kLanes + i] = i < filled ? source[i][k] : 0.0f;
    }
  }
};

// ---- the product --------------------------------------------------------------------------------------------------

// kTile rows and kWide vectors of columns, in registers.
template <int kTile, int kWide, bool kDepthMajor>
void micro_kernel(int64_t depth, const float* __restrict a, const float* __restrict b, float* __restrict c,
                  int64_t stride, bool add) {
  Vector sum[kTile][kWide];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sum[i][v] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) row[v] = load(b + k * kColumns + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      const float x = kDepthMajor ? a[k * kRows + i] : a[i * kPanelStride + k];
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) sum[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      float* p = c + i * stride + v * kLanes;
      store(p, add ? load(p) + sum[i][v] : sum[i][v]);
    }
}

using MicroKernel = void (*)(int64_t, const float*, const float*, float*, int64_t, bool);

template <int kWide, bool kDepthMajor, int... tile>
MicroKernel pick_rows(int64_t rows, std::integer_sequence<int, tile...>) {
  static constexpr MicroKernel kernels[] = {micro_kernel<tile + 1, kWide, kDepthMajor>...};
  return kernels[rows - 1];
}

// For the edges of C: as many rows as are left, and half the columns where those are enough.
template <bool kDepthMajor>
MicroKernel pick_micro_kernel(int64_t rows, int64_t columns) {
  constexpr auto tiles = std::make_integer_sequence<int, kRows>{};
  constexpr int kHalf = kVectors / 2;
  return columns <= kHalf * kLanes ? pick_rows<kHalf, kDepthMajor>(rows, tiles)
                                   : pick_rows<kVectors, kDepthMajor>(rows, tiles);
}

// Buffers of one thread, reused by every product it computes.
struct Scratch {
  alignas(64) float a[kPanelStride * kRows];
  alignas(64) float b[kDepth * kBlock];
  alignas(64) float tile[kRows * kColumns];
};

inline Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> mine = std::make_unique<Scratch>();
  return *mine;
}

inline void put(const float* from, int64_t count, float* to, bool add) {
  if (add)
    for (int64_t q = 0; q < count; ++q) to[q] += from[q];
  else
    std::memcpy(to, from, count * sizeof(float));
}

// c[m][n], rows `stride` apart, becomes (or, with `add`, grows by) A B over `shared` terms.
template <typename A, typename B>
void gemm(int64_t m, int64_t n, int64_t shared, const A& pack_a, const B& pack_b, float* c, int64_t stride, bool add) {
  Scratch& buffers = scratch();
  if (shared == 0 && !add)
    for (int64_t i = 0; i < m; ++i) std::memset(c + i * stride, 0, n * sizeof(float));
  const int64_t pieces = (shared + kDepth - 1) / kDepth;
  const int64_t step = pieces ? (shared + pieces - 1) / pieces : 0;  // even pieces, none of them thin
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = std::min(kBlock, n - j);
    for (int64_t k = 0; k < shared; k += step) {  // inside: the columns of C that it revisits are still near
      const int64_t depth = std::min(step, shared - k);
      const bool more = add || k > 0;
      for (int64_t p = 0; p < width; p += kColumns)
        pack_b(k, depth, j + p, std::min<int64_t>(kColumns, width - p), buffers.b + p * depth);
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, m - i);
        const MicroKernel kernel = pick_micro_kernel<A::kDepthMajor>(rows, kColumns);
        pack_a(i, rows, k, depth, buffers.a);
        for (int64_t p = 0; p < width; p += kColumns) {
          const int64_t columns = std::min<int64_t>(kColumns, width - p);
          float* corner = c + i * stride + j + p;
          if (columns == kColumns) {
            kernel(depth, buffers.a, buffers.b + p * depth, corner, stride, more);
            continue;
          }
          pick_micro_kernel<A::kDepthMajor>(rows, columns)(depth, buffers.a, buffers.b + p * depth, buffers.tile,
                                                           kColumns, false);
          for (int64_t r = 0; r < rows; ++r) put(buffers.tile + r * kColumns, columns, corner + r * stride, more);
        }
      }
    }
  }
}

// ---- few rows: the weights are read once, straight from memory ------------------------------------------------------

constexpr int64_t kFewRows = 64;  // below this, packing the weights would cost more than it saves
#if defined(__AVX512F__) || defined(__aarch64__) || defined(FINEMOE_SIZES_OF_ARM)
constexpr int kHigh = 6, kWide = 4;  // rows of x and of the weight whose products the registers hold
#else
constexpr int kHigh = 2, kWide = 4;
#endif

// What is fetched into the second cache while something else is computed: a line of it in every step.
struct Ahead {
  const float* next;
  int lines;  // in a step
  void step() {
    for (int i = 0; i < lines; ++i, next += kLanes) __builtin_prefetch(next, 0, 2);
  }
};

// out[i][j] = x[i] · weight[j]. Every sum is made by itself and in the same order, so that no row knows of its
// neighbours: what comes out does not depend on how many there are.
template <int kTall, int kAcross>
void dot_rows(const float* const* x, const float* weight, int64_t shared, float* const* out, int64_t j, Ahead& ahead) {
  Vector sum[kTall][kAcross];
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) sum[i][c] = Vector{};
  int64_t k = 0;
  for (; k + kLanes <= shared; k += kLanes) {
    ahead.step();
    Vector w[kAcross];
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) w[c] = load(weight + c * shared + k);
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      const Vector row = load(x[i] + k);
#pragma GCC unroll 8
      for (int c = 0; c < kAcross; ++c) sum[i][c] += w[c] * row;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) {
      float result = total(sum[i][c]);
      for (int64_t rest = k; rest < shared; ++rest) result += weight[c * shared + rest] * x[i][rest];
      out[i][j + c] = result;
    }
}

using DotRows = void (*)(const float* const*, const float*, int64_t, float* const*, int64_t, Ahead&);

template <int kAcross, int... tall>
DotRows pick_dot_rows(int64_t rows, std::integer_sequence<int, tall...>) {
  static constexpr DotRows kernels[] = {dot_rows<tall + 1, kAcross>...};
  return kernels[rows - 1];
}

// out[i] = weight[n][shared] · x[i] for fewer than kFewRows rows, in tiles of about the same height. Weights for one row
// are read as the single stream that the processor fetches ahead by itself.
inline void few_rows(const float* const* x, int64_t rows, const float* weight, int64_t n, int64_t shared,
                     float* const* out) {
  if (rows == 1) {
    Ahead none{nullptr, 0};
    for (int64_t j = 0; j < n; ++j) dot_rows<1, 1>(x, weight + j * shared, shared, out, j, none);
    return;
  }
  constexpr auto heights = std::make_integer_sequence<int, kHigh>{};
  const int64_t tiles = (rows + kHigh - 1) / kHigh;
  for (int64_t j = 0, width; j < n; j += width) {
    width = n - j >= kWide ? kWide : 1;
    const float* part = weight + j * shared;
    Ahead ahead{part + width * shared, static_cast<int>((width + tiles - 1) / std::max<int64_t>(tiles, 1))};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      const DotRows dot = width == kWide ? pick_dot_rows<kWide>(count, heights) : pick_dot_rows<1>(count, heights);
      dot(x + first, part, shared, out + first, j, ahead);
    }
  }
}

}  // namespace finemoe
