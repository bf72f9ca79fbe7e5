// A few tokens through whole blocks in one call: attention with its cache, router, experts, norms and sums. What Python
// and torch take between small products would otherwise show: a seventh of a token with 200 M weights, most of it with
// few. The operations and their order are those of model/transformer.py, to the last bit.
#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <memory>
#include <vector>

#include "decode.h"
#include "experts.h"
#include "gemm.h"
#include "linear.h"
#include "norm.h"
#include "parallel.h"
#include "routing.h"
#include "weights.h"

namespace {

using at::Tensor;
using namespace finemoe;
using Optionals = c10::List<std::optional<Tensor>>;

const float* numbers(const Tensor& tensor, const char* name, int64_t count) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() == count,
              name, " must be ", count, " contiguous float32 numbers on the CPU");
  return tensor.const_data_ptr<float>();
}

struct Chosen {
  Routes routes;
  int64_t experts, k;
};

// What the blocks are made of, in the order in which they use it, and of each where its tokens stand: cosines, sines,
// positions and the index of its cache.
struct Parts {
  const Optionals& tensors;
  c10::IntArrayRef integers;
  c10::ArrayRef<double> reals;
  const Optionals& places;
  size_t t = 0, i = 0, r = 0, p = 0;

  Optional perhaps() {
    TORCH_CHECK(t < tensors.size(), "the blocks want more tensors than there are");
    return tensors.get(t++);
  }
  Tensor tensor() {
    const Optional found = perhaps();
    TORCH_CHECK(found, "the blocks want a tensor where none is given");
    return *found;
  }
  int64_t integer() {
    TORCH_CHECK(i < integers.size(), "the blocks want more integers than there are");
    return integers[i++];
  }
  Optional place() {
    TORCH_CHECK(p < places.size(), "the blocks want to know more places than are given");
    return places.get(p++);
  }
  Tensor known_place() {
    const Optional found = place();
    TORCH_CHECK(found, "the blocks want to know a place that is not given");
    return *found;
  }
  double real() {
    TORCH_CHECK(r < reals.size(), "the blocks want more numbers than there are");
    return reals[r++];
  }
  void check_used_up() const {
    TORCH_CHECK(t == tensors.size() && i == integers.size() && r == reals.size() && p == places.size(),
                "the blocks leave something over");
  }
};

// hidden, and what is made of it on the way; [rows, width] but for the attention, which wants sequences apart.
struct Pass {
  Tensor hidden, normed, made;
  int64_t rows, width;

  explicit Pass(const Tensor& given)
      : hidden(given.clone(at::MemoryFormat::Contiguous)), normed(at::empty_like(hidden)), made(at::empty_like(hidden)),
        rows(given.size(0) * given.size(1)), width(given.size(2)) {}

  void norm(const Tensor& weight, double eps) {
    const float *x = hidden.const_data_ptr<float>(), *w = numbers(weight, "norm", width);
    float* y = normed.mutable_data_ptr<float>();
    for (int64_t i = 0; i < rows; ++i) norm_row(x + i * width, w, width, static_cast<float>(eps), y + i * width);
  }

  void add() {
    float* x = hidden.mutable_data_ptr<float>();
    const float* y = made.const_data_ptr<float>();
    for (int64_t i = 0; i < rows * width; ++i) x[i] += y[i];
  }
};

void attend(Parts& parts, Pass& pass) {
  if (parts.integer() == 0) {
    const Tensor q = parts.tensor(), k = parts.tensor(), v = parts.tensor();
    const Optional q_bias = parts.perhaps(), k_bias = parts.perhaps(), v_bias = parts.perhaps();
    const Optional q_norm = parts.perhaps(), k_norm = parts.perhaps();
    const Tensor keys = parts.tensor(), values = parts.tensor(), o = parts.tensor();
    const Tensor cosine = parts.known_place(), sine = parts.known_place(), positions = parts.known_place();
    const double eps = parts.real(), scale = parts.real();
    decode_grouped_query(pass.normed, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, eps, parts.integer() != 0, keys,
                         values, scale, o, cosine, sine, positions, parts.place(), pass.made);
    return;
  }
  const Optional q_down = parts.perhaps(), q_norm = parts.perhaps();
  const Tensor q = parts.tensor(), down = parts.tensor(), norm = parts.tensor(), up = parts.tensor();
  const Tensor states = parts.tensor(), o = parts.tensor();
  const Tensor cosine = parts.known_place(), sine = parts.known_place(), positions = parts.known_place();
  const double eps = parts.real(), scale = parts.real();
  const int64_t heads = parts.integer();
  decode_latent(pass.normed, q_down, q_norm, q, down, norm, up, eps, heads, parts.integer() != 0, states, scale, o, cosine,
                sine, positions, parts.place(), pass.made);
}

Experts experts(const Pass& pass, const Tensor& gate_up, const Tensor& down, double limit) {
  TORCH_CHECK(gate_up.dim() > 2 && down.dim() > 2, "weights must be one matrix for each expert");
  Experts x{};
  x.tokens = pass.rows, x.hidden = pass.width, x.count = down.size(0), x.width = gate_up.size(1) / 2, x.k = 1;
  x.states = pass.normed.const_data_ptr<float>();
  x.gate_weight = matrix(gate_up, "gate_up_proj", {x.count, 2 * x.width}, x.hidden);
  x.up_weight = x.gate_weight.row(x.width);
  x.down_weight = matrix(down, "down_proj", {x.count, x.hidden}, x.width);
  x.up_stride = bytes_apart(gate_up), x.down_stride = bytes_apart(down);
  x.limit = static_cast<float>(limit);
  x.begin.assign(1, 0);
  return x;
}

