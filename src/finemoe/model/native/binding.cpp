// torch.ops.finemoe.*: checks shapes and hands pointers on. Results go to tensors that the caller made.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "experts.h"
#include "linear.h"
#include "weights.h"

namespace {

using at::Tensor;
using finemoe::bytes_apart;
using finemoe::Experts;
using finemoe::matrix;

const float* numbers(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be a contiguous float32 tensor on the CPU");
  return tensor.const_data_ptr<float>();
}

float* writable(const Tensor& tensor, const char* name) { return const_cast<float*>(numbers(tensor, name)); }

float* wanted(const std::optional<Tensor>& tensor, const char* name) {
  return tensor ? writable(*tensor, name) : nullptr;
}

const int64_t* ids(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.is_cpu() && tensor.is_contiguous(), name,
              " must be a contiguous int64 tensor on the CPU");
  return tensor.const_data_ptr<int64_t>();
}

// What is read or written of this many numbers, as `numbers` and `writable` have it.
void check_size(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  TORCH_CHECK(!tensor || tensor->numel() == count, name, " must hold ", count, " numbers");
}

// Gate and up weights of all experts: matrices [width, hidden] that may lie between others.
const float* stacked(const Tensor& weight, const char* name) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_cpu() && weight.dim() == 3 && weight.stride(2) == 1 &&
                  weight.stride(1) == weight.size(2),
              name, " must be float32 [experts, width, hidden] on the CPU, each matrix contiguous");
  return weight.const_data_ptr<float>();
}

Experts describe(const Tensor& states, const std::optional<Tensor>& order, const std::optional<Tensor>& slots,
                 const std::optional<Tensor>& counts, const std::optional<Tensor>& gates, const Tensor& gate,
                 const Tensor& up, const Tensor& down, double limit) {
  Experts x{};
  TORCH_CHECK(states.dim() == 2 && gate.dim() > 2 && down.dim() > 2,
              "states must be a matrix, the weights one for each expert");
  x.states = numbers(states, "states");
  x.tokens = states.size(0), x.hidden = states.size(1);
  x.count = down.size(0), x.width = gate.size(1);
  x.gate_weight = matrix(gate, "gate_weight", {x.count, x.width}, x.hidden);
  x.up_weight = matrix(up, "up_weight", {x.count, x.width}, x.hidden);
  x.down_weight = matrix(down, "down_weight", {x.count, x.hidden}, x.width);
  x.up_stride = bytes_apart(gate), x.down_stride = bytes_apart(down);
  TORCH_CHECK(x.count < 2 || (x.gate_weight.format == x.up_weight.format && up.stride(0) == gate.stride(0)),
              "gate_weight and up_weight must be laid out alike");
  x.limit = static_cast<float>(limit);
  x.k = 1;
  x.begin.assign(1, 0);
  if (counts) {
    TORCH_CHECK(counts->numel() == x.count, "counts needs one number for each expert");
    const int64_t* count = ids(*counts, "counts");
    for (int64_t e = 0; e < x.count; ++e) {
      TORCH_CHECK(count[e] >= 0, "counts must not be negative");
      x.begin.push_back(x.begin.back() + count[e]);
    }
  } else {
    TORCH_CHECK(x.count == 1, "several experts need counts");
    x.begin.push_back(x.tokens);
  }
  TORCH_CHECK(x.rows() == (order ? order->numel() : x.tokens), "counts do not add up to the rows");
  if (!order) return x;
  TORCH_CHECK(slots && gates && slots->numel() == gates->numel() && slots->numel() % std::max<int64_t>(x.tokens, 1) == 0,
              "order, slots and gates do not go together");
  static const int64_t nothing = 0;  // an empty tensor has no address, and no address would mean: one row a token
  x.order = x.rows() ? ids(*order, "order") : &nothing;
  x.slots = ids(*slots, "slots");
  x.gates = numbers(*gates, "gates");
  x.k = slots->numel() / std::max<int64_t>(x.tokens, 1);
  return x;
}

void experts_forward(const Tensor& states, const std::optional<Tensor>& order, const std::optional<Tensor>& slots,
                     const std::optional<Tensor>& counts, const std::optional<Tensor>& gates, const Tensor& gate,
                     const Tensor& up, const Tensor& down, double limit, Tensor gate_up, Tensor output) {
  const Experts x = describe(states, order, slots, counts, gates, gate, up, down, limit);
  check_size(gate_up, "gate_up", x.rows() * 2 * x.width), check_size(output, "output", x.tokens * x.hidden);
  finemoe::experts_forward(x, writable(gate_up, "gate_up"), writable(output, "output"));
}

