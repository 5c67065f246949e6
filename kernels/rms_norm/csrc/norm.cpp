// RMSNorm and its gradient: rows in vectors, one pass over memory in each direction.
//
// A task is a block of rows, made float32 in the first-level cache, whatever their dtype. Nothing
// depends on the number of threads: the blocks follow from the shape, each leaves its part of
// dweight in the workspace, and the parts are added in order.

#include <math.h>
#include <stdlib.h>

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"

namespace {

constexpr int64_t ROWS = 256;  // of a task
constexpr int64_t PIECE = 4;   // rows in the cache at a time

extern "C" struct NormArgs {
  int64_t rows, width;
  Team team;
  float eps;
  int32_t unused;
  Rows x;  // (1, rows, width)
  const float* weight;
  float* scale;  // 1 / sqrt(mean(x²) + eps) of every row
  // Forward
  Rows y;
  // Backward; a null output is not wanted
  Rows dy, dx;
  float* dweight;
  float* workspace;  // as many floats as norm_workspace says
};

INLINE int64_t padded(const NormArgs& a) { return (a.width + BLOCK - 1) / BLOCK * BLOCK; }
INLINE int64_t tasks(const NormArgs& a) { return (a.rows + ROWS - 1) / ROWS; }

// Rows of floats, as many as there are channels up to a multiple of 16, zero beyond the width.
struct Buffers {
  float *weight, *x, *dy, *sums;
  explicit Buffers(const NormArgs& a) {
    const int64_t size = padded(a);
    weight = (float*)aligned_alloc(64, (2 + 2 * PIECE) * size * sizeof(float));
    x = weight + size;
    dy = x + PIECE * size;
    sums = dy + PIECE * size;
    memset(weight, 0, size * sizeof(float));
    memcpy(weight, a.weight, a.width * sizeof(float));
  }
  ~Buffers() { free(weight); }
};

INLINE float sum(vf x) { return lane_sums<1, 1>(&x)[0]; }

template <class F>
INLINE void for_pieces(const NormArgs& a, int64_t task, const F& f) {
  const int64_t last = (task + 1) * ROWS < a.rows ? (task + 1) * ROWS : a.rows;
  for (int64_t row = task * ROWS; row < last; row += PIECE)
    f(row, last - row < PIECE ? last - row : PIECE);
}

void forward_task(const NormArgs& a, int64_t task) {
  const Buffers buffers(a);
  const int64_t size = padded(a);
  for_pieces(a, task, [&](int64_t row, int64_t count) {
    read_rows(a.x, 0, row, count, 0, a.width, buffers.x, size);
    for (int64_t i = 0; i < count; i++) {
      float* x = buffers.x + i * size;
      vf squares = splat(0.0f);
      for (int64_t c = 0; c < size; c += W) squares += load(x + c) * load(x + c);
      const float scale = 1.0f / sqrtf(sum(squares) / (float)a.width + a.eps);
      for (int64_t c = 0; c < size; c += W)
        store(x + c, load(x + c) * scale * load(buffers.weight + c));
      a.scale[row + i] = scale;
    }
    write_rows(a.y, 0, row, count, 0, a.width, buffers.x, size);
  });
}

void backward_task(const NormArgs& a, int64_t task, float* part) {
  const Buffers buffers(a);
  const int64_t size = padded(a);
  memset(buffers.sums, 0, size * sizeof(float));
  for_pieces(a, task, [&](int64_t row, int64_t count) {
    read_rows(a.x, 0, row, count, 0, a.width, buffers.x, size);
    read_rows(a.dy, 0, row, count, 0, a.width, buffers.dy, size);
    for (int64_t i = 0; i < count; i++) {
      float *x = buffers.x + i * size, *dy = buffers.dy + i * size;
      const float scale = a.scale[row + i];
      // dx = scale (dn - n mean(dn n)), n = scale x, dn = dy weight.
      vf products = splat(0.0f);
      for (int64_t c = 0; c < size; c += W) {
        const vf g = load(dy + c), n = load(x + c) * scale, dn = g * load(buffers.weight + c);
        store(buffers.sums + c, load(buffers.sums + c) + g * n);
        store(x + c, n);
        store(dy + c, dn);
        products += dn * n;
      }
      const float mean = sum(products) / (float)a.width;
      for (int64_t c = 0; c < size; c += W)
        store(dy + c, (load(dy + c) - load(x + c) * mean) * scale);
    }
    if (a.dx.data) write_rows(a.dx, 0, row, count, 0, a.width, buffers.dy, size);
  });
  memcpy(part, buffers.sums, size * sizeof(float));
}

}  // namespace

extern "C" {

int64_t norm_workspace(const NormArgs* a) { return tasks(*a) * padded(*a); }

void norm_forward(const NormArgs* args) {
  const NormArgs& a = *args;
  parallel_for(a.team, tasks(a), [&](int64_t task) { forward_task(a, task); });
}

void norm_backward(const NormArgs* args) {
  const NormArgs& a = *args;
  const int64_t size = padded(a);
  parallel_for(a.team, tasks(a),
               [&](int64_t task) { backward_task(a, task, a.workspace + task * size); });
  if (!a.dweight) return;
  for (int64_t task = 1; task < tasks(a); task++)
    for (int64_t c = 0; c < size; c += W)
      store(a.workspace + c, load(a.workspace + c) + load(a.workspace + task * size + c));
  memcpy(a.dweight, a.workspace, a.width * sizeof(float));
}

}  // extern "C"
