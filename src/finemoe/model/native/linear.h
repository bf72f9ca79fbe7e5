// The three products of a linear layer without bias.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace finemoe {

// out [rows, n] = x [rows, shared] weight[n, shared]^T
void linear_forward(int64_t rows, int64_t n, int64_t shared, const float* x, const Matrix& weight, float* out);

// out [rows, shared] = grad [rows, n] weight[n, shared]
void linear_grad_input(int64_t rows, int64_t n, int64_t shared, const float* grad, const float* weight, float* out);

// out [n, shared] becomes (or, with `add`, grows by) grad[rows, n]^T x[rows, shared]
void linear_grad_weight(int64_t rows, int64_t n, int64_t shared, const float* grad, const float* x, float* out,
                        bool add = false);

}  // namespace finemoe
