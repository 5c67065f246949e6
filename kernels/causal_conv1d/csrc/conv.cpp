// The short convolution and its gradient: channels in vectors, taps in registers, SiLU fused.
//
// A task is one sequence, up to 64 channels and a stretch of time. It walks the stretch in pieces
// whose rows, with the K-1 before (and in backward after) them, it turns into float32 in the
// first-level cache, whatever their dtype and width. Backward recomputes what SiLU was applied to.
//
// Nothing depends on the number of threads: stretches and the order of every sum follow from the
// shape. Each task leaves its part of dweight and dbias in the workspace; they are added in order.

#include <stdlib.h>

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"

namespace {

constexpr int64_t GROUP = 64;  // channels of a task
constexpr int64_t PIECES = 8;  // of a stretch

extern "C" struct ConvArgs {
  int64_t batch, length, width, taps;
  Team team;
  int32_t silu, unused;
  Rows x, initial;             // initial: (batch, K-1, width), null for zeros
  const float *weight, *bias;  // (width, K); bias may be null
  // Forward
  Rows y;
  // Backward; a null output is not wanted
  Rows dy, dfinal, dx, dinitial;
  float *dweight, *dbias;
  float* workspace;  // as many floats as conv_workspace says
};

struct Shape {
  int64_t halo, piece, stretch, stretches, groups;
  explicit Shape(const ConvArgs& a) {
    halo = a.taps - 1;
    piece = a.taps <= 16 ? 64 : 4 * a.taps;
    stretch = piece * PIECES;
    stretches = (a.length + stretch - 1) / stretch;
    groups = (a.width + GROUP - 1) / GROUP;
  }
  int64_t tasks(const ConvArgs& a) const { return a.batch * stretches * groups; }
  // Floats of a task's part: dweight as K rows of 64 channels, then dbias.
  int64_t part(const ConvArgs& a) const { return (a.taps + 1) * GROUP; }
};

struct Task {
  int64_t b, first, last, d, valid;
  Task(const ConvArgs& a, const Shape& s, int64_t task) {
    d = task % s.groups * GROUP;
    valid = a.width - d < GROUP ? a.width - d : GROUP;
    first = task / s.groups % s.stretches * s.stretch;
    last = a.length - first < s.stretch ? a.length : first + s.stretch;
    b = task / s.groups / s.stretches;
  }
};

// Rows from time t on, which may begin before 0 (the initial state) and end behind L (zeros).
void read_inputs(const ConvArgs& a, const Task& task, int64_t t, int64_t count, float* out) {
  const int64_t halo = a.taps - 1, end = t + count;
  if (t < 0) {
    const int64_t before = end < 0 ? count : -t;
    if (a.initial.data)
      read_rows(a.initial, task.b, t + halo, before, task.d, task.valid, out, GROUP);
    else
      memset(out, 0, before * GROUP * sizeof(float));
    out += before * GROUP;
    t += before;
  }
  const int64_t inside = (end < a.length ? end : a.length) - t;
  if (inside > 0) {
    read_rows(a.x, task.b, t, inside, task.d, task.valid, out, GROUP);
    out += inside * GROUP;
    t += inside;
  }
  if (t < end) memset(out, 0, (end - t) * GROUP * sizeof(float));
}

// Per tap a row of 64 channels, then the bias; zeros beyond the width.
void read_parameters(const ConvArgs& a, const Task& task, float* out) {
  memset(out, 0, (a.taps + 1) * GROUP * sizeof(float));
  for (int64_t i = 0; i < task.valid; i++) {
    for (int64_t k = 0; k < a.taps; k++)
      out[k * GROUP + i] = a.weight[(task.d + i) * a.taps + k];
    if (a.bias) out[a.taps * GROUP + i] = a.bias[task.d + i];
  }
}

// The sum over K taps, or over any number (K = 0), of rows from x on.
template <int K>
struct Taps {
  vf weight[K], bias;
  Taps(const float* parameters, int64_t) {
    for (int k = 0; k < K; k++) weight[k] = load(parameters + k * GROUP);
    bias = load(parameters + K * GROUP);
  }
  vf sum(const float* x) const {
    vf y = bias;
#pragma GCC unroll 4
    for (int k = 0; k < K; k++) y += weight[k] * load(x + k * GROUP);
    return y;
  }
  // The transpose: over rows from dy on, the last tap first.
  vf reverse(const float* dy) const {
    vf dx = splat(0.0f);
#pragma GCC unroll 4
    for (int k = 0; k < K; k++) dx += weight[k] * load(dy + (K - 1 - k) * GROUP);
    return dx;
  }
  // Adds dy times the inputs of each tap, and dy, over `count` rows, to K + 1 rows.
  void add_sums(const float* x, const float* dy, int64_t count, float* sums) const {
    vf total[K + 1];
    for (int k = 0; k <= K; k++) total[k] = load(sums + k * GROUP);
    for (int64_t i = 0; i < count; i++) {
      const vf g = load(dy + i * GROUP);
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) total[k] += g * load(x + (i + k) * GROUP);
      total[K] += g;
    }
    for (int k = 0; k <= K; k++) store(sums + k * GROUP, total[k]);
  }
};
template <>
struct Taps<0> {
  const float* weight;
  int64_t taps;
  Taps(const float* parameters, int64_t taps) : weight(parameters), taps(taps) {}
  vf sum(const float* x) const {
    vf y = load(weight + taps * GROUP);
    for (int64_t k = 0; k < taps; k++) y += load(weight + k * GROUP) * load(x + k * GROUP);
    return y;
  }
  vf reverse(const float* dy) const {
    vf dx = splat(0.0f);
    for (int64_t k = 0; k < taps; k++)
      dx += load(weight + k * GROUP) * load(dy + (taps - 1 - k) * GROUP);
    return dx;
  }
  void add_sums(const float* x, const float* dy, int64_t count, float* sums) const {
    for (int64_t k = 0; k <= taps; k++) {
      vf total = load(sums + k * GROUP);
      for (int64_t i = 0; i < count; i++) {
        const vf g = load(dy + i * GROUP);
        total += k < taps ? g * load(x + (i + k) * GROUP) : g;
      }
      store(sums + k * GROUP, total);
    }
  }
};

