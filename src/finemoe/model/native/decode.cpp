// A few tokens through a whole attention layer and its cache in one call. Their products are bounded by reading the
// weights; what an operator and a parallel region each cost between them would show.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "attention.h"
#include "blocks.h"
#include "decode.h"
#include "linear.h"
#include "norm.h"
#include "rope.h"
#include "weights.h"

namespace {

using at::Tensor;
using namespace finemoe;

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t count) { return Buffer(new float[std::max<int64_t>(count, 1)]); }

const float* numbers(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be contiguous float32 on the CPU");
  return tensor.const_data_ptr<float>();
}

struct Weight {
  Matrix matrix;
  const float* bias;
  int64_t outputs, inputs;
};

Weight weight(const Tensor& tensor, const char* name, int64_t inputs, const Optional& bias = {}) {
  TORCH_CHECK(tensor.dim() > 1, name, " must be a matrix");
  TORCH_CHECK(!bias || bias->numel() == tensor.size(0), "the bias of ", name, " has another size");
  return {matrix(tensor, name, {tensor.size(0)}, inputs), bias ? numbers(*bias, "bias") : nullptr, tensor.size(0), inputs};
}

// Rows of x through several weights, results side by side in rows of `out`; all threads read one part of each.
void project(const float* x, int64_t stride, int64_t rows, std::initializer_list<Weight> weights, float* out) {
  int64_t all = 0;
  for (const Weight& w : weights) all += w.outputs;
  const int64_t inputs = weights.begin()->inputs;
  share_range(all, std::max<int64_t>(8, 16384 / std::max<int64_t>(inputs, 1)), [&](int64_t first, int64_t last) {
    const float* in[kFewRows];
    float* result[kFewRows];
    for (int64_t r = 0; r < rows; ++r) in[r] = x + r * stride;
    int64_t start = 0;  // of the weight's results
    for (const Weight& w : weights) {
      constexpr int64_t kPart = 16;  // rows of the weight that stay near for all rows of x
      for (int64_t j = std::max(first, start); j < std::min(last, start + w.outputs); j += kPart) {
        const int64_t count = std::min({kPart, last - j, start + w.outputs - j});
        for (int64_t r = 0; r < rows; ++r) result[r] = out + r * all + j;
        few_rows(in, rows, w.matrix.row(j - start), count, inputs, result);
        for (int64_t r = 0; w.bias && r < rows; ++r)
          for (int64_t i = 0; i < count; ++i) result[r][i] += w.bias[j - start + i];
      }
      start += w.outputs;
    }
  });
}

// The tokens of one call: where they stand, and by what angles their pairs turn.
struct Tokens {
  int64_t batch, seq, pairs, keys;
  const float *cosine, *sine;
  bool interleaved;
  std::vector<int64_t> place, last;  // last: one more, what they see

  Tokens(const Tensor& hidden, const Tensor& positions, const Tensor& cos, const Tensor& sin, bool neighbours,
         int64_t capacity)
      : batch(hidden.size(0)), seq(hidden.size(1)), pairs(cos.size(-1)), keys(0), cosine(numbers(cos, "cosine")),
        sine(numbers(sin, "sine")), interleaved(neighbours) {
    TORCH_CHECK(hidden.dim() == 3 && count() < kFewRows, "hidden must be [batch, seq, hidden] of few tokens");
    TORCH_CHECK(positions.scalar_type() == at::kLong && positions.is_cpu() && positions.dim() == 2 &&
                    positions.size(0) == batch && positions.size(1) == seq && cos.numel() == count() * pairs &&
                    sin.numel() == count() * pairs,
                "positions or angles do not fit the tokens");
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < seq; ++i) {
        place.push_back(positions.const_data_ptr<int64_t>()[b * positions.stride(0) + i * positions.stride(1)]);
        last.push_back(place.back() + 1);
        keys = std::max(keys, last.back());
        TORCH_CHECK_INDEX(0 <= place.back() && place.back() < capacity, "position ", place.back(),
                          " is beyond the cache's capacity of ", capacity, " tokens");
      }
  }

  int64_t count() const { return batch * seq; }

  // The first components of x, where there are more than turn.
  void turn(int64_t token, float* x) const {
    const float *c = cosine + token * pairs, *s = sine + token * pairs;
    interleaved ? turn_neighbours(x, c, s, 1.0f, pairs, x) : turn_halves(x, c, s, 1.0f, pairs, x);
  }
};

void norm_rows(float* x, int64_t stride, int64_t rows, int64_t width, const Optional& scale, double eps) {
  if (!scale) return;
  const float* w = numbers(*scale, "norm");
  const int64_t size = scale->numel();  // one head, or all of them together
  TORCH_CHECK(size > 0 && width % size == 0, "a norm does not fit what it is for");
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < width; j += size)
      norm_row(x + r * stride + j, w, size, static_cast<float>(eps), x + r * stride + j);
}

