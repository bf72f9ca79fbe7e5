// Blocks of GGUF files, and how their numbers become float32 in registers.
#pragma once

#include <bit>

#include "matrix.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace finemoe {

inline float half_of(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const bool number = (bits & 0x7c00u) != 0x7c00u;
  const float value = number ? std::bit_cast<float>(rest) * 0x1p112f : std::bit_cast<float>(rest | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
#endif
}

// All of them. One that is looked up is spread over a register as it is loaded; one that is converted would be by the
// unit that unpacks blocks, which has enough to do.
struct Halves {
  float of[1 << 16];
  Halves() {
    for (int bits = 0; bits < 1 << 16; ++bits) of[bits] = half_of(static_cast<uint16_t>(bits));
  }
};
inline const Halves kHalves;

inline float half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return kHalves.of[bits];
}

// kLanes bytes as numbers. GCC 12 converts vectors of bytes one by one, so that it is told how.
#if defined(__AVX512F__)
inline IntVector bytes(const uint8_t* p) {
  return IntVector(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector signed_bytes(const uint8_t* p) {
  return IntVector(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector pairs_of_bytes(const uint8_t* p) {
  return IntVector(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX2__)
inline IntVector bytes(const uint8_t* p) {
  return IntVector(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector signed_bytes(const uint8_t* p) {
  return IntVector(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline IntVector pairs_of_bytes(const uint8_t* p) {
  return IntVector(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
template <typename Number>
inline IntVector widened(const uint8_t* p) {
  typedef Number Some __attribute__((vector_size(kLanes * sizeof(Number))));
  Some found;
  std::memcpy(&found, p, sizeof found);
  return __builtin_convertvector(found, IntVector);
}
inline IntVector bytes(const uint8_t* p) { return widened<uint8_t>(p); }
inline IntVector signed_bytes(const uint8_t* p) { return widened<int8_t>(p); }
inline IntVector pairs_of_bytes(const uint8_t* p) { return widened<uint16_t>(p); }
#endif

inline Vector as_floats(IntVector v) { return __builtin_convertvector(v, Vector); }

// ---- the blocks: `unpack` gives `out(v, numbers)` the kSize numbers of one, a vector at a time and in their order ------

struct Q8_0 {  // scale, 32 signed bytes
  static constexpr int kSize = 32, kBytes = 34;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
    const float scale = half(block);
#pragma GCC unroll 8
    for (int v = 0; v < kSize / kLanes; ++v) out(v, scale * as_floats(signed_bytes(block + 2 + v * kLanes)));
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
template <typename Out, typename Make>
inline void halves(const uint8_t* p, const Out& out, const Make& make) {
  const Nibbles<Make> nibbles(make);
  constexpr int kParts = 16 / kLanes;
  IntVector both[kParts];
#pragma GCC unroll 4
  for (int v = 0; v < kParts; ++v) out(v, nibbles.low(both[v] = bytes(p + v * kLanes)));
#pragma GCC unroll 4
  for (int v = 0; v < kParts; ++v) out(kParts + v, nibbles.high(both[v]));
}

struct Q4_0 {  // scale, 32 halves of bytes around 8
  static constexpr int kSize = 32, kBytes = 18;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
    const float scale = half(block);
    halves(block + 2, out, [&](Vector x) { return scale * (x - 8.0f); });
  }
};

struct Q4_1 {  // scale, least, 32 halves of bytes
  static constexpr int kSize = 32, kBytes = 20;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
    const float scale = half(block), least = half(block + 2);
    halves(block + 4, out, [&](Vector x) { return scale * x + least; });
  }
};

struct Q4_K {  // scales of scales and of minima, 8 of both in 6 bits each, 256 halves of bytes
  static constexpr int kSize = 256, kBytes = 144;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
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
      IntVector both[kParts];
#pragma GCC unroll 8
      for (int v = 0; v < kParts; ++v) out(2 * group * kParts + v, low.low(both[v] = bytes(from + v * kLanes)));
#pragma GCC unroll 8
      for (int v = 0; v < kParts; ++v) out((2 * group + 1) * kParts + v, high.high(both[v]));
    }
  }
};

struct Q6_K {  // 128 bytes of low halves, 64 of two higher bits, 16 scales, a scale of those
  static constexpr int kSize = 256, kBytes = 210;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
    const float scale = half(block + 208);
    const uint8_t *low = block, *high = block + 128;
    const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
    constexpr int kParts = 32 / kLanes;
    for (int side = 0; side < 2; ++side, low += 64, high += 32, scales += 8) {
      IntVector found[4][kParts];
#pragma GCC unroll 8
      for (int v = 0; v < kParts; ++v) {
        const IntVector near = bytes(low + v * kLanes), far = bytes(low + 32 + v * kLanes);
        const IntVector more = bytes(high + v * kLanes);
        found[0][v] = (near & 15) | (more << 4 & 48), found[1][v] = (far & 15) | (more << 2 & 48);
        found[2][v] = near >> 4 | (more & 48), found[3][v] = far >> 4 | (more >> 2 & 48);
      }
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter)
#pragma GCC unroll 8
        for (int v = 0; v < kParts; ++v) {
          const float by = scale * static_cast<float>(scales[2 * quarter + v * kLanes / 16]);
          out((4 * side + quarter) * kParts + v, by * as_floats(found[quarter][v] - 32));
        }
    }
  }
};

struct BF16 {  // 32 numbers, of which each is the upper half of a float32
  static constexpr int kSize = 32, kBytes = 64;
  template <typename Out>
  static void unpack(const uint8_t* block, const Out& out) {
#pragma GCC unroll 8
    for (int v = 0; v < kSize / kLanes; ++v) out(v, Vector(pairs_of_bytes(block + 2 * v * kLanes) << 16));
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
    case Format::kBF16: return work.template operator()<BF16>();
  }
}

}  // namespace finemoe
