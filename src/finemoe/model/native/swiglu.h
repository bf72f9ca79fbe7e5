// silu(gate) * up and its gradient, several numbers at a time; both inputs clamped first where there is a limit.
#pragma once

#include <limits>

#include "gemm.h"

namespace finemoe {

constexpr float kNoLimit = std::numeric_limits<float>::infinity();

// NaN in `a` stays: no comparison holds for it. NaN in `b` is left out.
inline Vector minimum(Vector a, Vector b) { return b < a ? b : a; }
inline Vector maximum(Vector a, Vector b) { return b > a ? b : a; }

// e^x to about one unit in the last place: x = n ln 2 + r, a polynomial for e^r, 2^n through the exponent bits.
inline Vector exponential(Vector x) {
  const Vector asked = x;
  // No comparison holds for NaN: it passes both bounds and comes out at the end.
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (x * 1.44269504088896341f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVector bits = (__builtin_convertvector(n, IntVector) + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return asked > 88.0f ? splat(std::numeric_limits<float>::infinity()) : p * power;
}

// e^x, and 0 where that is below the smallest number: products with such weights would be denormal, and slow.
inline Vector weight_of(Vector x) { return x < -87.0f ? Vector{} : exponential(x); }

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector swiglu(Vector gate, Vector up, float limit) {
  if (limit != kNoLimit) {
    gate = minimum(gate, splat(limit));
    up = maximum(minimum(up, splat(limit)), splat(-limit));
  }
  return gate * sigmoid(gate) * up;
}

// What flows back to gate and up; returns silu(gate) * up, which weights below need.
inline Vector swiglu_gradient(Vector& gate, Vector& up, Vector flow, float limit) {
  const Vector zero{};
  const Vector raw_gate = gate, raw_up = up;
  if (limit != kNoLimit) {
    gate = minimum(gate, splat(limit));
    up = maximum(minimum(up, splat(limit)), splat(-limit));
  }
  const Vector s = sigmoid(gate), silu = gate * s, activated = silu * up;
  gate = flow * up * s * (1.0f + gate * (1.0f - s));  // not 1 + gate - silu: of a large gate that would lose the 1
  up = flow * silu;
  if (limit != kNoLimit) {  // a clamped value passes nothing on, nor does NaN, which is within no limits
    gate = raw_gate <= limit ? gate : zero;
    up = raw_up <= limit ? (raw_up >= -limit ? up : zero) : zero;
  }
  return activated;
}

// Runs `body(j)` for whole vectors of `n` numbers, and `rest(j, count)` for what is left.
template <typename Body, typename Rest>
inline void over(int64_t n, const Body& body, const Rest& rest) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j);
  if (j < n) rest(j, n - j);
}

inline Vector load_some(const float* p, int64_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}

inline void store_some(float* p, Vector v, int64_t count) {
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(float));
}

// Calls `body(j)` for whole vectors that cover `n` numbers: the last one overlaps the one before, and `body` gets how many
// of its first numbers were done. With fewer numbers than a vector holds, `few(n)` instead.
template <typename Body, typename Few>
inline void cover(int64_t n, const Body& body, const Few& few) {
  if (n < kLanes) return few(n);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, 0);
  if (j < n) body(n - kLanes, j - (n - kLanes));
}

// 0 in the first `done` lanes, 1 in the others.
inline Vector fresh_lanes(int64_t done) {
  Vector lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane < done ? 0.0f : 1.0f;
  return lanes;
}

inline void swiglu_row(const float* gate, const float* up, int64_t width, float limit, float* out) {
  cover(
      width, [&](int64_t j, int64_t) { store(out + j, swiglu(load(gate + j), load(up + j), limit)); },
      [&](int64_t n) { store_some(out, swiglu(load_some(gate, n), load_some(up, n), limit), n); });
}

// `flow` is by the unweighted output; it is multiplied by `weight` on its way back. Returns the sum of flow * activated,
// which is the gradient by that weight. Writes weight-free activations and the gradients by gate and up, none of them
// over an input.
inline float swiglu_row_gradient(const float* gate, const float* up, const float* flow, float weight, int64_t width,
                                 float limit, float* activated, float* grad_gate, float* grad_up) {
  Vector sum{};
  cover(
      width,
      [&](int64_t j, int64_t done) {
        Vector g = load(gate + j), u = load(up + j), f = load(flow + j);
        const Vector a = swiglu_gradient(g, u, f * weight, limit);
        sum += done ? f * a * fresh_lanes(done) : f * a;
        store(activated + j, a);
        store(grad_gate + j, g);
        store(grad_up + j, u);
      },
      [&](int64_t n) {
        Vector g = load_some(gate, n), u = load_some(up, n), f = load_some(flow, n);
        const Vector a = swiglu_gradient(g, u, f * weight, limit);
        sum += f * a;
        store_some(activated, a, n);
        store_some(grad_gate, g, n);
        store_some(grad_up, u, n);
      });
  return total(sum);
}

}  // namespace finemoe