Heads cache_heads(const Tensor& cache, const Optional& index, const char* name, int64_t batch) {
  if (index) return in_blocks(cache, *index, name, batch);
  TORCH_CHECK(cache.scalar_type() == at::kFloat && cache.is_cpu() && cache.dim() == 4 && cache.size(0) == batch &&
                  cache.stride(3) == 1,
              name, " must be float32 [batch, heads, capacity, width] on the CPU");
  return {cache.mutable_data_ptr<float>(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

void output(const float* mixed, int64_t rows, int64_t width, const Tensor& o_proj, Tensor& out) {
  const Weight o = weight(o_proj, "o_proj", width);
  TORCH_CHECK(out.numel() == rows * o.outputs, "out does not fit o_proj");
  project(mixed, width, rows, {o}, const_cast<float*>(numbers(out, "out")));
}

}  // namespace

namespace finemoe {

void decode_grouped_query(const Tensor& hidden, const Tensor& q_proj, const Tensor& k_proj, const Tensor& v_proj,
                          const Optional& q_bias, const Optional& k_bias, const Optional& v_bias,
                          const Optional& q_norm, const Optional& k_norm, double eps, bool interleaved, Tensor keys,
                          Tensor values, double scale, const Tensor& o_proj, const Tensor& cosine, const Tensor& sine,
                          const Tensor& positions, const Optional& index, Tensor out) {
  const Tokens tokens(hidden, positions, cosine, sine, interleaved, index ? index->size(1) : keys.size(2));
  const int64_t rows = tokens.count(), inputs = hidden.size(2);
  const Weight q = weight(q_proj, "q_proj", inputs, q_bias), k = weight(k_proj, "k_proj", inputs, k_bias);
  const Weight v = weight(v_proj, "v_proj", inputs, v_bias);
  const int64_t stride = q.outputs + k.outputs + v.outputs;
  Attention x{};
  x.batch = tokens.batch, x.queries = tokens.seq, x.keys = tokens.keys, x.kv_heads = keys.size(1);
  x.width = x.value_width = keys.size(3);
  x.heads = q.outputs / x.width;
  TORCH_CHECK(k.outputs == x.kv_heads * x.width && v.outputs == k.outputs && q.outputs == x.heads * x.width &&
                  x.heads % x.kv_heads == 0 && 2 * tokens.pairs <= x.width && values.sizes() == keys.sizes(),
              "the shapes of hidden, weights and cache do not go together");
  x.key = cache_heads(keys, index, "keys", x.batch), x.value = cache_heads(values, index, "values", x.batch);
  const Buffer made = buffer(rows * stride), mixed = buffer(rows * q.outputs);
  project(numbers(hidden, "hidden"), inputs, rows, {q, k, v}, made.get());
  norm_rows(made.get(), stride, rows, q.outputs, q_norm, eps);
  norm_rows(made.get() + q.outputs, stride, rows, k.outputs, k_norm, eps);
  for (int64_t t = 0; t < rows; ++t) {
    float* row = made.get() + t * stride;
    for (int64_t h = 0; h < x.heads + x.kv_heads; ++h) tokens.turn(t, row + h * x.width);
    for (int64_t h = 0; h < x.kv_heads; ++h) {
      const float* from = row + q.outputs + h * x.width;
      std::copy_n(from, x.width, x.key.at(t / x.queries, h, tokens.place[t]));
      std::copy_n(from + k.outputs, x.width, x.value.at(t / x.queries, h, tokens.place[t]));
    }
  }
  x.query = {made.get(), x.queries * stride, x.width, stride};
  x.output = {mixed.get(), x.queries * q.outputs, x.width, q.outputs};
  x.last = tokens.last.data();
  x.scale = static_cast<float>(scale);
  attention_forward(x);
  output(mixed.get(), rows, q.outputs, o_proj, out);
}

namespace {

// The absorbed form: W_UK is applied to the queries, W_UV to what is mixed from the latents themselves.
struct Absorbed {
  const Tokens& tokens;
  int64_t heads, plain, rotary, latent, value;
  const float* up;  // [heads, plain + value, latent]

  int64_t width() const { return latent + rotary; }
  const float* up_of(int64_t head) const { return up + head * (plain + value) * latent; }

  // queries: rows [heads, plain + rotary], `stride` apart.
  void queries(const float* from, int64_t stride, float* out) const {
    share_range(heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t h = first; h < last; ++h) {
        const float* query = from + h * (plain + rotary);
        float* rows[kFewRows];
        for (int64_t t = 0; t < tokens.count(); ++t) {
          rows[t] = out + (t * heads + h) * width();
          std::copy_n(query + t * stride + plain, rotary, rows[t] + latent);
        }
        mix_rows(query, stride, tokens.count(), Strided{up_of(h), latent}, plain, latent, rows, false);
      }
    });
  }

  void values(const float* mixed, float* out) const {
    share_range(heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t h = first; h < last; ++h) {
        const float* in[kFewRows];
        float* rows[kFewRows];
        for (int64_t t = 0; t < tokens.count(); ++t) {
          in[t] = mixed + (t * heads + h) * latent;
          rows[t] = out + (t * heads + h) * value;
        }
        few_rows(in, tokens.count(), up_of(h) + plain * latent, value, latent, rows);
      }
    });
  }
};

}  // namespace

