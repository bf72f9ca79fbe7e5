#include "linear.h"

#include "parallel.h"

namespace finemoe {
namespace {

// The result cut into tiles of whole register tiles, about two for each thread: `work(i, rows, j, columns)`.
template <typename Work>
void share_tiles(int64_t m, int64_t n, const Work& work) {
  const int64_t threads = at::get_num_threads();
  const int64_t across = std::min<int64_t>(kBlock, (n / threads + kColumns - 1) / kColumns * kColumns);
  const int64_t wide = std::max<int64_t>(across, kColumns), high = 64 * kRows;
  const int64_t columns = (n + wide - 1) / wide, rows = (m + high - 1) / high;
  share_tasks(rows * columns, [&](int64_t task) {
    const int64_t i = task / columns * high, j = task % columns * wide;
    work(i, std::min(high, m - i), j, std::min(wide, n - j));
  });
}

}  // namespace

void linear_forward(int64_t rows, int64_t n, int64_t shared, const float* x, const Matrix& weight, float* out) {
  if (rows >= kFewRows) {
    share_tiles(rows, n, [&](int64_t i, int64_t height, int64_t j, int64_t width) {
      times_transposed(height, width, shared, PackRows{{x + i * shared, shared}}, weight.row(j), out + i * n + j, n);
    });
    return;
  }
  share_range(n, std::max<int64_t>(4, 16384 / std::max<int64_t>(shared, 1)), [&](int64_t first, int64_t last) {
    const float* in[kFewRows];
    float* result[kFewRows];
    for (int64_t r = 0; r < rows; ++r) {
      in[r] = x + r * shared;
      result[r] = out + r * n + first;
    }
    few_rows(in, rows, weight.row(first), last - first, shared, result);
  });
}

void linear_grad_input(int64_t rows, int64_t n, int64_t shared, const float* grad, const float* weight, float* out) {
  share_tiles(rows, shared, [&](int64_t i, int64_t height, int64_t j, int64_t width) {
    gemm(height, width, n, PackRows{{grad + i * n, n}}, PackStraight{{weight + j, shared}}, out + i * shared + j, shared,
         false);
  });
}

void linear_grad_weight(int64_t rows, int64_t n, int64_t shared, const float* grad, const float* x, float* out,
                        bool add) {
  share_tiles(n, shared, [&](int64_t i, int64_t height, int64_t j, int64_t width) {
    gemm(height, width, rows, PackColumns{{grad + i, n}, n - i}, PackStraight{{x + j, shared}}, out + i * shared + j,
         shared, add);
  });
}

}  // namespace finemoe
