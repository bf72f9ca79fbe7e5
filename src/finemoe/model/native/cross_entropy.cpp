// Next-token cross-entropy on the products of linear.h, a chunk of tokens at a time; the gradient is computed while a
// chunk's scores are at hand (the idea of Liger's fused linear cross-entropy).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <vector>

#include "linear.h"
#include "parallel.h"
#include "swiglu.h"

namespace finemoe {
namespace {

// Scores at once. A weight that stays in the second cache is cheap to pass over: 1 MiB of scores then stays there too. One
// that does not is passed over rarely: 32 MiB.
int64_t chunk_rows(int64_t vocab, int64_t shared) {
  const int64_t scores = vocab * shared <= (1 << 18) ? 1 << 18 : 1 << 23;
  return std::max<int64_t>(64, scores / vocab);
}

// Scores of one token become weight * (softmax - onehot); returns weight * -log softmax[target].
double softmax_gradient(float* scores, int64_t n, int64_t target, float weight, bool gradient) {
  Vector high = splat(scores[0]);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) high = maximum(high, load(scores + j));
  float highest = scores[0];
  for (int lane = 0; lane < kLanes; ++lane) highest = std::max(highest, high[lane]);
  for (int64_t j = whole; j < n; ++j) highest = std::max(highest, scores[j]);
  const float chosen = scores[target] - highest;
  Vector sums{};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vector e = weight_of(load(scores + j) - highest);
    sums += e;
    store(scores + j, e);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  for (int64_t j = whole; j < n; ++j) sum += scores[j] = std::exp(scores[j] - highest);
  if (gradient) {
    const float scale = static_cast<float>(weight / sum);
    for (int64_t j = 0; j < whole; j += kLanes) store(scores + j, load(scores + j) * scale);
    for (int64_t j = whole; j < n; ++j) scores[j] *= scale;
    scores[target] -= weight;
  }
  return weight * (std::log(sum) - chosen);
}

const float* numbers(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be a contiguous float32 tensor on the CPU");
  return tensor.const_data_ptr<float>();
}

double cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                     const at::Tensor& weights, const std::optional<at::Tensor>& grad_hidden,
                     const std::optional<at::Tensor>& grad_weight) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2, "hidden and weight must be matrices");
  const int64_t tokens = hidden.size(0), shared = hidden.size(1), vocab = weight.size(0);
  TORCH_CHECK(weight.size(1) == shared && targets.numel() == tokens && weights.numel() == tokens && vocab > 0,
              "shapes of hidden, weight, targets and weights do not go together");
  TORCH_CHECK(grad_hidden.has_value() == grad_weight.has_value(), "both gradients or none");
  TORCH_CHECK(!grad_hidden || (grad_hidden->sizes() == hidden.sizes() && grad_weight->sizes() == weight.sizes()),
              "gradients must have the shapes of hidden and weight");
  TORCH_CHECK(targets.scalar_type() == at::kLong && targets.is_cpu() && targets.is_contiguous(),
              "targets must be contiguous int64 on the CPU");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(target[t] >= 0 && target[t] < vocab, "target ", target[t], " is outside the vocabulary of ", vocab);
  const float *x = numbers(hidden, "hidden"), *w = numbers(weight, "weight"), *token_weight = numbers(weights, "weights");
  float* out = grad_hidden ? const_cast<float*>(numbers(*grad_hidden, "grad_hidden")) : nullptr;
  float* out_weight = grad_weight ? const_cast<float*>(numbers(*grad_weight, "grad_weight")) : nullptr;
  const int64_t chunk = std::min(tokens, chunk_rows(vocab, shared));
  const std::unique_ptr<float[]> scores(new float[std::max<int64_t>(chunk * vocab, 1)]);
  std::vector<double> losses(tokens);
  if (out_weight && tokens == 0) std::memset(out_weight, 0, vocab * shared * sizeof(float));
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t rows = std::min(chunk, tokens - first);
    linear_forward(rows, vocab, shared, x + first * shared, floats(w, shared), scores.get());
    share_range(rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        losses[first + r] = softmax_gradient(scores.get() + r * vocab, vocab, target[first + r],
                                             token_weight[first + r], out != nullptr);
    });
    if (!out) continue;
    linear_grad_input(rows, vocab, shared, scores.get(), w, out + first * shared);
    linear_grad_weight(rows, vocab, shared, scores.get(), x + first * shared, out_weight, first > 0);
  }
  double total = 0;
  for (const double loss : losses) total += loss;
  return total;
}

}  // namespace
}  // namespace finemoe

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor weights, Tensor(a!)? grad_hidden, "
      "Tensor(b!)? grad_weight) -> float",
      finemoe::cross_entropy);
}
