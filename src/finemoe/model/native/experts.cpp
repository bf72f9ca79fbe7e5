#include "experts.h"

#include <memory>

#include "gemm.h"
#include "parallel.h"
#include "swiglu.h"

namespace finemoe {
namespace {

using Buffer = std::unique_ptr<float[]>;

Buffer buffer(int64_t numbers) { return Buffer(new float[std::max<int64_t>(numbers, 1)]); }

struct Piece {  // consecutive rows of one expert
  int64_t expert, first, last;
  bool whole;  // all rows of its expert
};

// Experts largest first; one with more than its share of the rows is cut, so that no thread waits for it alone.
std::vector<Piece> cut(const Experts& x) {
  const int64_t threads = at::get_num_threads();
  int64_t share = std::max<int64_t>(128, (x.rows() + 2 * threads - 1) / (2 * threads));
  if (x.count < threads) share = std::min(share, std::max<int64_t>(32, (x.rows() + threads - 1) / threads));
  std::vector<Piece> pieces;
  for (int64_t e = 0; e < x.count; ++e) {
    const int64_t rows = x.begin[e + 1] - x.begin[e];
    const int64_t parts = std::max<int64_t>(1, (rows + share - 1) / share);
    for (int64_t part = 0; part < parts; ++part)
      pieces.push_back({e, x.begin[e] + rows * part / parts, x.begin[e] + rows * (part + 1) / parts, parts == 1});
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.last - a.first > b.last - b.first; });
  return pieces;
}

Rows token_rows(const Experts& x, const float* base, int64_t first) {
  if (!x.order) return {base + first * x.hidden, x.hidden};
  return {base, x.hidden, x.order + first, x.k};
}

// sum over a token's kept assignments of (weight or 1) * row, for every token.
void gather_sum(const Experts& x, const float* rows, const float* weights, float* out) {
  share_range(x.tokens, 32, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float* sum = out + t * x.hidden;
      std::memset(sum, 0, x.hidden * sizeof(float));
      for (int64_t a = t * x.k; a < (t + 1) * x.k; ++a) {
        if (x.slots[a] < 0) continue;
        const float* row = rows + x.slots[a] * x.hidden;
        const float weight = weights ? weights[a] : 1.0f;
        for (int64_t j = 0; j < x.hidden; ++j) sum[j] += weight * row[j];
      }
    }
  });
}

void forward_piece(const Experts& x, const Piece& piece, float* gate_up, float* output) {
  const int64_t rows = piece.last - piece.first, e = piece.expert;
  const Buffer activated = buffer(rows * x.width);
  const PackRows states{token_rows(x, x.states, piece.first)};
  float* gate = gate_up + piece.first * 2 * x.width;
  times_transposed(rows, x.width, x.hidden, states, x.gate(e), gate, 2 * x.width);
  times_transposed(rows, x.width, x.hidden, states, x.up(e), gate + x.width, 2 * x.width);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = gate + r * 2 * x.width;
    swiglu_row(row, row + x.width, x.width, x.limit, activated.get() + r * x.width);
  }
  times_transposed(rows, x.hidden, x.width, PackRows{{activated.get(), x.width}}, x.down(e),
                   output + piece.first * x.hidden, x.hidden);
}

struct Flows {
  float* gate_up;    // [rows, 2 width]
  float* activated;  // [rows, width]
  float* states;     // [rows, hidden]; null: not wanted
};

void backward_piece(const Experts& x, const Piece& piece, const float* gate_up, const float* grad,
                    const ExpertGradients& wanted, const Flows& flows) {
  const int64_t rows = piece.last - piece.first, e = piece.expert;
  const Buffer flow = buffer(rows * x.width);
  gemm(rows, x.width, x.hidden, PackRows{token_rows(x, grad, piece.first)},
       PackStraight{{x.down(e).floats(), x.width}}, flow.get(), x.width, false);
  float* flow_gate = flows.gate_up + piece.first * 2 * x.width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = piece.first + r, assignment = x.order ? x.order[row] : row;
    const float* gate = gate_up + row * 2 * x.width;
    float* out = flow_gate + r * 2 * x.width;
    const float by_gate =
        swiglu_row_gradient(gate, gate + x.width, flow.get() + r * x.width, x.gates ? x.gates[assignment] : 1.0f,
                            x.width, x.limit, flows.activated + row * x.width, out, out + x.width);
    if (wanted.gates) wanted.gates[assignment] = by_gate;
  }
  if (!flows.states) return;
  float* out = flows.states + piece.first * x.hidden;
  const int64_t stride = x.hidden;
  gemm(rows, x.hidden, x.width, PackRows{{flow_gate, 2 * x.width}},
       PackStraight{{x.gate(e).floats(), x.hidden}}, out, stride, false);
  gemm(rows, x.hidden, x.width, PackRows{{flow_gate + x.width, 2 * x.width}},
       PackStraight{{x.up(e).floats(), x.hidden}}, out, stride, true);
}

// Rows [from, to) of an expert's weight gradients: of the gate, then up, then (transposed in meaning) down projection.
struct WeightTask {
  int64_t expert, matrix, from, to;
};

