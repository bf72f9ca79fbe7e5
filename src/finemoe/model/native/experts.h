// The routed experts of a layer: gather, products, SwiGLU, weights and sum, forward and backward, without copies of the
// token states. A dense SwiGLU is the case of one expert that takes every row.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace finemoe {

struct Experts {
  int64_t tokens, hidden, width, count;
  const float* states;   // [tokens, hidden]
  const int64_t* order;  // [rows] assignments (token * k + choice) sorted by expert; null: row r is token r
  const int64_t* slots;  // [tokens * k] row of each assignment, -1 where dropped; null with `order`
  int64_t k;
  std::vector<int64_t> begin;  // [count + 1] first row of each expert
  const float* gates;          // [tokens * k]; null: every weight is 1
  Matrix gate_weight;          // of expert 0: [width, hidden]
  Matrix up_weight;
  int64_t up_stride;    // bytes between the gate (or up) weights of two experts
  Matrix down_weight;   // of expert 0: [hidden, width]
  int64_t down_stride;  // bytes
  float limit;

  int64_t rows() const { return begin.back(); }
  Matrix gate(int64_t expert) const { return of(gate_weight, expert * up_stride); }
  Matrix up(int64_t expert) const { return of(up_weight, expert * up_stride); }
  Matrix down(int64_t expert) const { return of(down_weight, expert * down_stride); }

 private:
  static Matrix of(Matrix first, int64_t bytes) { return {first.base + bytes, first.stride, first.format}; }
};

// gate_up [rows, 2 width] is kept for the backward pass; output [tokens, hidden].
void experts_forward(const Experts& experts, float* gate_up, float* output);

struct ExpertGradients {
  float* states;       // [tokens, hidden]; null: not wanted
  float* gates;        // [tokens * k]; null: not wanted
  float* gate_weight;  // laid out as the weights
  float* up_weight;
  float* down_weight;
};

void experts_backward(const Experts& experts, const float* gate_up, const float* grad, const ExpertGradients& wanted);

}  // namespace finemoe
