// Which experts a token goes to: ordering, which rounds nothing, and the routers' arithmetic in torch's own operations.
#include "routing.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace finemoe {
namespace {

using at::Tensor;

const int64_t* integers(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be a contiguous int64 tensor on the CPU");
  return tensor.const_data_ptr<int64_t>();
}

// `scores` with minus infinity outside of each token's best groups, as routers/select.py has it.
Tensor within_groups(const Tensor& scores, const Router& router) {
  const Tensor grouped = scores.unflatten(-1, {router.groups, -1});
  const auto best = std::min<int64_t>(router.best, grouped.size(-1));
  const Tensor highest = std::get<0>(grouped.topk(best, -1));
  const double never = -std::numeric_limits<double>::infinity();
  const Tensor empty = highest.select(-1, 0).isneginf();
  const Tensor sums = highest.masked_fill(highest.isneginf(), 0.0).sum(-1).masked_fill(empty, never);
  const Tensor chosen = std::get<1>(sums.topk(router.groups_per_token, -1));
  const Tensor outside = at::ones_like(sums, at::kBool).scatter_(1, chosen, false);
  return grouped.masked_fill(outside.unsqueeze(-1), never).flatten(1);
}

}  // namespace

// Assignments sorted by expert, without comparing: where each expert's rows begin follows from the counts.
void sort_by_expert(const Tensor& expert_ids, Tensor order, Tensor slots, Tensor counts) {
  const int64_t* expert = integers(expert_ids, "expert_ids");
  int64_t *row = const_cast<int64_t*>(integers(order, "order")), *slot = const_cast<int64_t*>(integers(slots, "slots"));
  int64_t* count = const_cast<int64_t*>(integers(counts, "counts"));
  const int64_t n = expert_ids.numel(), experts = counts.numel();
  TORCH_CHECK(order.numel() == n && slots.numel() == n, "order and slots need one place for each assignment");
  std::fill_n(count, experts, 0);
  for (int64_t a = 0; a < n; ++a) {
    TORCH_CHECK(expert[a] >= 0 && expert[a] < experts, "expert id ", expert[a], " is not below ", experts);
    ++count[expert[a]];
  }
  std::vector<int64_t> next(experts, 0);
  for (int64_t e = 1; e < experts; ++e) next[e] = next[e - 1] + count[e - 1];
  for (int64_t a = 0; a < n; ++a) {
    slot[a] = next[expert[a]]++;
    row[slot[a]] = a;
  }
}

// The k largest scores of each row, largest first, of equals the first; NaN counts as the least.
void top_k(const Tensor& scores, Tensor chosen) {
  TORCH_CHECK(scores.scalar_type() == at::kFloat && scores.is_cpu() && scores.is_contiguous(),
              "scores must be a contiguous float32 tensor on the CPU");
  const float* all = scores.const_data_ptr<float>();
  int64_t* out = const_cast<int64_t*>(integers(chosen, "chosen"));
  TORCH_CHECK(scores.dim() == 2 && chosen.dim() == 2 && scores.size(0) == chosen.size(0),
              "scores and chosen must be matrices of as many rows");
  const int64_t n = scores.size(1), k = chosen.size(1);
  TORCH_CHECK(0 < k && k <= n, "k must be from 1 to the ", n, " columns of scores, not ", k);
  share_range(scores.size(0), 64, [&](int64_t first, int64_t last) {
    std::vector<float> best(k);
    for (int64_t row = first; row < last; ++row) {
      int64_t* taken = out + row * k;
      for (int64_t j = 0; j < n; ++j) {
        const float asked = all[row * n + j];
        const float score = std::isnan(asked) ? -std::numeric_limits<float>::infinity() : asked;
        if (j >= k && score <= best[k - 1]) continue;
        int64_t place = std::min(j, k - 1);
        for (; place > 0 && score > best[place - 1]; --place) {
          best[place] = best[place - 1];
          taken[place] = taken[place - 1];
        }
        best[place] = score;
        taken[place] = j;
      }
    }
  });
}

Routes route(const Tensor& hidden, const Router& router) {
  const Tensor logits = at::matmul(hidden, router.weight.t());
  Tensor scores;
  switch (router.score) {
    case Score::kSoftmax:
      scores = logits.softmax(-1);
      break;
    case Score::kSigmoid:
      scores = logits.sigmoid();
      break;
    case Score::kSqrtSoftplus:
      scores = at::softplus(logits).clamp_min(std::numeric_limits<float>::min()).sqrt();
      break;
  }
  Tensor ranked = router.bias ? scores + *router.bias : scores;
  if (router.groups != router.groups_per_token) ranked = within_groups(ranked, router);
  Routes found;
  found.ids = at::empty({hidden.size(0), router.k}, at::kLong);
  top_k(ranked, found.ids);
  if (!router.normalize) {
    found.gates = scores.gather(-1, found.ids);
  } else if (router.score == Score::kSoftmax) {
    found.gates = logits.gather(-1, found.ids).softmax(-1);
  } else {
    const Tensor chosen = scores.gather(-1, found.ids);
    found.gates = chosen / (chosen.sum(-1, true) + 1e-20);
  }
  found.gates = (found.gates * router.scale).contiguous();
  found.order = at::empty({found.ids.numel()}, at::kLong);
  found.slots = at::empty_like(found.order);
  found.counts = at::empty({router.weight.size(0)}, at::kLong);
  sort_by_expert(found.ids, found.order, found.slots, found.counts);
  return found;
}

}  // namespace finemoe

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def("sort_by_expert(Tensor expert_ids, Tensor(a!) order, Tensor(b!) slots, Tensor(c!) counts) -> ()",
              finemoe::sort_by_expert);
  library.def("top_k(Tensor scores, Tensor(a!) chosen) -> ()", finemoe::top_k);
}
