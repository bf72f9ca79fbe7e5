// How long the products of gemm.h take, compiled as they are to be: seconds of nine, each the fastest of several.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "../gemm.h"

using namespace finemoe;

namespace {

struct Shape {
  int64_t rows, across, shared;
};
constexpr Shape kShapes[] = {{192, 1024, 512}, {96, 512, 1024}, {420, 768, 768}};  // of experts, and of a linear layer

std::vector<float> numbers(int64_t count) {
  std::vector<float> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = static_cast<float>(i % 89) / 89 - 0.5f;
  return made;
}

template <typename Run>
double seconds(const Run& run) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int turn = 0; turn < 5; ++turn) {
    const auto began = Clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - began).count());
  }
  return best;
}

// Forward, and the two products of its backward pass.
double passes(const Shape& s) {
  const auto x = numbers(s.rows * s.shared), weight = numbers(s.across * s.shared), flow = numbers(s.rows * s.across);
  std::vector<float> y(flow.size()), x_flow(x.size()), weight_flow(weight.size());
  const PackRows forward{{x.data(), s.shared}}, back{{flow.data(), s.across}};
  const PackColumns turned{{flow.data(), s.across}, s.across};
  const PackStraight inputs{{x.data(), s.shared}}, weights{{weight.data(), s.shared}};
  const PackTransposed linear{weight.data(), s.shared};
  return seconds([&] { gemm(s.rows, s.across, s.shared, forward, linear, y.data(), s.across, false); }) +
         seconds([&] { gemm(s.rows, s.shared, s.across, back, weights, x_flow.data(), s.shared, false); }) +
         seconds([&] { gemm(s.across, s.shared, s.rows, turned, inputs, weight_flow.data(), s.shared, false); });
}

}  // namespace

int main() {
  double sum = 0;
  for (const Shape& shape : kShapes) sum += passes(shape);
  std::printf("%.9f\n", sum);
}