void weight_gradient(const Experts& x, const WeightTask& task, const float* grad, const ExpertGradients& wanted,
                     const Flows& flows) {
  const int64_t e = task.expert, first = x.begin[e], rows = x.begin[e + 1] - first, height = task.to - task.from;
  if (task.matrix < 2) {
    float* out = (task.matrix ? wanted.up_weight : wanted.gate_weight) + e * x.up_stride / static_cast<int64_t>(sizeof(float)) + task.from * x.hidden;
    const float* flow = flows.gate_up + first * 2 * x.width + task.matrix * x.width + task.from;
    const int64_t left = (2 - task.matrix) * x.width - task.from;
    gemm(height, x.hidden, rows, PackColumns{{flow, 2 * x.width}, left}, PackStraight{token_rows(x, x.states, first)}, out,
         x.hidden, false);
    return;
  }
  Rows flow = token_rows(x, grad, first);
  flow.base += task.from;
  gemm(height, x.width, rows, PackColumns{flow, x.hidden - task.from, x.gates},
       PackStraight{{flows.activated + first * x.width, x.width}},
       wanted.down_weight + e * x.hidden * x.width + task.from * x.width, x.width, false);
}

void all_weight_gradients(const Experts& x, int64_t expert, const float* grad, const ExpertGradients& wanted,
                          const Flows& flows) {
  weight_gradient(x, {expert, 0, 0, x.width}, grad, wanted, flows);
  weight_gradient(x, {expert, 1, 0, x.width}, grad, wanted, flows);
  weight_gradient(x, {expert, 2, 0, x.hidden}, grad, wanted, flows);
}

// Few rows: threads share the output columns, and every weight is read once, straight from memory.
void forward_few(const Experts& x, float* gate_up, float* output) {
  const Buffer activated = buffer(x.rows() * x.width);
  const int64_t kPart = 64;  // output columns of a task
  const int64_t wide = (x.width + kPart - 1) / kPart, high = (x.hidden + kPart - 1) / kPart;
  std::vector<int64_t> used;
  for (int64_t e = 0; e < x.count; ++e)
    if (x.begin[e + 1] > x.begin[e]) used.push_back(e);
  const int64_t experts = used.size();
  share_tasks(experts * wide, [&](int64_t task) {
    const int64_t e = used[task / wide], j = task % wide * kPart, n = std::min(kPart, x.width - j);
    const int64_t first = x.begin[e], rows = x.begin[e + 1] - first;
    const Rows states = token_rows(x, x.states, first);
    const float* in[kFewRows];
    float *gate[kFewRows], *up[kFewRows];
    for (int64_t r = 0; r < rows; ++r) {
      in[r] = states[r];
      gate[r] = gate_up + (first + r) * 2 * x.width + j;
      up[r] = gate[r] + x.width;
    }
    few_rows(in, rows, x.gate(e).row(j), n, x.hidden, gate);
    few_rows(in, rows, x.up(e).row(j), n, x.hidden, up);
    for (int64_t r = 0; r < rows; ++r)
      swiglu_row(gate[r], up[r], n, x.limit, activated.get() + (first + r) * x.width + j);
  });
  share_tasks(experts * high, [&](int64_t task) {
    const int64_t e = used[task / high], j = task % high * kPart, n = std::min(kPart, x.hidden - j);
    const int64_t first = x.begin[e], rows = x.begin[e + 1] - first;
    const float* in[kFewRows];
    float* out[kFewRows];
    for (int64_t r = 0; r < rows; ++r) {
      in[r] = activated.get() + (first + r) * x.width;
      out[r] = output + (first + r) * x.hidden + j;
    }
    few_rows(in, rows, x.down(e).row(j), n, x.width, out);
  });
}

bool few(const Experts& x) {
  constexpr int64_t kEach = 8;  // rows of an expert from which packing its weights pays, where there are many tokens
  const int64_t most = x.tokens < kFewRows ? kFewRows : kEach;
  for (int64_t e = 0; e < x.count; ++e)
    if (x.begin[e + 1] - x.begin[e] >= most) return false;
  return true;
}

}  // namespace

void experts_forward(const Experts& x, float* gate_up, float* output) {
  const bool sums = x.order || x.gates;
  const Buffer scattered = sums ? buffer(x.rows() * x.hidden) : nullptr;
  float* rows = sums ? scattered.get() : output;
  if (few(x)) {
    forward_few(x, gate_up, rows);
  } else {
    const std::vector<Piece> pieces = cut(x);
    share_tasks(pieces.size(), [&](int64_t task) { forward_piece(x, pieces[task], gate_up, rows); });
  }
  if (sums) gather_sum(x, rows, x.gates, output);
}

void experts_backward(const Experts& x, const float* gate_up, const float* grad, const ExpertGradients& wanted) {
  const Buffer flow = buffer(x.rows() * 2 * x.width), activated = buffer(x.rows() * x.width);
  const Buffer scattered = x.order && wanted.states ? buffer(x.rows() * x.hidden) : nullptr;
  const Flows flows{flow.get(), activated.get(), x.order ? scattered.get() : wanted.states};
  const std::vector<Piece> pieces = cut(x);
  share_tasks(pieces.size(), [&](int64_t task) {
    const Piece& piece = pieces[task];
    backward_piece(x, piece, gate_up, grad, wanted, flows);
    if (piece.whole) all_weight_gradients(x, piece.expert, grad, wanted, flows);  // while its rows are still in cache
  });
  std::vector<WeightTask> rest;
  const int64_t kPart = 8 * kRows;  // rows of a weight gradient: enough to pay for packing the other side
  for (const Piece& piece : pieces) {
    if (piece.whole || piece.first != x.begin[piece.expert]) continue;
    for (int64_t matrix = 0; matrix < 3; ++matrix) {
      const int64_t height = matrix < 2 ? x.width : x.hidden;
      for (int64_t from = 0; from < height; from += kPart)
        rest.push_back({piece.expert, matrix, from, std::min(from + kPart, height)});
    }
  }
  share_tasks(rest.size(), [&](int64_t task) { weight_gradient(x, rest[task], grad, wanted, flows); });
  if (x.order && wanted.states) gather_sum(x, flows.states, nullptr, wanted.states);
}

}  // namespace finemoe