std::unique_ptr<float[]> buffer(int64_t count) { return std::unique_ptr<float[]>(new float[std::max<int64_t>(count, 1)]); }

void dense(Parts& parts, const Pass& pass, float* out) {
  const Tensor gate = parts.tensor(), up = parts.tensor(), down = parts.tensor();
  Experts x{};
  x.tokens = pass.rows, x.hidden = pass.width, x.count = 1, x.width = gate.size(0), x.k = 1;
  x.states = pass.normed.const_data_ptr<float>();
  x.gate_weight = matrix(gate, "gate_proj", {x.width}, x.hidden);
  x.up_weight = matrix(up, "up_proj", {x.width}, x.hidden);
  x.down_weight = matrix(down, "down_proj", {x.hidden}, x.width);
  x.limit = static_cast<float>(parts.real());
  x.begin = {0, x.tokens};
  experts_forward(x, buffer(x.tokens * 2 * x.width).get(), out);
}

// By nobody but this thread: torch shares the router's product among threads by itself, and sums in another order where
// it cannot.
Chosen chosen(Parts& parts, Pass& pass) {
  Router router;
  router.weight = parts.tensor();
  router.bias = parts.perhaps();
  router.score = static_cast<Score>(parts.integer());
  router.k = parts.integer(), router.groups = parts.integer(), router.groups_per_token = parts.integer();
  router.best = parts.integer(), router.normalize = parts.integer() != 0, router.scale = parts.real();
  const Tensor flat = pass.normed.view({pass.rows, pass.width});
  return {route(flat, router), router.weight.size(0), router.k};
}

void mixture(Parts& parts, Pass& pass, const Chosen& by) {
  const Routes& routes = by.routes;
  const Tensor gate_up = parts.tensor(), down = parts.tensor();
  Experts x = experts(pass, gate_up, down, parts.real());
  TORCH_CHECK(x.count == by.experts, "the router has another number of experts than there are");
  for (int64_t e = 0; e < x.count; ++e) x.begin.push_back(x.begin.back() + routes.counts.const_data_ptr<int64_t>()[e]);
  x.k = by.k;
  x.order = routes.order.const_data_ptr<int64_t>(), x.slots = routes.slots.const_data_ptr<int64_t>();
  x.gates = numbers(routes.gates, "gates", x.tokens * x.k);
  float* out = pass.made.mutable_data_ptr<float>();
  experts_forward(x, buffer(x.rows() * 2 * x.width).get(), out);
  if (!parts.integer()) return;
  const auto shared = buffer(pass.rows * pass.width);
  dense(parts, pass, shared.get());
  if (const Optional weight = parts.perhaps()) {
    Tensor gate = at::empty({pass.rows, 1}, at::kFloat);
    linear_forward(pass.rows, 1, pass.width, x.states, floats(numbers(*weight, "shared_gate", pass.width), pass.width),
                   gate.mutable_data_ptr<float>());
    gate = gate.sigmoid();
    for (int64_t i = 0; i < pass.rows; ++i)
      for (int64_t j = 0; j < pass.width; ++j) shared[i * pass.width + j] *= gate.const_data_ptr<float>()[i];
  }
  for (int64_t i = 0; i < pass.rows * pass.width; ++i) out[i] += shared[i];
}

// What the kernels can take: all numbers float32 or blocks of bytes, all counts int64, here and in one piece.
bool plain(const Optionals& tensors) {
  for (const Optional& tensor : tensors) {
    if (!tensor) continue;
    const at::ScalarType kind = tensor->scalar_type();
    if (!tensor->is_cpu() || (kind != at::kFloat && kind != at::kLong && kind != at::kByte)) return false;
  }
  return true;
}

// What comes out, and of each mixture how many tokens each expert got and which experts each token; empty where a tensor
// is none that the kernels can take.
std::vector<Tensor> decode_blocks(const Tensor& hidden, int64_t count, const Optionals& tensors,
                                  c10::IntArrayRef integers, c10::ArrayRef<double> reals, const Optionals& places) {
  TORCH_CHECK(hidden.dim() == 3 && hidden.scalar_type() == at::kFloat && hidden.is_cpu() &&
                  hidden.size(0) * hidden.size(1) < kFewRows,
              "hidden must be float32 [batch, seq, hidden] of few tokens on the CPU");
  if (!plain(tensors)) return {};
  Parts parts{tensors, integers, reals, places};
  Pass pass(hidden);
  std::vector<Tensor> found{Tensor()};
  std::optional<Chosen> by;
  for (int64_t block = 0; block < count || by;) {
    bool routes = false;
    with_team([&] {
      if (by) mixture(parts, pass, *by), pass.add();
      for (; block < count && !routes; ++block) {
        pass.norm(parts.tensor(), parts.real());
        attend(parts, pass);
        pass.add();
        pass.norm(parts.tensor(), parts.real());
        routes = parts.integer() != 0;
        if (!routes) dense(parts, pass, pass.made.mutable_data_ptr<float>()), pass.add();
      }
    });
    by.reset();
    if (routes) {
      by = chosen(parts, pass);
      found.insert(found.end(), {by->routes.counts, by->routes.ids});
    }
  }
  parts.check_used_up();
  found[0] = pass.hidden;
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def("decode_blocks(Tensor hidden, int count, Tensor?[] tensors, int[] integers, float[] reals, "
              "Tensor?[] places) -> Tensor[]",
              decode_blocks);
}
