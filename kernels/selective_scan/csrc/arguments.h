// What Python passes to a scan (cpu.py), how its work is shared, and its steps between resets.
//
// T is the state's precision; where A is complex so are B, C, the states and their gradients, stored
// as pairs of T.

#pragma once

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"

constexpr int64_t CHUNK = 32;  // cpu.py has it too
constexpr int64_t MAX_STATE = 256;

template <class T>
struct Arguments {
  int64_t batch, length, width, state;
  Team team;
  int32_t softplus, complex;
  Rows u, delta, z, B, C;  // z, and B or C where they are constant: null
  const T *A, *constant_B, *constant_C, *D, *bias, *initial;
  const uint8_t* reset;
  T* checkpoints;  // (batch, chunks, blocks, state, 16); forward may have none
  T* workspace;    // as many numbers as the library's workspace function says
  // Forward
  Rows y;
  T* final_state;
  // Backward; a null output is not wanted
  Rows dy, du, ddelta, dz, dB, dC;
  const T* dfinal;
  T *dA, *dconstant_B, *dconstant_C, *dD, *dbias, *dinitial;
};

// How the work is shared: blocks of 16 channels in groups, groups in parts (tasks), chunks in segments.
// Groups and parts are powers of two, so that a sum over the groups as a binary tree is the same
// whatever the parts: each has a whole branch.
struct Shape {
  int64_t blocks, chunks, groups, segment, parts;
  // `by_group`: there is a partial sum of dB and dC for every group, else for every part.
  template <class T>
  Shape(const Arguments<T>& a, bool by_group) {
    blocks = (a.width + BLOCK - 1) / BLOCK;
    chunks = (a.length + CHUNK - 1) / CHUNK;
    // Enough groups to share among many cores, and no more.
    constexpr int64_t GROUPS = 32, PARTIAL_NUMBERS = 1 << 20;
    groups = 1;
    while (groups * a.batch < GROUPS && 2 * groups <= blocks) groups *= 2;
    // A task takes as many groups as the threads leave it: neighbours share pages and lines.
    const int64_t threads = a.team.threads;
    parts = 1;
    while (parts < groups && parts * a.batch < 2 * threads && parts * a.batch % threads) parts *= 2;
    // Backward goes segment by segment so that the partial sums stay in the cache.
    const int64_t partials = by_group ? groups : parts;
    segment = PARTIAL_NUMBERS / (a.batch * partials * 2 * (1 + a.complex) * a.state) / CHUNK;
    segment = partials == 1 && !by_group ? chunks : segment < 1 ? 1 : segment;
    segment = segment < chunks ? segment : chunks;
  }
  int64_t first_block(int64_t group) const { return blocks * group / groups; }
  int64_t first_group(int64_t part) const { return groups * part / parts; }
};

struct Span {
  int64_t start, end;
  bool reset;
};

// The spans of the chunk at t; at most as many as it has steps.
template <class T>
static int64_t spans_of(const Arguments<T>& a, int64_t b, int64_t t, int64_t steps, Span* spans) {
  const uint8_t* reset = a.reset ? a.reset + b * a.length + t : nullptr;
  int64_t count = 0;
  spans[count++] = {0, steps, reset && reset[0]};
  for (int64_t i = 1; reset && i < steps; i++)
    if (reset[i]) {
      spans[count - 1].end = i;
      spans[count++] = {i, steps, true};
    }
  return count;
}
