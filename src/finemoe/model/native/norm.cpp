// x / sqrt(mean(x²) + eps) · weight over rows, and its gradient: each row is read from memory once.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <memory>

#include "norm.h"
#include "parallel.h"

namespace {

using at::Tensor;
using namespace finemoe;

constexpr int64_t kGrain = 16384;  // numbers that are worth a thread

// Rows of numbers: a matrix whose rows are contiguous, or any contiguous tensor by its last dimension.
struct Matrix {
  float* base;
  int64_t rows, width, stride;
};

Matrix matrix(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.dim() > 0, name,
              " must be float32 rows on the CPU");
  const int64_t width = tensor.size(-1);
  float* base = const_cast<float*>(tensor.const_data_ptr<float>());
  if (tensor.is_contiguous()) return {base, width ? tensor.numel() / width : 0, width, width};
  TORCH_CHECK(tensor.dim() == 2 && (width < 2 || tensor.stride(1) == 1), name, " must have contiguous rows");
  return {base, tensor.size(0), width, tensor.stride(0)};
}

void check_same(const Matrix& a, const Matrix& b) {
  TORCH_CHECK(a.rows == b.rows && a.width == b.width, "states, gradients and result must have the same shape");
}

const float* vector(const Tensor& tensor, const char* name, int64_t count) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous() &&
                  tensor.numel() == count,
              name, " must be ", count, " contiguous float32 numbers on the CPU");
  return tensor.const_data_ptr<float>();
}

// inverse [rows]: 1 / sqrt(mean(x²) + eps), which the gradient needs.
void rms_norm_forward(const Tensor& states, const Tensor& weight, double eps, Tensor out,
                      const std::optional<Tensor>& inverse) {
  const Matrix x = matrix(states, "states"), y = matrix(out, "out");
  check_same(x, y);
  const float* w = vector(weight, "weight", x.width);
  float* factors = inverse ? const_cast<float*>(vector(*inverse, "inverse", x.rows)) : nullptr;
  share_range(x.rows, kGrain / std::max<int64_t>(x.width, 1), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float factor = norm_row(x.base + r * x.stride, w, x.width, static_cast<float>(eps), y.base + r * y.stride);
      if (factors) factors[r] = factor;
    }
  });
}

// Rows are cut into parts by their number alone, and the parts of the weight's gradient added in order: it does not
// depend on the number of threads.
void rms_norm_backward(const Tensor& grad, const Tensor& states, const Tensor& weight, const Tensor& inverse,
                       Tensor grad_states, Tensor grad_weight) {
  const Matrix x = matrix(states, "states"), g = matrix(grad, "grad"), gx = matrix(grad_states, "grad_states");
  check_same(x, g), check_same(x, gx);
  const int64_t rows = x.rows, width = x.width;
  const float *w = vector(weight, "weight", width), *factors = vector(inverse, "inverse", rows);
  float* gw = const_cast<float*>(vector(grad_weight, "grad_weight", width));
  const int64_t height = std::max({int64_t{32}, kGrain / std::max<int64_t>(width, 1), (rows + 63) / 64});
  const int64_t parts = (rows + height - 1) / height;
  const std::unique_ptr<float[]> sums(new float[parts * width]());
  share_tasks(parts, [&](int64_t part) {
    float* sum = sums.get() + part * width;
    for (int64_t r = part * height; r < std::min(rows, (part + 1) * height); ++r) {
      const float *row = x.base + r * x.stride, *flow = g.base + r * g.stride, factor = factors[r];
      const float along = sum_over(width, [&](int64_t j, int64_t n) {
        const Vector product = take(flow + j, n) * take(row + j, n);
        give(sum + j, take(sum + j, n) + product * factor, n);
        return product * take(w + j, n);
      });
      const float back = along * factor * factor / static_cast<float>(width);
      for_each(width, [&](int64_t j, int64_t n) {
        give(gx.base + r * gx.stride + j, (take(flow + j, n) * take(w + j, n) - take(row + j, n) * back) * factor, n);
      });
    }
  });
  std::fill_n(gw, width, 0.0f);
  for (int64_t part = 0; part < parts; ++part)
    for_each(width, [&](int64_t j, int64_t n) {
      give(gw + j, take(gw + j, n) + take(sums.get() + part * width + j, n), n);
    });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def("rms_norm_forward(Tensor states, Tensor weight, float eps, Tensor(a!) out, Tensor(b!)? inverse) -> ()",
              rms_norm_forward);
  library.def(
      "rms_norm_backward(Tensor grad, Tensor states, Tensor weight, Tensor inverse, Tensor(a!) grad_states, "
      "Tensor(b!) grad_weight) -> ()",
      rms_norm_backward);
}