void experts_backward(const Tensor& grad, const Tensor& gate_up, const Tensor& states,
                      const std::optional<Tensor>& order, const std::optional<Tensor>& slots,
                      const std::optional<Tensor>& counts, const std::optional<Tensor>& gates, const Tensor& gate,
                      const Tensor& up, const Tensor& down, double limit, const std::optional<Tensor>& grad_states,
                      const std::optional<Tensor>& grad_gates, Tensor grad_gate, Tensor grad_up, Tensor grad_down) {
  const finemoe::ExpertGradients gradients{
      wanted(grad_states, "grad_states"), wanted(grad_gates, "grad_gates"),
      const_cast<float*>(stacked(grad_gate, "grad_gate")), const_cast<float*>(stacked(grad_up, "grad_up")),
      writable(grad_down, "grad_down")};
  const Experts x = describe(states, order, slots, counts, gates, gate, up, down, limit);
  TORCH_CHECK(gate.scalar_type() == at::kFloat && down.scalar_type() == at::kFloat && down.is_contiguous(),
              "only float32 weights have gradients");
  check_size(gate_up, "gate_up", x.rows() * 2 * x.width), check_size(grad, "grad", x.tokens * x.hidden);
  check_size(grad_states, "grad_states", x.tokens * x.hidden), check_size(grad_gates, "grad_gates", x.tokens * x.k);
  check_size(grad_down, "grad_down", down.numel());
  for (const Tensor& mine : {grad_gate, grad_up})
    TORCH_CHECK(mine.sizes() == gate.sizes() && (x.count < 2 || mine.stride(0) == gate.stride(0)),
                "gradients of gate_weight and up_weight must be laid out as these are");
  finemoe::experts_backward(x, numbers(gate_up, "gate_up"), numbers(grad, "grad"), gradients);
}

void check_linear(const Tensor& x, const Tensor& weight, const Tensor& out) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && out.dim() == 2, "x, weight and their product must be matrices");
  TORCH_CHECK(x.size(1) == weight.size(1) && x.size(0) == out.size(0) && weight.size(0) == out.size(1),
              "shapes of x, weight and their product do not go together");
}

void linear_forward(const Tensor& x, const Tensor& weight, Tensor out) {
  TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && x.size(0) == out.size(0), "x and its product must be matrices");
  finemoe::linear_forward(x.size(0), out.size(1), x.size(1), numbers(x, "x"),
                          matrix(weight, "weight", {out.size(1)}, x.size(1)), writable(out, "out"));
}

void linear_grad_input(const Tensor& grad, const Tensor& weight, Tensor out) {
  check_linear(out, weight, grad);
  finemoe::linear_grad_input(out.size(0), weight.size(0), weight.size(1), numbers(grad, "grad"),
                             numbers(weight, "weight"), writable(out, "out"));
}

void linear_grad_weight(const Tensor& grad, const Tensor& x, Tensor out) {
  check_linear(x, out, grad);
  finemoe::linear_grad_weight(x.size(0), out.size(0), x.size(1), numbers(grad, "grad"), numbers(x, "x"),
                              writable(out, "out"));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "experts_forward(Tensor states, Tensor? order, Tensor? slots, Tensor? counts, Tensor? gates, Tensor gate_weight, "
      "Tensor up_weight, Tensor down_weight, float limit, Tensor(a!) gate_up, Tensor(b!) output) -> ()",
      experts_forward);
  library.def(
      "experts_backward(Tensor grad, Tensor gate_up, Tensor states, Tensor? order, Tensor? slots, Tensor? counts, "
      "Tensor? gates, Tensor gate_weight, Tensor up_weight, Tensor down_weight, float limit, Tensor(a!)? grad_states, "
      "Tensor(b!)? grad_gates, Tensor(c!) grad_gate, Tensor(d!) grad_up, Tensor(e!) grad_down) -> ()",
      experts_backward);
  library.def("linear_forward(Tensor x, Tensor weight, Tensor(a!) out) -> ()", linear_forward);
  library.def("linear_grad_input(Tensor grad, Tensor weight, Tensor(a!) out) -> ()", linear_grad_input);
  library.def("linear_grad_weight(Tensor grad, Tensor x, Tensor(a!) out) -> ()", linear_grad_weight);
}
