// Weights as products read them: float32, or numbers of a few bits in the blocks of GGUF files, which become float32 in
// registers. What comes out is what the float32 weights that they stand for would give, to the last bit.
#pragma once

#include <bit>
#include <vector>

#include "gemm.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace finemoe {

enum class Format { kFloat, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };

// Rows, `stride` bytes apart, each contiguous.
struct Matrix {
  const uint8_t* base;
  int64_t stride;
  Format format;

  Matrix row(int64_t j) const { return {base + j * stride, stride, format}; }
  const float* floats() const { return reinterpret_cast<const float*>(base); }
  int64_t floats_apart() const { return stride / static_cast<int64_t>(sizeof(float)); }
};

inline Matrix floats(const float* base, int64_t columns) {
  return {reinterpret_cast<const uint8_t*>(base), columns * static_cast<int64_t>(sizeof(float)), Format::kFloat};
}

inline float half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const bool number = (bits & 0x7c00u) != 0x7c00u;
  const float value = number ? std::bit_cast<float>(rest) * 0x1p112f : std::bit_cast<float>(rest | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
#endif
}

// kLanes bytes as numbers. GCC 12 converts vectors of bytes one by one, so that it is told how.
#if defined(__AVX512F__)
inline IntVector bytes(const uint8_t* p) {
  return IntVector(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector signed_bytes(const uint8_t* p) {
  return IntVector(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
inline IntVector bytes(const uint8_t* p) {
  return IntVector(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector signed_bytes(const uint8_t* p) {
  return IntVector(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
template <typename Byte>
inline IntVector widened(const uint8_t* p) {
  typedef Byte Some __attribute__((vector_size(kLanes)));
  Some found;
  std::memcpy(&found, p, sizeof found);
  return __builtin_convertvector(found, IntVector);
}
inline IntVector bytes(const uint8_t* p) { return widened<uint8_t>(p); }
inline IntVector signed_bytes(const uint8_t* p) { return widened<int8_t>(p); }
#endif

inline Vector as_floats(IntVector v) { return __builtin_convertvector(v, Vector); }

// ---- the blocks: `unpack` writes the kSize numbers of one ------------------------------------------------------------

struct Q8_0 {  // scale, 32 signed bytes
  static constexpr int kSize = 32, kBytes = 34;
  static void unpack(const uint8_t* block, Vector* out) {
    const float scale = half(block);
#pragma GCC unroll 8
    for (int v = 0; v < kSize / kLanes; ++v) out[v] = scale * as_floats(signed_bytes(block + 2 + v * kLanes));
  }
};

// `make` of the low four bits of each of kLanes bytes, and of the high ones. Where a register holds all sixteen outcomes
// they are made once and looked up.
template <typename Make>
struct Nibbles {
#if defined(__AVX512F__)
  __m512 outcomes;
  explicit Nibbles(const Make& make)
      : outcomes(__m512(make(Vector{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}))) {}
  Vector low(IntVector both) const { return Vector(_mm512_permutexvar_ps(__m512i(both), outcomes)); }
  Vector high(IntVector both) const { return low(both >> 4); }
#else
  const Make& make;
  explicit Nibbles(const Make& given) : make(given) {}
  Vector low(IntVector both) const { return make(as_floats(both & 15)); }
  Vector high(IntVector both) const { return make(as_floats(both >> 4)); }
#endif
};

// 16 bytes: the low halves are the first 16 numbers, the high ones the others.
template <typename Make>
inline void halves(const uint8_t* p, Vector* out, const Make& make) {
  const Nibbles<Make> nibbles(make);
#pragma GCC unroll 4
  for (int v = 0; v < 16 / kLanes; ++v) {
    const IntVector both = bytes(p + v * kLanes);
    out[v] = nibbles.low(both), out[16 / kLanes + v] = nibbles.high(both);
  }
}

struct Q4_0 {  // scale, 32 halves of bytes around 8
  static constexpr int kSize = 32, kBytes = 18;
  static void unpack(const uint8_t* block, Vector* out) {
    const float scale = half(block);
    halves(block + 2, out, [&](Vector x) { return scale * (x - 8.0f); });
  }
};

struct Q4_1 {  // scale, least, 32 halves of bytes
  static constexpr int kSize = 32, kBytes = 20;
  static void unpack(const uint8_t* block, Vector* out) {
    const float scale = half(block), least = half(block + 2);
    halves(block + 4, out, [&](Vector x) { return scale * x + least; });
  }
};

struct Q4_K {  // scales of scales and of minima, 8 of both in 6 bits each, 256 halves of bytes
  static constexpr int kSize = 256, kBytes = 144;
  static void unpack(const uint8_t* block, Vector* out) {
    const float scale = half(block), least = half(block + 2);
    const uint8_t *sixths = block + 4, *from = block + 16;
    constexpr int kParts = 32 / kLanes;
    for (int group = 0; group < 4; ++group, from += 32) {
      float scales[2], minima[2];
      for (int side = 0; side < 2; ++side) {
        const int j = 2 * group + side;
        const int s = j < 4 ? sixths[j] & 63 : (sixths[j + 4] & 15) | (sixths[j - 4] >> 6) << 4;
        const int m = j < 4 ? sixths[j + 4] & 63 : sixths[j + 4] >> 4 | (sixths[j] >> 6) << 4;
        scales[side] = scale * static_cast<float>(s), minima[side] = least * static_cast<float>(m);
      }
      const auto first = [&](Vector x) { return scales[0] * x - minima[0]; };
      const auto second = [&](Vector x) { return scales[1] * x - minima[1]; };
      const Nibbles<decltype(first)> low(first);
      const Nibbles<decltype(second)> high(second);
#pragma GCC unroll 8
      for (int v = 0; v < kParts; ++v) {
        const IntVector both = bytes(from + v * kLanes);
        out[2 * group * kParts + v] = low.low(both), out[(2 * group + 1) * kParts + v] = high.high(both);
      }
    }
  }
};

struct Q6_K {  // 128 bytes of low halves, 64 of two higher bits, 16 scales, a scale of those
  static constexpr int kSize = 256, kBytes = 210;
  static void unpack(const uint8_t* block, Vector* out) {
    const float scale = half(block + 208);
    const uint8_t *low = block, *high = block + 128;
    const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
    constexpr int kParts = 32 / kLanes;
    for (int side = 0; side < 2; ++side, low += 64, high += 32, scales += 8, out += 4 * kParts)
#pragma GCC unroll 8
      for (int v = 0; v < kParts; ++v) {
        const IntVector near = bytes(low + v * kLanes), far = bytes(low + 32 + v * kLanes);
        const IntVector more = bytes(high + v * kLanes);
        const IntVector found[4] = {(near & 15) | (more & 3) << 4, (far & 15) | (more >> 2 & 3) << 4,
                                    near >> 4 | (more >> 4 & 3) << 4, far >> 4 | more >> 6 << 4};
        for (int quarter = 0; quarter < 4; ++quarter) {
          const float by = scale * static_cast<float>(scales[2 * quarter + v * kLanes / 16]);
          out[quarter * kParts + v] = by * as_floats(found[quarter] - 32);
        }
      }
  }
};

// `work.operator()<Block>()` for the blocks of a format that has some.
template <typename Work>
inline void with_blocks(Format format, const Work& work) {
  switch (format) {
    case Format::kFloat: return;
    case Format::kQ8_0: return work.template operator()<Q8_0>();
    case Format::kQ4_0: return work.template operator()<Q4_0>();
    case Format::kQ4_1: return work.template operator()<Q4_1>();
    case Format::kQ4_K: return work.template operator()<Q4_K>();
    case Format::kQ6_K: return work.template operator()<Q6_K>();
  }
}

// ---- products ---------------------------------------------------------------------------------------------------------

// Numbers of one thread, reused.
inline float* unpacked(int64_t count) {
  static thread_local std::vector<Vector> mine;
  const size_t vectors = (count + kLanes - 1) / kLanes;
  if (mine.size() < vectors) mine.resize(vectors);
  return reinterpret_cast<float*>(mine.data());
}

template <typename Block>
void unpack_blocks(const uint8_t* from, int64_t count, float* to) {
  for (int64_t b = 0; b < count; ++b, from += Block::kBytes, to += Block::kSize) {
    Vector numbers[Block::kSize / kLanes];
    Block::unpack(from, numbers);
#pragma GCC unroll 16
    for (int v = 0; v < Block::kSize / kLanes; ++v) store(to + v * kLanes, numbers[v]);
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
  constexpr int kParts = Block::kSize / kLanes, kLine = 64;
  const int64_t whole = shared / Block::kSize;
  for (int64_t b = 0; b < whole; ++b) {
#pragma GCC unroll 8
    for (int c = 0; c < kAcross; ++c) {
      const uint8_t* block = weight.base + c * weight.stride + b * Block::kBytes;
#pragma GCC unroll 4
      for (int byte = 0; byte < Block::kBytes; byte += kLine) __builtin_prefetch(block + ahead + byte, 0, 2);
      Vector part[kParts];
      Block::unpack(block, part);
#pragma GCC unroll 16
      for (int v = 0; v < kParts; ++v)
#pragma GCC unroll 8
        for (int i = 0; i < kTall; ++i) sum[i][c] += part[v] * load(x[i] + b * Block::kSize + v * kLanes);
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

// As `few_rows`. Rows of x that the registers hold share what is unpacked; of many rows, a few rows of the weight are
// unpacked into memory, which all of them read.
template <typename Block>
void few_rows_of_blocks(const float* const* x, int64_t rows, const Matrix& weight, int64_t n, int64_t shared,
                        float* const* out) {
  constexpr int kUnpackedAgain = Block::kSize > 32 ? kHigh : 4 * kHigh;  // large blocks do not fit beside the sums
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

inline void few_rows(const float* const* x, int64_t rows, const Matrix& weight, int64_t n, int64_t shared,
                     float* const* out) {
  if (weight.format == Format::kFloat) return few_rows(x, rows, weight.floats(), n, shared, out);
  with_blocks(weight.format, [&]<typename Block>() { few_rows_of_blocks<Block>(x, rows, weight, n, shared, out); });
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

// c [m, n] = A weight^T, rows `stride` apart.
inline void times_transposed(int64_t m, int64_t n, int64_t shared, const PackRows& a, const Matrix& weight, float* c,
                             int64_t stride) {
  if (weight.format == Format::kFloat)
    return gemm(m, n, shared, a, PackTransposed{weight.floats(), weight.floats_apart()}, c, stride, false);
  with_blocks(weight.format,
              [&]<typename Block>() { gemm(m, n, shared, a, PackBlocks<Block>{weight}, c, stride, false); });
}

}  // namespace finemoe
