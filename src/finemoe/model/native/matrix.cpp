#include "matrix.h"

#include <vector>

#include "formats.h"

namespace finemoe {
namespace {

// Numbers of one thread, reused.
float* unpacked(int64_t count) {
  static thread_local std::vector<Vector> mine;
  const size_t vectors = (count + kLanes - 1) / kLanes;
  if (mine.size() < vectors) mine.resize(vectors);
  return reinterpret_cast<float*>(mine.data());
}

template <typename Block>
void unpack_blocks(const uint8_t* from, int64_t count, float* to) {
  for (int64_t b = 0; b < count; ++b, from += Block::kBytes, to += Block::kSize) {
    Block::unpack(from, [&](int v, Vector numbers) { store(to + v * kLanes, numbers); });
  }
}

// out[i][j + c] = x[i] · row c of the weight, summed in the order of `dot_rows`. Rows of few bits are too short for the
// processor to foresee the next ones: what lies `ahead` bytes away is fetched meanwhile.
template <typename Block, int kTall, int kAcross>
void dot_blocks(const float* const* x, const Matrix& weight, int64_t shared, float* const* out, int64_t j,
                int64_t ahead) {
  Vector sum[kTall][kAcross];
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) sum[i][c] = Vector{};
  constexpr int kLine = 64;
  const int64_t whole = shared / Block::kSize;
  for (int64_t b = 0; b < whole; ++b) {
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) {
      const uint8_t* block = weight.base + c * weight.stride + b * Block::kBytes;
#pragma GCC unroll 4
      for (int byte = 0; byte < Block::kBytes; byte += kLine) __builtin_prefetch(block + ahead + byte, 0, 2);
      Block::unpack(block, [&](int v, Vector part) {
#pragma GCC unroll 8
        for (int i = 0; i < kTall; ++i) sum[i][c] += part * load(x[i] + b * Block::kSize + v * kLanes);
      });
    }
  }
  const int64_t left = shared - whole * Block::kSize;
#pragma GCC unroll 8
  for (int c = 0; c < kAcross; ++c) {
    alignas(64) float last[Block::kSize];
    if (left) unpack_blocks<Block>(weight.base + c * weight.stride + whole * Block::kBytes, 1, last);
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      const float* rest = x[i] + whole * Block::kSize;
      int64_t k = 0;
      for (; k + kLanes <= left; k += kLanes) sum[i][c] += load(last + k) * load(rest + k);
      float result = total(sum[i][c]);
      for (; k < left; ++k) result += last[k] * rest[k];
      out[i][j + c] = result;
    }
  }
}

template <typename Block>
using DotBlocks = void (*)(const float* const*, const Matrix&, int64_t, float* const*, int64_t, int64_t);

template <typename Block, int kAcross, int... tall>
DotBlocks<Block> pick_dot_blocks(int64_t rows, std::integer_sequence<int, tall...>) {
  static constexpr DotBlocks<Block> kernels[] = {dot_blocks<Block, tall + 1, kAcross>...};
  return kernels[rows - 1];
}

// Rows of the weight that one row of x meets at once: short blocks leave the processor idle between them.
template <typename Block>
constexpr int kAlone = Block::kBytes <= 34 ? 2 * kWide : kWide;

template <typename Block>
void one_row_of_blocks(const float* const* x, const Matrix& weight, int64_t n, int64_t shared, float* const* out) {
  constexpr int kMost = kAlone<Block>;
  for (int64_t j = 0, width; j < n; j += width) {
    width = n - j >= kMost ? kMost : n - j >= kWide ? kWide : 1;
    const auto dot = width == kMost ? dot_blocks<Block, 1, kMost>
                     : width == kWide ? dot_blocks<Block, 1, kWide>
                                      : dot_blocks<Block, 1, 1>;
    dot(x, weight.row(j), shared, out, j, width * weight.stride);
  }
}

// As `few_rows`. Rows of x that the registers hold share what is unpacked; of many rows, a few rows of the weight are
// unpacked into memory, which all of them read.
template <typename Block>
void few_rows_of_blocks(const float* const* x, int64_t rows, const Matrix& weight, int64_t n, int64_t shared,
                        float* const* out) {
  if (rows == 1) return one_row_of_blocks<Block>(x, weight, n, shared, out);
  constexpr int kUnpackedAgain = 4 * kHigh;
  if (rows <= kUnpackedAgain) {
    constexpr auto heights = std::make_integer_sequence<int, kHigh>{};
    const int64_t tiles = (rows + kHigh - 1) / kHigh;
    for (int64_t j = 0, width; j < n; j += width) {
      width = n - j >= kWide ? kWide : 1;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
        const auto dot = width == kWide ? pick_dot_blocks<Block, kWide>(count, heights)
                                        : pick_dot_blocks<Block, 1>(count, heights);
        dot(x + first, weight.row(j), shared, out + first, j, tile ? 0 : width * weight.stride);
      }
    }
    return;
  }
  const int64_t blocks = (shared + Block::kSize - 1) / Block::kSize, stride = blocks * Block::kSize;
  float* near = unpacked(kWide * (stride + shared));
  float* packed = near + kWide * stride;  // without what fills the last block of a row
  for (int64_t j = 0; j < n; j += kWide) {
    const int64_t width = std::min<int64_t>(kWide, n - j);
    for (int64_t c = 0; c < width; ++c) {
      unpack_blocks<Block>(weight.row(j + c).base, blocks, near + c * stride);
      if (stride != shared) std::memcpy(packed + c * shared, near + c * stride, shared * sizeof(float));
    }
    float* part[kFewRows];
    for (int64_t r = 0; r < rows; ++r) part[r] = out[r] + j;
    few_rows(x, rows, stride == shared ? near : packed, width, shared, part);
  }
}

// As `PackTransposed`.
template <typename Block>
struct PackBlocks {
  Matrix weight;
  void operator()(int64_t k0, int64_t depth, int64_t j0, int64_t count, float* panel) const {
    const int64_t first = k0 / Block::kSize, last = (k0 + depth + Block::kSize - 1) / Block::kSize;
    const int64_t stride = (last - first) * Block::kSize + kLanes;  // not a power of two
    float* near = unpacked(kColumns * stride);
    for (int64_t j = 0; j < count; ++j)
      unpack_blocks<Block>(weight.row(j0 + j).base + first * Block::kBytes, last - first, near + j * stride);
    PackTransposed{near + (k0 - first * Block::kSize), stride}(0, depth, 0, count, panel);
  }
};

}  // namespace

void few_rows(const float* const* x, int64_t rows, const Matrix& weight, int64_t n, int64_t shared,
              float* const* out) {
  if (weight.format == Format::kFloat) return few_rows(x, rows, weight.floats(), n, shared, out);
  with_blocks(weight.format, [&]<typename Block>() { few_rows_of_blocks<Block>(x, rows, weight, n, shared, out); });
}

void times_transposed(int64_t m, int64_t n, int64_t shared, const PackRows& a, const Matrix& weight, float* c,
                      int64_t stride) {
  if (weight.format == Format::kFloat)
    return gemm(m, n, shared, a, PackTransposed{weight.floats(), weight.floats_apart()}, c, stride, false);
  with_blocks(weight.format,
              [&]<typename Block>() { gemm(m, n, shared, a, PackBlocks<Block>{weight}, c, stride, false); });
}

}  // namespace finemoe
