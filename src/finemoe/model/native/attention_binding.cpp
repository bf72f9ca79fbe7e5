// torch.ops.finemoe.attention_*: checks shapes and hands pointers on. Results go to tensors that the caller made.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "attention.h"
#include "blocks.h"

namespace {

using at::Tensor;
using finemoe::Attention;
using finemoe::Heads;

Heads heads(const Tensor& states, const char* name, int64_t batch, int64_t count, int64_t rows, int64_t width) {
  TORCH_CHECK(states.scalar_type() == at::kFloat && states.is_cpu() && states.dim() == 4 && states.size(0) == batch &&
                  states.size(1) == count && states.size(2) == rows && states.size(3) == width &&
                  (width < 2 || states.stride(3) == 1 || states.numel() == 0),
              name, " must be float32 [", batch, ", ", count, ", ", rows, ", ", width,
              "] on the CPU, its last dimension contiguous");
  return {const_cast<float*>(states.const_data_ptr<float>()), states.stride(0), states.stride(1), states.stride(2)};
}

}  // namespace

Heads finemoe::in_blocks(const Tensor& store, const Tensor& index, const char* name, int64_t batch) {
  TORCH_CHECK(store.scalar_type() == at::kFloat && store.is_cpu() && store.dim() == 4 && store.stride(3) == 1 &&
                  store.stride(1) == store.size(2) * store.stride(2) &&
                  store.stride(0) == store.size(1) * store.stride(1),
              name, " must be float32 [blocks, heads, size, width] on the CPU, its rows equally far apart");
  TORCH_CHECK(index.scalar_type() == at::kLong && index.is_cpu() && index.dim() == 2 && index.size(0) == batch &&
                  (index.size(1) < 2 || index.stride(1) == 1),
              "the index must be int64 [sequences, rows] on the CPU");
  const int64_t rows = store.size(0) * store.size(1) * store.size(2), room = rows - (store.size(1) - 1) * store.size(2);
  const int64_t* numbers = index.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t r = 0; r < index.size(1); ++r) {
      const int64_t row = numbers[b * index.stride(0) + r];
      TORCH_CHECK_INDEX(0 <= row && row < room, "row ", row, " is outside the blocks of the cache");
    }
  return {const_cast<float*>(store.const_data_ptr<float>()), 0, store.stride(1), store.stride(2), numbers,
          index.stride(0)};
}

namespace {

const int64_t* bounds(const std::optional<Tensor>& bound, int64_t batch, int64_t queries) {
  if (!bound) return nullptr;
  TORCH_CHECK(bound->scalar_type() == at::kLong && bound->is_cpu() && bound->is_contiguous() && bound->dim() == 2 &&
                  bound->size(0) == batch && bound->size(1) == queries,
              "bounds of what a query sees must be contiguous int64 [batch, queries] on the CPU");
  return bound->const_data_ptr<int64_t>();
}

Attention describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& first,
                   const std::optional<Tensor>& last, double scale, const Tensor& output,
                   const std::optional<Tensor>& softmax) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value have four dimensions");
  Attention x{};
  x.batch = query.size(0), x.heads = query.size(1), x.queries = query.size(2), x.width = query.size(3);
  x.kv_heads = key.size(1), x.keys = key.size(2), x.value_width = value.size(3);
  TORCH_CHECK(x.kv_heads > 0 && x.heads % x.kv_heads == 0, "every key head must serve the same number of query heads");
  TORCH_CHECK(last || x.queries == x.keys, "without bounds there are as many queries as keys");
  TORCH_CHECK(x.keys < (int64_t{1} << 31), "too many keys");
  x.query = heads(query, "query", x.batch, x.heads, x.queries, x.width);
  x.key = heads(key, "key", x.batch, x.kv_heads, x.keys, x.width);
  x.value = heads(value, "value", x.batch, x.kv_heads, x.keys, x.value_width);
  x.output = heads(output, "output", x.batch, x.heads, x.queries, x.value_width);
  x.first = bounds(first, x.batch, x.queries);
  x.last = bounds(last, x.batch, x.queries);
  x.scale = static_cast<float>(scale);
  if (softmax) {
    const int64_t rows = x.batch * x.heads * x.queries;
    TORCH_CHECK(softmax->scalar_type() == at::kFloat && softmax->is_cpu() && softmax->is_contiguous() &&
                    softmax->numel() == 2 * rows,
                "softmax must be contiguous float32 [2, batch, heads, queries] on the CPU");
    x.top = const_cast<float*>(softmax->const_data_ptr<float>());
    x.log_sum = x.top + rows;
  }
  return x;
}

void attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& first,
                       const std::optional<Tensor>& last, double scale, Tensor output,
                       std::optional<Tensor> softmax) {
  finemoe::attention_forward(describe(query, key, value, first, last, scale, output, softmax));
}

void attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                        const std::optional<Tensor>& first, const std::optional<Tensor>& last, double scale,
                        const Tensor& output, const Tensor& softmax, Tensor grad_query, Tensor grad_key,
                        Tensor grad_value) {
  const Attention x = describe(query, key, value, first, last, scale, output, softmax);
  finemoe::attention_backward(
      x, {heads(grad, "grad", x.batch, x.heads, x.queries, x.value_width),
          heads(grad_query, "grad_query", x.batch, x.heads, x.queries, x.width),
          heads(grad_key, "grad_key", x.batch, x.kv_heads, x.keys, x.width),
          heads(grad_value, "grad_value", x.batch, x.kv_heads, x.keys, x.value_width)});
}

// What sequences see of a cache in blocks: keys and values [blocks, kv_heads, size, width], rows as `index` says.
void attention_in_blocks(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& index,
                         const Tensor& last, double scale, Tensor output) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value have four dimensions");
  Attention x{};
  x.batch = query.size(0), x.heads = query.size(1), x.queries = query.size(2), x.width = query.size(3);
  x.kv_heads = key.size(1), x.keys = index.size(1), x.value_width = value.size(3);
  TORCH_CHECK(x.kv_heads > 0 && x.heads % x.kv_heads == 0 && key.size(3) == x.width && value.size(1) == x.kv_heads,
              "the shapes of query and cache do not go together");
  x.query = heads(query, "query", x.batch, x.heads, x.queries, x.width);
  x.key = finemoe::in_blocks(key, index, "key", x.batch);
  x.value = finemoe::in_blocks(value, index, "value", x.batch);
  x.output = heads(output, "output", x.batch, x.heads, x.queries, x.value_width);
  x.last = bounds(last, x.batch, x.queries);
  x.scale = static_cast<float>(scale);
  finemoe::attention_forward(x);
}

// states [batch, heads, seq, width] go to the places `positions [batch, seq]` of cache [batch, heads, capacity, width],
// or of a store of blocks.
void attention_store(const Tensor& states, const Tensor& positions, Tensor cache, const std::optional<Tensor>& index) {
  TORCH_CHECK(states.dim() == 4 && cache.dim() == 4, "states and cache have four dimensions");
  const int64_t batch = states.size(0), count = states.size(1), seq = states.size(2), width = states.size(3);
  const Heads from = heads(states, "states", batch, count, seq, width);
  const int64_t capacity = index ? index->size(1) : cache.size(2);
  TORCH_CHECK(cache.size(1) == count && cache.size(3) == width, "states and cache do not go together");
  const Heads to = index ? finemoe::in_blocks(cache, *index, "cache", batch)
                         : heads(cache, "cache", batch, count, capacity, width);
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.is_cpu() && positions.dim() == 2 &&
                  positions.size(0) == batch && positions.size(1) == seq,
              "positions must be int64 [batch, seq] on the CPU");
  const int64_t* place = positions.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < seq; ++i) {
      const int64_t at = place[b * positions.stride(0) + i * positions.stride(1)];
      TORCH_CHECK_INDEX(0 <= at && at < capacity, "position ", at, " is beyond the cache's capacity of ", capacity,
                        " tokens");
      for (int64_t h = 0; h < count; ++h) std::copy_n(from.at(b, h, i), width, to.at(b, h, at));
    }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? first, Tensor? last, float scale, "
      "Tensor(a!) output, Tensor(b!)? softmax) -> ()",
      attention_forward);
  library.def(
      "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? first, Tensor? last, "
      "float scale, Tensor output, Tensor softmax, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value) -> ()",
      attention_backward);
  library.def("attention_store(Tensor states, Tensor positions, Tensor(a!) cache, Tensor? index=None) -> ()",
              attention_store);
  library.def(
      "attention_in_blocks(Tensor query, Tensor key, Tensor value, Tensor index, Tensor last, float scale, "
      "Tensor(a!) output) -> ()",
      attention_in_blocks);
}
