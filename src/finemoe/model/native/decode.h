// A few tokens through a whole attention layer and its cache. Arguments as registered in decode.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace finemoe {

using Optional = std::optional<at::Tensor>;

void decode_grouped_query(const at::Tensor& hidden, const at::Tensor& q_proj, const at::Tensor& k_proj,
                          const at::Tensor& v_proj, const Optional& q_bias, const Optional& k_bias,
                          const Optional& v_bias, const Optional& q_norm, const Optional& k_norm, double eps,
                          bool interleaved, at::Tensor keys, at::Tensor values, double scale, const at::Tensor& o_proj,
                          const at::Tensor& cosine, const at::Tensor& sine, const at::Tensor& positions,
                          const Optional& index, at::Tensor out);

void decode_latent(const at::Tensor& hidden, const Optional& q_down_proj, const Optional& q_norm,
                   const at::Tensor& q_proj, const at::Tensor& kv_down_proj, const at::Tensor& kv_norm,
                   const at::Tensor& kv_up_proj, double eps, int64_t heads, bool interleaved, at::Tensor states,
                   double scale, const at::Tensor& o_proj, const at::Tensor& cosine, const at::Tensor& sine,
                   const at::Tensor& positions, const Optional& index, at::Tensor out);

}  // namespace finemoe