// A task's rows of 64 channels.
struct Buffers {
  float *parameters, *x, *y, *sums, *memory;
  Buffers(const ConvArgs& a, const Shape& s) {
    const int64_t rows = s.piece + 2 * s.halo;
    memory = (float*)aligned_alloc(64, (2 * (a.taps + 1) + 2 * rows) * GROUP * sizeof(float));
    parameters = memory;
    sums = parameters + (a.taps + 1) * GROUP;
    x = sums + (a.taps + 1) * GROUP;
    y = x + rows * GROUP;
  }
  ~Buffers() { free(memory); }
};

INLINE int64_t columns(const Task& task) { return (task.valid + W - 1) / W * W; }

template <int K>
void forward_task(const ConvArgs& a, const Shape& shape, const Task& task) {
  const Buffers buffers(a, shape);
  read_parameters(a, task, buffers.parameters);
  for (int64_t t = task.first; t < task.last; t += shape.piece) {
    const int64_t count = task.last - t < shape.piece ? task.last - t : shape.piece;
    read_inputs(a, task, t - shape.halo, count + shape.halo, buffers.x);
    for (int64_t c = 0; c < columns(task); c += W) {
      const Taps<K> taps(buffers.parameters + c, a.taps);
      const float* x = buffers.x + c;
      float* y = buffers.y + c;
      if (a.silu)
        for (int64_t i = 0; i < count; i++) {
          const vf sum = taps.sum(x + i * GROUP);
          store(y + i * GROUP, sum * sigmoid(sum));
        }
      else
        for (int64_t i = 0; i < count; i++) store(y + i * GROUP, taps.sum(x + i * GROUP));
    }
    write_rows(a.y, task.b, t, count, task.d, task.valid, buffers.y, GROUP);
  }
}

// Adds the gradient of the final state, whose rows are inputs at times L-K+1 ... L-1, to rows from
// time t on.
void add_final(const ConvArgs& a, const Task& task, int64_t t, int64_t count, float* rows) {
  const int64_t start = a.length - a.taps + 1, from = t < start ? start : t;
  if (!a.dfinal.data || from >= t + count) return;
  alignas(64) float row[GROUP];
  for (int64_t i = from; i < t + count; i++) {
    read_rows(a.dfinal, task.b, i - start, 1, task.d, task.valid, row, GROUP);
    float* to = rows + (i - t) * GROUP;
    for (int64_t c = 0; c < columns(task); c += W) store(to + c, load(to + c) + load(row + c));
  }
}

// dy holds the gradients of the first K-1 sums; `out` takes as many rows.
void write_initial(const ConvArgs& a, const Task& task, const float* parameters, const float* dy,
                   float* out) {
  const int64_t halo = a.taps - 1;
  for (int64_t p = 0; p < halo; p++)
    for (int64_t c = 0; c < columns(task); c += W) {
      vf sum = splat(0.0f);
      for (int64_t k = 0; k <= p; k++)
        sum += load(parameters + k * GROUP + c) * load(dy + (p - k) * GROUP + c);
      store(out + p * GROUP + c, sum);
    }
  add_final(a, task, -halo, halo, out);
  write_rows(a.dinitial, task.b, 0, halo, task.d, task.valid, out, GROUP);
}

