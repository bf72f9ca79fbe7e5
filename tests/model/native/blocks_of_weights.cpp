// Products by blocks of every format, few rows and many, against double precision and against the same numbers as
// floats. Prints what is wrong; the exit status says whether anything is.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "formats.h"

using namespace finemoe;

namespace {

float drawn() { return std::rand() / static_cast<float>(RAND_MAX) - 0.5f; }

// Any bytes, and scales or bfloat16 numbers of ordinary size.
template <typename Block>
std::vector<uint8_t> blocks_of(int64_t count, Format format) {
  std::vector<uint8_t> bytes(count * Block::kBytes);
  for (uint8_t& one : bytes) one = static_cast<uint8_t>(std::rand());
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* block = bytes.data() + i * Block::kBytes;
    const auto half = [&](int at) { block[at + 1] = 0x2c | (block[at + 1] & 1); };
    if (format == Format::kBF16)
      for (int q = 0; q < Block::kSize; ++q) block[2 * q + 1] = 0x3c | (block[2 * q + 1] & 0x81);
    else
      half(format == Format::kQ6_K ? 208 : 0);
    if (format == Format::kQ4_1 || format == Format::kQ4_K) half(2);
  }
  return bytes;
}

template <typename Block>
int wrong(Format format, int64_t rows, int64_t n, int64_t blocks, int64_t shared) {
  const std::vector<uint8_t> bytes = blocks_of<Block>(n * blocks, format);
  std::vector<float> whole(n * blocks * Block::kSize), plain(n * shared), x(rows * shared);
  for (int64_t i = 0; i < n * blocks; ++i) {
    float* to = whole.data() + i * Block::kSize;
    Block::unpack(bytes.data() + i * Block::kBytes, [&](int v, Vector numbers) { store(to + v * kLanes, numbers); });
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < shared; ++k) plain[j * shared + k] = whole[j * blocks * Block::kSize + k];
  for (float& one : x) one = drawn();
  std::vector<float> by_blocks(rows * n), by_floats(rows * n), by_tiles(rows * n);
  std::vector<const float*> from;
  std::vector<float*> to, other;
  for (int64_t r = 0; r < rows; ++r) {
    from.push_back(x.data() + r * shared);
    to.push_back(by_blocks.data() + r * n), other.push_back(by_floats.data() + r * n);
  }
  const Matrix weight{bytes.data(), blocks * Block::kBytes, format};
  few_rows(from.data(), rows, weight, n, shared, to.data());
  few_rows(from.data(), rows, plain.data(), n, shared, other.data());
  times_transposed(rows, n, shared, PackRows{{x.data(), shared}}, weight, by_tiles.data(), n);
  int found = 0;
  for (int64_t i = 0; i < rows * n; ++i) {
    double exact = 0, size = 0;
    for (int64_t k = 0; k < shared; ++k) {
      const double term = double(x[i / n * shared + k]) * plain[i % n * shared + k];
      exact += term, size += std::fabs(term);
    }
    const double allowed = 1e-6 * size;
    found += by_blocks[i] != by_floats[i] || !(std::fabs(by_blocks[i] - exact) <= allowed) ||
             !(std::fabs(by_tiles[i] - exact) <= allowed);
  }
  return found;
}

template <typename Block>
int wrong_of(const char* name, Format format) {
  int found = 0;
  for (int64_t rows : {1, 2, 5, 7, 30, 63})
    for (int64_t n : {1, 6, 17})
      for (int64_t blocks : {1, 3})
        for (int64_t cut : {0, 5}) found += wrong<Block>(format, rows, n, blocks, blocks * Block::kSize - cut);
  if (found) std::printf("%s: %d sums are wrong\n", name, found);
  return found;
}

}  // namespace

int main() {
  const int found = wrong_of<Q8_0>("Q8_0", Format::kQ8_0) + wrong_of<Q4_0>("Q4_0", Format::kQ4_0) +
                    wrong_of<Q4_1>("Q4_1", Format::kQ4_1) + wrong_of<Q4_K>("Q4_K", Format::kQ4_K) +
                    wrong_of<Q6_K>("Q6_K", Format::kQ6_K) + wrong_of<BF16>("BF16", Format::kBF16);
  return found != 0;
}