void decode_latent(const Tensor& hidden, const Optional& q_down_proj, const Optional& q_norm, const Tensor& q_proj,
                   const Tensor& kv_down_proj, const Tensor& kv_norm, const Tensor& kv_up_proj, double eps,
                   int64_t heads, bool interleaved, Tensor states, double scale, const Tensor& o_proj, const Tensor& cosine,
                   const Tensor& sine, const Tensor& positions, const Optional& index, Tensor out) {
  TORCH_CHECK(states.dim() == 3, "states must be [batch, capacity, width]");
  const Tokens tokens(hidden, positions, cosine, sine, interleaved, index ? index->size(1) : states.size(1));
  const int64_t rows = tokens.count(), inputs = hidden.size(2), latent = kv_norm.numel(), rotary = 2 * tokens.pairs;
  const Weight first = weight(q_down_proj ? *q_down_proj : q_proj, "query projection", inputs);
  const Weight q = weight(q_proj, "q_proj", q_down_proj ? first.outputs : inputs);
  const Weight down = weight(kv_down_proj, "kv_down_proj", inputs), up = weight(kv_up_proj, "kv_up_proj", latent);
  const int64_t plain = q.outputs / heads - rotary, value = up.outputs / heads - plain;
  TORCH_CHECK(down.outputs == latent + rotary && up.matrix.format == Format::kFloat &&
                  q.outputs == heads * (plain + rotary) && up.outputs == heads * (plain + value) && plain > 0 &&
                  value > 0 && states.size(2) == down.outputs,
              "the shapes of hidden, weights and cache do not go together");
  const int64_t stride = first.outputs + down.outputs;
  const Buffer made = buffer(rows * stride), compressed = buffer(q_down_proj ? rows * q.outputs : 0);
  project(numbers(hidden, "hidden"), hidden.size(2), rows, {first, down}, made.get());
  float* query = made.get();
  int64_t query_stride = stride;
  if (q_down_proj) {
    norm_rows(made.get(), stride, rows, first.outputs, q_norm, eps);
    query = compressed.get(), query_stride = q.outputs;
    project(made.get(), stride, rows, {q}, query);
  }
  norm_rows(made.get() + first.outputs, stride, rows, latent, kv_norm, eps);
  Attention x{};
  x.batch = tokens.batch, x.heads = heads, x.kv_heads = 1, x.queries = tokens.seq, x.keys = tokens.keys;
  x.width = latent + rotary, x.value_width = latent;
  x.key = x.value = cache_heads(states.unsqueeze(1), index, "states", x.batch);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t h = 0; h < heads; ++h) tokens.turn(t, query + t * query_stride + h * (plain + rotary) + plain);
    float* fresh = made.get() + t * stride + first.outputs;
    tokens.turn(t, fresh + latent);
    std::copy_n(fresh, x.width, x.key.at(t / x.queries, 0, tokens.place[t]));
  }
  const Absorbed absorbed{tokens, heads, plain, rotary, latent, value, up.matrix.floats()};
  const Buffer queries = buffer(rows * heads * x.width), mixed = buffer(rows * heads * latent);
  const Buffer result = buffer(rows * heads * value);
  absorbed.queries(query, query_stride, queries.get());
  x.query = {queries.get(), x.queries * heads * x.width, x.width, heads * x.width};
  x.output = {mixed.get(), x.queries * heads * latent, latent, heads * latent};
  x.last = tokens.last.data();
  x.scale = static_cast<float>(scale);
  attention_forward(x);
  absorbed.values(mixed.get(), result.get());
  output(result.get(), rows, heads * value, o_proj, out);
}

}  // namespace finemoe

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "decode_grouped_query(Tensor hidden, Tensor q_proj, Tensor k_proj, Tensor v_proj, Tensor? q_bias, "
      "Tensor? k_bias, Tensor? v_bias, Tensor? q_norm, Tensor? k_norm, float eps, bool interleaved, Tensor(a!) keys, "
      "Tensor(b!) values, float scale, Tensor o_proj, Tensor cosine, Tensor sine, Tensor positions, Tensor? index, "
      "Tensor(c!) out) -> ()",
      finemoe::decode_grouped_query);
  library.def(
      "decode_latent(Tensor hidden, Tensor? q_down_proj, Tensor? q_norm, Tensor q_proj, Tensor kv_down_proj, "
      "Tensor kv_norm, Tensor kv_up_proj, float eps, int heads, bool interleaved, Tensor(a!) states, "
      "float scale, Tensor o_proj, Tensor cosine, Tensor sine, Tensor positions, Tensor? index, Tensor(b!) out) -> ()",
      finemoe::decode_latent);
}