template <int K>
void backward_task(const ConvArgs& a, const Shape& shape, const Task& task, float* part) {
  const Buffers buffers(a, shape);
  read_parameters(a, task, buffers.parameters);
  memset(buffers.sums, 0, shape.part(a) * sizeof(float));
  const int64_t halo = shape.halo;
  for (int64_t t = task.first; t < task.last; t += shape.piece) {
    const int64_t count = task.last - t < shape.piece ? task.last - t : shape.piece;
    // An input reaches the K-1 sums after its own as well.
    const int64_t behind = a.length - t - count < halo ? a.length - t - count : halo;
    const int64_t sums = count + behind;
    read_inputs(a, task, t - halo, sums + halo, buffers.x);
    read_rows(a.dy, task.b, t, sums, task.d, task.valid, buffers.y, GROUP);
    memset(buffers.y + sums * GROUP, 0, (halo - behind) * GROUP * sizeof(float));
    for (int64_t c = 0; c < columns(task); c += W) {
      const Taps<K> taps(buffers.parameters + c, a.taps);
      float *x = buffers.x + c, *dy = buffers.y + c;
      for (int64_t i = 0; a.silu && i < sums; i++) {
        const vf sum = taps.sum(x + i * GROUP), gate = sigmoid(sum);
        store(dy + i * GROUP, load(dy + i * GROUP) * (gate + sum * gate * (1.0f - gate)));
      }
      if (a.dweight || a.dbias) taps.add_sums(x, dy, count, buffers.sums + c);
      // The inputs have been used: their rows take the gradients.
      if (a.dx.data)
        for (int64_t i = 0; i < count; i++) store(x + i * GROUP, taps.reverse(dy + i * GROUP));
    }
    if (a.dx.data) {
      add_final(a, task, t, count, buffers.x);
      write_rows(a.dx, task.b, t, count, task.d, task.valid, buffers.x, GROUP);
    }
    if (a.dinitial.data && t == 0)
      write_initial(a, task, buffers.parameters, buffers.y, buffers.x);
  }
  memcpy(part, buffers.sums, shape.part(a) * sizeof(float));
}

// Up to four taps stay in registers; with more, one is read after the other.
template <class F>
void with_taps(const ConvArgs& a, const F& f) {
  if (a.taps == 1) return f(std::integral_constant<int, 1>());
  if (a.taps == 2) return f(std::integral_constant<int, 2>());
  if (a.taps == 3) return f(std::integral_constant<int, 3>());
  if (a.taps == 4) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 0>());
}

}  // namespace

extern "C" {

int64_t conv_workspace(const ConvArgs* a) {
  const Shape shape(*a);
  return shape.tasks(*a) * shape.part(*a);
}

void conv_forward(const ConvArgs* args) {
  const ConvArgs& a = *args;
  const Shape shape(a);
  with_taps(a, [&](auto taps) {
    parallel_for(a.team, shape.tasks(a), [&](int64_t task) {
      forward_task<decltype(taps)::value>(a, shape, Task(a, shape, task));
    });
  });
}

void conv_backward(const ConvArgs* args) {
  const ConvArgs& a = *args;
  const Shape shape(a);
  with_taps(a, [&](auto taps) {
    parallel_for(a.team, shape.tasks(a), [&](int64_t task) {
      backward_task<decltype(taps)::value>(a, shape, Task(a, shape, task),
                                           a.workspace + task * shape.part(a));
    });
  });
  if (!a.dweight && !a.dbias) return;
  parallel_for(a.team, shape.groups, [&](int64_t group) {
    float* total = a.workspace + group * shape.part(a);
    for (int64_t i = 1; i < a.batch * shape.stretches; i++) {
      const float* part = a.workspace + (i * shape.groups + group) * shape.part(a);
      for (int64_t j = 0; j < shape.part(a); j += W)
        store(total + j, load(total + j) + load(part + j));
    }
    const Task task(a, shape, group);
    for (int64_t i = 0; i < task.valid; i++) {
      for (int64_t k = 0; a.dweight && k < a.taps; k++)
        a.dweight[(task.d + i) * a.taps + k] = total[k * GROUP + i];
      if (a.dbias) a.dbias[task.d + i] = total[a.taps * GROUP + i];
    }
  });
}

}  // extern "C"
