// x / sqrt(mean(x²) + eps) · weight of one row.
#pragma once

#include <cmath>

#include "gemm.h"
#include "swiglu.h"

namespace finemoe {

// Sum of body(j) over a row, where the body takes an index and how many numbers are left there.
template <typename Body>
float sum_over(int64_t width, const Body& body) {
  Vector sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    for (int v = 0; v < 4; ++v) sum[v] += body(j + v * kLanes, kLanes);
  for (; j < width; j += kLanes) sum[0] += body(j, std::min<int64_t>(kLanes, width - j));
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

inline Vector take(const float* p, int64_t count) { return count == kLanes ? load(p) : load_some(p, count); }

inline void give(float* p, Vector v, int64_t count) { count == kLanes ? store(p, v) : store_some(p, v, count); }

template <typename Body>
void for_each(int64_t width, const Body& body) {
  for (int64_t j = 0; j < width; j += kLanes) body(j, std::min<int64_t>(kLanes, width - j));
}

// Returns what the row was multiplied by. y may be x.
inline float norm_row(const float* x, const float* weight, int64_t width, float eps, float* y) {
  const float squares = sum_over(width, [&](int64_t j, int64_t n) {
    const Vector v = take(x + j, n);
    return v * v;
  });
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for_each(width, [&](int64_t j, int64_t n) { give(y + j, take(x + j, n) * factor * take(weight + j, n), n); });
  return factor;
}

}  // namespace finemoe
