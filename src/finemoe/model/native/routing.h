// Which experts a token goes to.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace finemoe {

// Assignments sorted by expert: order, its inverse, and how many each expert has.
void sort_by_expert(const at::Tensor& expert_ids, at::Tensor order, at::Tensor slots, at::Tensor counts);

// The k largest scores of each row, largest first, of equals the first; NaN counts as the least.
void top_k(const at::Tensor& scores, at::Tensor chosen);

enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus };

// A router without constraint: the same operations, in the same order, as moe/routers/.
struct Router {
  at::Tensor weight;  // [experts, hidden]
  std::optional<at::Tensor> bias;
  Score score;
  int64_t k, groups, groups_per_token, best;
  bool normalize;
  double scale;
};

struct Routes {
  at::Tensor ids, gates, order, slots, counts;
};

Routes route(const at::Tensor& hidden, const Router& router);

}  // namespace finemoe
