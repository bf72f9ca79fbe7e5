// AdamW with its moments in bfloat16: weight, gradient and moments are passed over once, and nothing is kept beside them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <bit>

#include "parallel.h"

// Each operation rounds for itself, as torch's do one after the other: then weights and moments are those of the plain
// path to the bit, and a run does not depend on whether this could be compiled.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

using at::Tensor;

constexpr int64_t kGrain = 32768;  // numbers that are worth a thread

// One step's numbers; those that end in `new` are what the gradient counts in a moment.
struct Step {
  float keep, first, first_new, second, second_new, eps, rate, root;
};

inline float widened(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even; what is no number stays none.
inline uint16_t rounded(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

void advance(float* __restrict weight, const float* __restrict gradient, uint16_t* __restrict first,
             uint16_t* __restrict second, int64_t count, const Step s) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i];
    const float m = widened(first[i]) * s.first + g * s.first_new;
    const float v = widened(second[i]) * s.second + g * g * s.second_new;
    const float divisor = __builtin_sqrtf(v) * s.root + s.eps;
    weight[i] = weight[i] * s.keep - m * s.rate / divisor;
    first[i] = rounded(m);
    second[i] = rounded(v);
  }
}

template <typename Number>
Number* numbers(const Tensor& tensor, at::ScalarType type, const Tensor& like, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous ",
              type, " numbers on the CPU");
  TORCH_CHECK(tensor.sizes() == like.sizes(), name, " must have the shape of the weight");
  return static_cast<Number*>(const_cast<void*>(tensor.const_data_ptr()));
}

void adamw(Tensor weight, const Tensor& gradient, Tensor exp_avg, Tensor exp_avg_sq, double keep, double beta1,
           double beta2, double eps, double rate, double root) {
  auto* const w = numbers<float>(weight, at::kFloat, weight, "weight");
  const auto* const g = numbers<float>(gradient, at::kFloat, weight, "gradient");
  auto* const m = numbers<uint16_t>(exp_avg, at::kBFloat16, weight, "exp_avg");
  auto* const v = numbers<uint16_t>(exp_avg_sq, at::kBFloat16, weight, "exp_avg_sq");
  const auto to = [](double value) { return static_cast<float>(value); };
  const Step step{to(keep), to(beta1), to(1 - beta1), to(beta2), to(1 - beta2), to(eps), to(rate), to(root)};
  finemoe::share_range(weight.numel(), kGrain, [&](int64_t from, int64_t until) {
    advance(w + from, g + from, m + from, v + from, until - from, step);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "adamw(Tensor(a!) weight, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float keep, float beta1, "
      "float beta2, float eps, float rate, float root) -> ()",
      adamw);
}
