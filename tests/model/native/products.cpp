// Products of odd shapes, both ways to pack, as bytes on stdout: the same whatever the tile and the machine.
#include <cstdio>
#include <vector>

#include "gemm.h"

using namespace finemoe;

int main() {
  for (int64_t m : {1, 5, 14, 31, 85})
    for (int64_t n : {1, 16, 47, 64, 600, 1100})
      for (int64_t k : {1, 17, 384, 801}) {
        std::vector<float> a(m * k), b(n * k), c(m * n, 0.5f), d(m * n);
        for (int64_t i = 0; i < m * k; ++i) a[i] = 1.0f / (i % 97 + 3) - 0.1f;
        for (int64_t i = 0; i < n * k; ++i) b[i] = 1.0f / (i % 89 + 7) - 0.05f;
        gemm(m, n, k, PackRows{{a.data(), k}}, PackTransposed{b.data(), k}, c.data(), n, true);
        gemm(m, n, k, PackColumns{{a.data(), m}, m}, PackStraight{{b.data(), n}}, d.data(), n, false);
        std::fwrite(c.data(), 4, c.size(), stdout);
        std::fwrite(d.data(), 4, d.size(), stdout);
      }
}
