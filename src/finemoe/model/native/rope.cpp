// Rotary positions: pairs of a head's last or first components turned by given angles; the gradient turns back.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "parallel.h"
#include "rope.h"

namespace {

using at::Tensor;
using namespace finemoe;

// states and out [batch, seq, heads, width]: the last 2 · pairs components, or the `first`, are turned, the others copied.
// cosine and sine [batch, seq, pairs]; `back` turns by the negative angle. out may be states itself.
void rotate(const Tensor& states, const Tensor& cosine, const Tensor& sine, bool interleaved, bool first_ones, bool back,
            Tensor out) {
  const auto check = [](const Tensor& x, const char* name, int64_t dims) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_cpu() && x.dim() == dims &&
                    (x.size(-1) < 2 || x.stride(-1) == 1 || x.numel() == 0),
                name, " must be float32 on the CPU, its last dimension contiguous");
  };
  check(states, "states", 4), check(out, "out", 4), check(cosine, "cosine", 3), check(sine, "sine", 3);
  const int64_t seq = states.size(1), heads = states.size(2), width = states.size(3), pairs = cosine.size(2);
  TORCH_CHECK(out.sizes() == states.sizes() && cosine.sizes() == sine.sizes() && cosine.strides() == sine.strides() &&
                  cosine.size(0) == states.size(0) && cosine.size(1) == seq && 2 * pairs <= width,
              "the shapes of states, angles and result do not go together");
  const float* x = states.const_data_ptr<float>();
  const float *c = cosine.const_data_ptr<float>(), *s = sine.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  const auto turn = interleaved ? turn_neighbours : turn_halves;
  const int64_t kept = width - 2 * pairs, turned = first_ones ? 0 : kept, copied = first_ones ? 2 * pairs : 0;
  share_range(states.size(0) * seq, 16384 / std::max<int64_t>(heads * width, 1), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t b = token / seq, t = token % seq, angle = b * cosine.stride(0) + t * cosine.stride(1);
      for (int64_t h = 0; h < heads; ++h) {
        const float* from = x + b * states.stride(0) + t * states.stride(1) + h * states.stride(2);
        float* to = y + b * out.stride(0) + t * out.stride(1) + h * out.stride(2);
        if (from != to) std::copy_n(from + copied, kept, to + copied);
        turn(from + turned, c + angle, s + angle, back ? -1.0f : 1.0f, pairs, to + turned);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(finemoe, library) {
  library.def(
      "rotate(Tensor states, Tensor cosine, Tensor sine, bool interleaved, bool first, bool back, Tensor(a!) out) -> ()",
      rotate);
}
