// Weights as products read them: float32, or numbers of a few bits in the blocks of GGUF files, which become float32 in
// registers. What comes out is what the float32 weights that they stand for would give, to the last bit.
#pragma once

#include "gemm.h"

namespace finemoe {

enum class Format { kFloat, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K, kBF16 };

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

// As the product of the same name in `gemm.h`.
void few_rows(const float* const* x, int64_t rows, const Matrix& weight, int64_t n, int64_t shared, float* const* out);

// c [m, n] = A weight^T, rows `stride` apart.
void times_transposed(int64_t m, int64_t n, int64_t shared, const PackRows& a, const Matrix& weight, float* c,
                      int64_t stride);

}  // namespace finemoe
