// Tensors as the matrices of `matrix.h`, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "formats.h"

namespace finemoe {

struct Layout {
  Format format;
  int64_t size, bytes;  // of a block
};

// The format of a weight: float32, or uint8 [..., blocks, bytes], where a block's bytes tell which.
inline Layout layout_of(const at::Tensor& tensor, const char* name) {
  if (tensor.scalar_type() == at::kFloat) return {Format::kFloat, 1, sizeof(float)};
  TORCH_CHECK(tensor.scalar_type() == at::kByte && tensor.dim() > 2, name, " must be float32, or blocks of bytes");
  static constexpr Layout known[] = {{Format::kQ8_0, Q8_0::kSize, Q8_0::kBytes}, {Format::kQ4_0, Q4_0::kSize, Q4_0::kBytes},
                                     {Format::kQ4_1, Q4_1::kSize, Q4_1::kBytes}, {Format::kQ4_K, Q4_K::kSize, Q4_K::kBytes},
                                     {Format::kQ6_K, Q6_K::kSize, Q6_K::kBytes}, {Format::kBF16, BF16::kSize, BF16::kBytes}};
  for (const Layout& one : known)
    if (one.bytes == tensor.size(-1)) return one;
  TORCH_CHECK(false, name, " has blocks of ", tensor.size(-1), " bytes, which are of no format that is known");
}

// `sizes`, and rows of `columns` numbers behind them, every matrix in one piece. Matrices themselves may lie apart.
inline Matrix matrix(const at::Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, int64_t columns) {
  const Layout layout = layout_of(tensor, name);
  const bool blocks = layout.format != Format::kFloat;
  const int64_t across = (columns + layout.size - 1) / layout.size, lead = sizes.size();
  TORCH_CHECK(tensor.is_cpu() && tensor.dim() == lead + (blocks ? 2 : 1) && tensor.size(lead) == across, name,
              " must have rows of ", columns, " numbers, on the CPU");
  int64_t at = 0;
  for (const int64_t size : sizes)
    TORCH_CHECK(tensor.size(at++) == size, name, " has ", tensor.size(at - 1), " where ", size, " are wanted");
  const int64_t width = across * (blocks ? layout.bytes : 1);  // elements of a row
  const bool near = tensor.size(lead - 1) < 2 || tensor.stride(lead - 1) == width;
  TORCH_CHECK(tensor.numel() == 0 || (near && (tensor.stride(-1) == 1 || tensor.size(-1) == 1) &&
                                      (!blocks || tensor.stride(-2) == layout.bytes || across == 1)),
              name, " must be contiguous in its last dimensions");
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()), width * tensor.element_size(), layout.format};
}

// Bytes from one matrix of a stack to the next.
inline int64_t bytes_apart(const at::Tensor& stack) { return stack.stride(0) * stack.element_size(); }

}  // namespace finemoe
