// Pairs of components turned by given angles; `sign` -1 turns back.
#pragma once

#include "gemm.h"

namespace finemoe {

template <int... lane>
void split_pairs(Vector low, Vector high, Vector& even, Vector& odd, std::integer_sequence<int, lane...>) {
  even = pick_lanes<(2 * lane)...>(low, high);
  odd = pick_lanes<(2 * lane + 1)...>(low, high);
}

template <int... lane>
void join_pairs(Vector even, Vector odd, Vector& low, Vector& high, std::integer_sequence<int, lane...>) {
  low = pick_lanes<((lane & 1) * kLanes + lane / 2)...>(even, odd);
  high = pick_lanes<((lane & 1) * kLanes + (kLanes + lane) / 2)...>(even, odd);
}

// Component i with component i + pairs.
inline void turn_halves(const float* x, const float* cosine, const float* sine, float sign, int64_t pairs, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Vector a = load(x + i), b = load(x + pairs + i), c = load(cosine + i), s = load(sine + i) * sign;
    store(y + i, a * c - b * s);
    store(y + pairs + i, b * c + a * s);
  }
  for (; i < pairs; ++i) {
    const float a = x[i], b = x[pairs + i], c = cosine[i], s = sine[i] * sign;
    y[i] = a * c - b * s;
    y[pairs + i] = b * c + a * s;
  }
}

// Component 2i with component 2i + 1.
inline void turn_neighbours(const float* x, const float* cosine, const float* sine, float sign, int64_t pairs,
                            float* y) {
  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    Vector a, b, low, high;
    split_pairs(load(x + 2 * i), load(x + 2 * i + kLanes), a, b, kSequence);
    const Vector c = load(cosine + i), s = load(sine + i) * sign;
    join_pairs(a * c - b * s, b * c + a * s, low, high, kSequence);
    store(y + 2 * i, low);
    store(y + 2 * i + kLanes, high);
  }
  for (; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cosine[i], s = sine[i] * sign;
    y[2 * i] = a * c - b * s;
    y[2 * i + 1] = b * c + a * s;
  }
}

}  // namespace finemoe
