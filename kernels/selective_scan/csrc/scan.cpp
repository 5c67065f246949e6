// The selective scan and its gradient: channels in vectors, time in chunks, recompute in backward.
//
// A task is one sequence and a group of blocks of 16 channels. It walks the chunks in time; in a
// chunk each block first turns its inputs into float32 rows in the first-level cache (any dtype, any
// width, softplus, gate), then runs the recurrence for a few states at a time, held in registers.
// Forward keeps the state before every chunk (the checkpoints); backward recomputes a chunk from it.
//
// Nothing depends on the number of threads: groups, segments and the order of every sum follow from
// the shape. B_t and C_t are shared by all channels, so their gradients are sums over the lanes of a
// vector, over the blocks of a group, and, through `partials`, over the groups in order.

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"

namespace {

#ifndef CHUNK_STEPS
#define CHUNK_STEPS 32
#endif
constexpr int64_t CHUNK = CHUNK_STEPS;
constexpr int64_t MAX_STATE = 256;
// States in registers at a time: as many as leave room for A, the gradients and the polynomial.
#if defined(__AVX512F__)
#ifndef FWD_STATES
#define FWD_STATES 8
#endif
#ifndef BWD_STATES
#define BWD_STATES 8
#endif
#else
#define FWD_STATES 4
#define BWD_STATES 4
#endif

extern "C" struct ScanArgs {
  int64_t batch, length, width, state;
  Team team;
  int32_t softplus, unused;
  Rows u, delta, z, B, C;  // z, and B or C where they are constant: null
  const float *A, *constant_B, *constant_C, *D, *bias, *initial;
  const uint8_t* reset;
  float* checkpoints;  // (batch, chunks, blocks, state, 16)
  float* workspace;    // as many floats as scan_workspace says
  // Forward
  Rows y;
  float* final_state;
  // Backward; a null output is not wanted
  Rows dy, du, ddelta, dz, dB, dC;
  const float* dfinal;
  float *dA, *dconstant_B, *dconstant_C, *dD, *dbias, *dinitial;
};

// Vectors at a time in what is done to whole chunks. The last ones of a short chunk hold old numbers.
constexpr int STRIDE = 4;
static_assert(CHUNK * BLOCK % (STRIDE * W) == 0);

struct Span {  // steps of a chunk between resets
  int64_t start, end;
  bool reset;
};

struct Shape {
  int64_t blocks, chunks, groups, segment, parts;
  explicit Shape(const ScanArgs& a) {
    blocks = (a.width + BLOCK - 1) / BLOCK;
    chunks = (a.length + CHUNK - 1) / CHUNK;
    // Enough groups to share among many cores, and no more: each adds a partial sum of dB and dC.
    constexpr int64_t GROUPS = 32, PARTIAL_FLOATS = 1 << 20;
    groups = (GROUPS + a.batch - 1) / a.batch;
    groups = groups < blocks ? groups : blocks;
    // Backward goes segment by segment so that the partial sums stay in the cache.
    segment = PARTIAL_FLOATS / (a.batch * groups * 2 * a.state) / CHUNK;
    segment = groups == 1 ? chunks : segment < 1 ? 1 : segment;
    segment = segment < chunks ? segment : chunks;
    // A task takes as many groups as the threads leave it: neighbours share pages and lines.
    parts = a.team.threads > 1 ? (2 * a.team.threads + a.batch - 1) / a.batch : 1;
    parts = parts < groups ? parts : groups;
  }
  int64_t first_block(int64_t group) const { return blocks * group / groups; }
  int64_t first_group(int64_t part) const { return groups * part / parts; }
};

// Per block of channels, states by rows of 16 channels: (blocks, state, 16), zero beyond the width.
void pack(const ScanArgs& a, const float* in, float scale, float* out) {
  const int64_t blocks = (a.width + BLOCK - 1) / BLOCK;
  for (int64_t d = 0; d < blocks * BLOCK; d++)
    for (int64_t n = 0; n < a.state; n++)
      out[(d / BLOCK * a.state + n) * BLOCK + d % BLOCK] =
          d < a.width ? in[d * a.state + n] * scale : 0.0f;
}

struct Workspace {
  float *A, *B, *C;             // packed, A in units of log2
  float* steepest;              // (blocks): the largest |A|, in the same units
  float *carry, *dA, *dB, *dC;  // (batch, blocks, state, 16)
  float *dD, *dbias;            // (batch, blocks, 16)
  float* partials;              // (batch, groups, segment, CHUNK, 2 state)
  int64_t size = 0;
  Workspace(const ScanArgs& a, const Shape& s, bool backward) {
    const int64_t parameters = s.blocks * a.state * BLOCK, sums = backward ? a.batch : 0;
    A = take(a, parameters);
    B = take(a, a.constant_B ? parameters : 0);
    C = take(a, a.constant_C ? parameters : 0);
    steepest = take(a, s.blocks);
    carry = take(a, sums * parameters);
    dA = take(a, sums * parameters);
    dB = take(a, a.constant_B ? sums * parameters : 0);
    dC = take(a, a.constant_C ? sums * parameters : 0);
    dD = take(a, sums * s.blocks * BLOCK);
    dbias = take(a, sums * s.blocks * BLOCK);
    partials = take(a, s.groups > 1 ? sums * s.groups * s.segment * CHUNK * 2 * a.state : 0);
  }
  float* partial(const ScanArgs& a, const Shape& s, int64_t b, int64_t group, int64_t i) const {
    return partials + ((b * s.groups + group) * s.segment + i) * CHUNK * 2 * a.state;
  }
  float* take(const ScanArgs& a, int64_t floats) {
    float* p = a.workspace + size;
    size += (floats + BLOCK - 1) / BLOCK * BLOCK;
    return p;
  }
  void pack_parameters(const ScanArgs& a, int64_t blocks) {
    pack(a, a.A, LOG2E, A);
    for (int64_t block = 0; block < blocks; block++) {
      vf largest = splat(0.0f);
      for (int64_t i = 0; i < a.state * BLOCK; i += W)
        largest = max(abs(load(A + block * a.state * BLOCK + i)), largest);
      steepest[block] = largest_lane(largest);
    }
    if (a.constant_B) pack(a, a.constant_B, 1.0f, B);
    if (a.constant_C) pack(a, a.constant_C, 1.0f, C);
  }
};

// State of one sequence and block, as rows of 16 channels, from and to (batch, width, state).
void read_state(const ScanArgs& a, const float* in, int64_t b, int64_t block, float* out) {
  for (int64_t i = 0; i < BLOCK; i++) {
    const int64_t d = block * BLOCK + i;
    for (int64_t n = 0; n < a.state; n++)
      out[n * BLOCK + i] = in && d < a.width ? in[(b * a.width + d) * a.state + n] : 0.0f;
  }
}
void write_state(const ScanArgs& a, const float* in, int64_t b, int64_t block, float* out) {
  for (int64_t i = 0; i < BLOCK && block * BLOCK + i < a.width; i++)
    for (int64_t n = 0; n < a.state; n++)
      out[(b * a.width + block * BLOCK + i) * a.state + n] = in[n * BLOCK + i];
}

int64_t spans_of(const ScanArgs& a, int64_t b, int64_t t, int64_t steps, Span* spans) {
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

// B or C of a chunk. Selective: the same number for all channels; constant: a row of 16 a state.
struct Projection {
  const float* data;
  int64_t stride;  // between steps; selective only
  Projection(const Rows& x, int64_t b, int64_t t, int64_t steps, int64_t state, float* buffer) {
    if (!x.data) return;
    data = (const float*)x.data + b * x.batch_stride + t * x.time_stride;
    stride = x.time_stride;
    if (x.dtype != FLOAT32) {
      data = buffer;
      stride = (state + BLOCK - 1) / BLOCK * BLOCK;
      read_rows(x, b, t, steps, 0, state, buffer, stride);
    }
  }
};

template <bool SELECTIVE>
INLINE vf projection(const Projection& p, int64_t t, int64_t n) {
  if constexpr (SELECTIVE)
    return splat(p.data[t * p.stride + n]);
  else
    return load(p.data + n * BLOCK);
}
template <bool SELECTIVE>
INLINE Projection at(const Projection& p, const float* constant, int64_t n, int64_t lane) {
  Projection moved = p;
  moved.data = SELECTIVE ? p.data + n : constant + n * BLOCK + lane;
  return moved;
}

template <int N>
using Count = std::integral_constant<int, N>;

// f(Count<K>, n) for states n .. n+K-1, K = MOST as long as it fits, then the powers of two below.
template <int MOST, class F>
INLINE void for_states(int64_t state, const F& f) {
  int64_t n = 0;
  for (; n + MOST <= state; n += MOST) f(Count<MOST>(), n);
  if constexpr (MOST > 8)
    if (n + 8 <= state) f(Count<8>(), n), n += 8;
  if constexpr (MOST > 4)
    if (n + 4 <= state) f(Count<4>(), n), n += 4;
  if constexpr (MOST > 2)
    if (n + 2 <= state) f(Count<2>(), n), n += 2;
  if (n < state) f(Count<1>(), n);
}

struct Place {
  int64_t t, d;
};

// The rows of a block's chunk, which the recurrence of the one before leaves time to fetch.
INLINE void prefetch(const ScanArgs& a, const Rows& x, int64_t b, Place at) {
  if (at.t < 0) return;
  prefetch_rows<false>(x, b, at.t, a.length - at.t < CHUNK ? a.length - at.t : CHUNK, at.d);
}

// ---- Forward

// h and y of a span for K states and one vector of channels; the rows are 16 floats apart.
template <int K, bool SB, bool SC, bool WITHIN>
static void recur(const Span& span, const float* delta, const float* x, float* y, const float* A,
                  Projection B, Projection C, float* state) {
  vf h[K];
  for (int k = 0; k < K; k++) h[k] = span.reset ? splat(0.0f) : load(state + k * BLOCK);
  for (int64_t t = span.start; t < span.end; t++) {
    const vf dt = load(delta + t * BLOCK), xt = load(x + t * BLOCK);
    vf sum = load(y + t * BLOCK), decay[K];
    for (int k = 0; k < K; k++) decay[k] = dt * load(A + k * BLOCK);
    exp2s<K, WITHIN>(decay);
    for (int k = 0; k < K; k++) {
      h[k] = decay[k] * h[k] + projection<SB>(B, t, k) * xt;
      sum += projection<SC>(C, t, k) * h[k];
    }
    store(y + t * BLOCK, sum);
  }
  for (int k = 0; k < K; k++) store(state + k * BLOCK, h[k]);
}

template <bool SB, bool SC>
static void forward_task(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                         int64_t part) {
  alignas(64) float delta[CHUNK * BLOCK] = {}, u[CHUNK * BLOCK] = {}, y[CHUNK * BLOCK] = {};
  alignas(64) float state[MAX_STATE * BLOCK];
  alignas(64) float B_buffer[CHUNK * MAX_STATE], C_buffer[CHUNK * MAX_STATE];
  Span spans[CHUNK];
  const int64_t N = a.state, row_size = N * BLOCK;
  const int64_t first = shape.first_block(shape.first_group(part));
  const int64_t last = shape.first_block(shape.first_group(part + 1));
  float* checkpoints = a.checkpoints + b * shape.chunks * shape.blocks * row_size;
  for (int64_t block = first; block < last; block++)
    read_state(a, a.initial, b, block, checkpoints + block * row_size);

  for (int64_t chunk = 0; chunk < shape.chunks; chunk++) {
    const int64_t t = chunk * CHUNK;
    const int64_t steps = a.length - t < CHUNK ? a.length - t : CHUNK;
    const int64_t count = spans_of(a, b, t, steps, spans);
    const Projection B(a.B, b, t, steps, N, B_buffer), C(a.C, b, t, steps, N, C_buffer);
    for (int64_t block = first; block < last; block++) {
      const int64_t d = block * BLOCK, valid = a.width - d < BLOCK ? a.width - d : BLOCK;
      alignas(64) float D[BLOCK] = {}, bias[BLOCK] = {};
      if (a.D) memcpy(D, a.D + d, valid * sizeof(float));
      if (a.bias) memcpy(bias, a.bias + d, valid * sizeof(float));

      read_rows(a.delta, b, t, steps, d, valid, delta, BLOCK);
      read_rows(a.u, b, t, steps, d, valid, u, BLOCK);
      vf longest = splat(0.0f);
      for (int64_t i = 0; i < steps * BLOCK; i += STRIDE * W) {
        vf dt[STRIDE];
        for (int j = 0; j < STRIDE; j++)
          dt[j] = load(delta + i + j * W) + load(bias + (i + j * W) % BLOCK);
        if (a.softplus) softpluses<STRIDE>(dt, nullptr);
        for (int j = 0; j < STRIDE; j++) {
          const vf ut = load(u + i + j * W);
          store(delta + i + j * W, dt[j]);
          store(u + i + j * W, ut * dt[j]);
          store(y + i + j * W, ut * load(D + (i + j * W) % BLOCK));
          longest = max(abs(dt[j]), longest);
        }
      }
      const bool within = largest_lane(longest) * w.steepest[block] <= EXP2_WITHIN;

      const Place next = block + 1 < last ? Place{t, d + BLOCK} : Place{t + CHUNK, first * BLOCK};
      for (const Rows* x : {&a.delta, &a.u, &a.z}) prefetch(a, *x, b, next);
      prefetch_rows<true>(a.y, b, t, steps, d);

      const float* before = checkpoints + (chunk * shape.blocks + block) * row_size;
      const bool ends = chunk + 1 == shape.chunks;
      float* after = ends ? state : checkpoints + ((chunk + 1) * shape.blocks + block) * row_size;
      memcpy(after, before, row_size * sizeof(float));
      for_states<FWD_STATES>(N, [&](auto k, int64_t n) {
        constexpr int K = decltype(k)::value;
        for (int lane = 0; lane < BLOCK; lane += W)
          for (int64_t s = 0; s < count; s++)
            (within ? recur<K, SB, SC, true> : recur<K, SB, SC, false>)(
                spans[s], delta + lane, u + lane, y + lane,
                w.A + block * row_size + n * BLOCK + lane,
                at<SB>(B, w.B + block * row_size, n, lane),
                at<SC>(C, w.C + block * row_size, n, lane), after + n * BLOCK + lane);
      });
      if (ends) write_state(a, state, b, block, a.final_state);

      if (a.z.data) {
        read_rows(a.z, b, t, steps, d, valid, u, BLOCK);
        for (int64_t i = 0; i < steps * BLOCK; i += STRIDE * W) {
          vf z[STRIDE], gate[STRIDE];
          for (int j = 0; j < STRIDE; j++) gate[j] = z[j] = load(u + i + j * W);
          sigmoids<STRIDE>(gate);
          for (int j = 0; j < STRIDE; j++)
            store(y + i + j * W, load(y + i + j * W) * (z[j] * gate[j]));
        }
      }
      write_rows(a.y, b, t, steps, d, valid, y, BLOCK);
    }
  }
}

// ---- Backward

// A chunk of one block: rows of 16 channels.
struct Rows16 {
  alignas(64) float delta[CHUNK * BLOCK], x[CHUNK * BLOCK];   // Δ and Δ u
  alignas(64) float u[CHUNK * BLOCK], slope[CHUNK * BLOCK];   // slope: dΔ / d(delta)
  alignas(64) float dy[CHUNK * BLOCK], dgate[CHUNK * BLOCK];  // dy: before the gate; dz = dgate y
  alignas(64) float y[CHUNK * BLOCK];                         // before the gate
  alignas(64) float ddelta[CHUNK * BLOCK], dx[CHUNK * BLOCK];
};

// What one pass over K states and W channels keeps: decay exp(Δ A) and the state before each step.
struct Tape {
  alignas(64) float decay[CHUNK * BWD_STATES * W];
  alignas(64) float state[(CHUNK + 1) * BWD_STATES * W];
};

template <int K, bool SB, bool SC, bool GATED, bool WITHIN>
static void replay(const Span& span, Rows16& r, int lane, const float* A, Projection B,
                   Projection C, Tape& tape) {
  vf h[K];
  for (int k = 0; k < K; k++)
    h[k] = span.reset ? splat(0.0f) : load(tape.state + (span.start * K + k) * W);
  for (int64_t t = span.start; t < span.end; t++) {
    const vf dt = load(r.delta + t * BLOCK + lane), xt = load(r.x + t * BLOCK + lane);
    vf sum = GATED ? load(r.y + t * BLOCK + lane) : dt, decay[K];
    for (int k = 0; k < K; k++) decay[k] = dt * load(A + k * BLOCK);
    exp2s<K, WITHIN>(decay);
    for (int k = 0; k < K; k++) {
      store(tape.decay + (t * K + k) * W, decay[k]);
      h[k] = decay[k] * h[k] + projection<SB>(B, t, k) * xt;
      store(tape.state + ((t + 1) * K + k) * W, h[k]);
      if (GATED) sum += projection<SC>(C, t, k) * h[k];
    }
    if (GATED) store(r.y + t * BLOCK + lane, sum);
  }
}

// Sums over lanes of M vectors, added to out[0 .. M-1].
template <int M>
INLINE void add_lane_sums(const vf* p, float* out) {
  if constexpr (M >= W) {
    for (int i = 0; i < M; i += W) store(out + i, load(out + i) + lane_sums<1, W>(p + i));
  } else {
    float sums[W];
    store(sums, lane_sums<1, M>(p));
    for (int i = 0; i < M; i++) out[i] += sums[i];
  }
}

// sums: per step, dB of the K states, then dC, `stride` floats apart.
template <int K, bool SB, bool SC>
static void reverse(const Span& span, Rows16& r, int lane, const float* A, Projection B,
                    Projection C, const Tape& tape, float* carry, float* dA, float* dB, float* dC,
                    float* sums, int64_t stride) {
  static const float zeros[K * W] = {};
  vf dh[K], da[K], db[K], dc[K];
  for (int k = 0; k < K; k++) {
    dh[k] = load(carry + k * BLOCK);
    da[k] = load(dA + k * BLOCK);
    if (!SB) db[k] = load(dB + k * BLOCK);
    if (!SC) dc[k] = load(dC + k * BLOCK);
  }
  for (int64_t t = span.end - 1; t >= span.start; t--) {
    const vf dt = load(r.delta + t * BLOCK + lane), xt = load(r.x + t * BLOCK + lane);
    const vf dy = load(r.dy + t * BLOCK + lane);
    vf ddt = load(r.ddelta + t * BLOCK + lane), dx = load(r.dx + t * BLOCK + lane);
    const float* before = span.reset && t == span.start ? zeros : tape.state + t * K * W;
    const float* after = tape.state + (t + 1) * K * W;
    const float* decay = tape.decay + t * K * W;
    vf products[2 * K];
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
      const vf h = load(after + k * W);
      const vf g = dh[k] + dy * projection<SC>(C, t, k);
      if (SC)
        products[K + k] = dy * h;
      else
        dc[k] += dy * h;
      if (SB)
        products[k] = g * xt;
      else
        db[k] += g * xt;
      dx += g * projection<SB>(B, t, k);
      dh[k] = g * load(decay + k * W);
      const vf q = dh[k] * load(before + k * W);
      da[k] += q * dt;
      ddt += q * load(A + k * BLOCK);
    }
    store(r.ddelta + t * BLOCK + lane, ddt);
    store(r.dx + t * BLOCK + lane, dx);
    if constexpr (SB && SC)
      add_lane_sums<2 * K>(products, sums + t * stride);
    else if constexpr (SB)
      add_lane_sums<K>(products, sums + t * stride);
    else if constexpr (SC)
      add_lane_sums<K>(products + K, sums + t * stride + K);
  }
  for (int k = 0; k < K; k++) {
    store(carry + k * BLOCK, span.reset ? splat(0.0f) : dh[k]);
    store(dA + k * BLOCK, da[k]);
    if (!SB) store(dB + k * BLOCK, db[k]);
    if (!SC) store(dC + k * BLOCK, dc[k]);
  }
}

// The sums as `reverse` leaves them to a row of dB and one of dC for every step.
void write_sums(const ScanArgs& a, const float* sums, int64_t b, int64_t t, int64_t steps) {
  alignas(64) float dB[CHUNK * MAX_STATE + W], dC[CHUNK * MAX_STATE + W];
  const int64_t N = a.state;
  for (int64_t i = 0; i < steps; i++)
    for_states<BWD_STATES>(N, [&](auto k, int64_t n) {
      constexpr int K = decltype(k)::value;
      memcpy(dB + i * N + n, sums + (i * N + n) * 2, K * sizeof(float));
      memcpy(dC + i * N + n, sums + (i * N + n) * 2 + K, K * sizeof(float));
    });
  if (a.dB.data) write_rows(a.dB, b, t, steps, 0, N, dB, N);
  if (a.dC.data) write_rows(a.dC, b, t, steps, 0, N, dC, N);
}

template <bool SB, bool SC>
static void backward_task(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                          int64_t part, int64_t first_chunk, int64_t last_chunk) {
  Rows16 r = {};
  Tape tape;
  alignas(64) float sum_buffer[CHUNK * 2 * MAX_STATE];
  float* sums = sum_buffer;
  alignas(64) float B_buffer[CHUNK * MAX_STATE], C_buffer[CHUNK * MAX_STATE];
  Span spans[CHUNK];
  const int64_t N = a.state, row_size = N * BLOCK;
  const int64_t first_group = shape.first_group(part), last_group = shape.first_group(part + 1);
  const int64_t first = shape.first_block(first_group), last = shape.first_block(last_group);

  if (last_chunk == shape.chunks)
    for (int64_t block = first; block < last; block++) {
      const int64_t at = b * shape.blocks + block;
      read_state(a, a.dfinal, b, block, w.carry + at * row_size);
      memset(w.dA + at * row_size, 0, row_size * sizeof(float));
      if (!SB) memset(w.dB + at * row_size, 0, row_size * sizeof(float));
      if (!SC) memset(w.dC + at * row_size, 0, row_size * sizeof(float));
      memset(w.dD + at * BLOCK, 0, BLOCK * sizeof(float));
      memset(w.dbias + at * BLOCK, 0, BLOCK * sizeof(float));
    }

  for (int64_t chunk = last_chunk - 1; chunk >= first_chunk; chunk--) {
    const int64_t t = chunk * CHUNK;
    const int64_t steps = a.length - t < CHUNK ? a.length - t : CHUNK;
    const int64_t count = spans_of(a, b, t, steps, spans);
    const Projection B(a.B, b, t, steps, N, B_buffer), C(a.C, b, t, steps, N, C_buffer);
    int64_t group = first_group;
    for (int64_t block = first; block < last; block++) {
      if ((SB || SC) && block == shape.first_block(group)) {
        if (shape.groups > 1) sums = w.partial(a, shape, b, group, chunk - first_chunk);
        memset(sums, 0, steps * 2 * N * sizeof(float));
      }
      const int64_t d = block * BLOCK, valid = a.width - d < BLOCK ? a.width - d : BLOCK;
      const int64_t parameters = block * row_size;
      const int64_t at_sum = (b * shape.blocks + block) * row_size;
      alignas(64) float D[BLOCK] = {}, bias[BLOCK] = {};
      if (a.D) memcpy(D, a.D + d, valid * sizeof(float));
      if (a.bias) memcpy(bias, a.bias + d, valid * sizeof(float));

      read_rows(a.delta, b, t, steps, d, valid, r.delta, BLOCK);
      read_rows(a.u, b, t, steps, d, valid, r.u, BLOCK);
      read_rows(a.dy, b, t, steps, d, valid, r.dy, BLOCK);
      if (a.z.data) read_rows(a.z, b, t, steps, d, valid, r.dgate, BLOCK);
      vf longest = splat(0.0f);
      for (int64_t i = 0; i < steps * BLOCK; i += STRIDE * W) {
        vf dt[STRIDE], slope[STRIDE];
        for (int j = 0; j < STRIDE; j++) {
          dt[j] = load(r.delta + i + j * W) + load(bias + (i + j * W) % BLOCK);
          slope[j] = splat(1.0f);
        }
        if (a.softplus) softpluses<STRIDE>(dt, slope);
        for (int j = 0; j < STRIDE; j++) {
          store(r.delta + i + j * W, dt[j]);
          store(r.slope + i + j * W, slope[j]);
          store(r.x + i + j * W, load(r.u + i + j * W) * dt[j]);
          store(r.ddelta + i + j * W, splat(0.0f));
          store(r.dx + i + j * W, splat(0.0f));
          longest = max(abs(dt[j]), longest);
        }
      }
      const bool within = largest_lane(longest) * w.steepest[block] <= EXP2_WITHIN;
      if (a.z.data)
        for (int64_t i = 0; i < steps * BLOCK; i += STRIDE * W) {
          vf z[STRIDE], s[STRIDE];
          for (int j = 0; j < STRIDE; j++) s[j] = z[j] = load(r.dgate + i + j * W);
          sigmoids<STRIDE>(s);
          for (int j = 0; j < STRIDE; j++) {
            const vf dy = load(r.dy + i + j * W), gate = z[j] * s[j];
            store(r.dgate + i + j * W, dy * (s[j] + gate * (1.0f - s[j])));
            store(r.dy + i + j * W, dy * gate);
            store(r.y + i + j * W, load(r.u + i + j * W) * load(D + (i + j * W) % BLOCK));
          }
        }

      const Place next = block + 1 < last ? Place{t, d + BLOCK} : Place{t - CHUNK, first * BLOCK};
      for (const Rows* x : {&a.delta, &a.u, &a.dy, &a.z}) prefetch(a, *x, b, next);
      for (const Rows* x : {&a.du, &a.ddelta, &a.dz}) prefetch_rows<true>(*x, b, t, steps, d);

      const float* before =
          a.checkpoints + ((b * shape.chunks + chunk) * shape.blocks + block) * row_size;
      for_states<BWD_STATES>(N, [&](auto k, int64_t n) {
        constexpr int K = decltype(k)::value;
        for (int lane = 0; lane < BLOCK; lane += W) {
          const int64_t at_state = n * BLOCK + lane;
          const float* A = w.A + parameters + at_state;
          const Projection Bn = at<SB>(B, w.B + parameters, n, lane);
          const Projection Cn = at<SC>(C, w.C + parameters, n, lane);
          for (int i = 0; i < K; i++)
            store(tape.state + i * W, load(before + at_state + i * BLOCK));
          for (int64_t s = 0; s < count; s++) {
            const auto run = a.dz.data ? within ? replay<K, SB, SC, true, true>
                                                : replay<K, SB, SC, true, false>
                                       : within ? replay<K, SB, SC, false, true>
                                                : replay<K, SB, SC, false, false>;
            run(spans[s], r, lane, A, Bn, Cn, tape);
          }
          for (int64_t s = count - 1; s >= 0; s--)
            reverse<K, SB, SC>(spans[s], r, lane, A, Bn, Cn, tape, w.carry + at_sum + at_state,
                               w.dA + at_sum + at_state, w.dB + at_sum + at_state,
                               w.dC + at_sum + at_state, sums + 2 * n, 2 * N);
        }
      });

      float* dD = w.dD + (b * shape.blocks + block) * BLOCK;
      float* dbias = w.dbias + (b * shape.blocks + block) * BLOCK;
      for (int lane = 0; lane < BLOCK; lane += W) {
        vf sum_D = load(dD + lane), sum_bias = load(dbias + lane);
        const vf skip = load(D + lane);
        for (int64_t i = lane; i < steps * BLOCK; i += BLOCK) {
          const vf ut = load(r.u + i), dy = load(r.dy + i), dx = load(r.dx + i);
          const vf ddelta = (load(r.ddelta + i) * LN2 + dx * ut) * load(r.slope + i);
          sum_D += dy * ut;
          sum_bias += ddelta;
          store(r.ddelta + i, ddelta);
          store(r.dx + i, dx * load(r.delta + i) + skip * dy);
          if (a.dz.data) store(r.y + i, load(r.y + i) * load(r.dgate + i));
        }
        store(dD + lane, sum_D);
        store(dbias + lane, sum_bias);
      }
      if (a.du.data) write_rows(a.du, b, t, steps, d, valid, r.dx, BLOCK);
      if (a.ddelta.data) write_rows(a.ddelta, b, t, steps, d, valid, r.ddelta, BLOCK);
      if (a.dz.data) write_rows(a.dz, b, t, steps, d, valid, r.y, BLOCK);

      if (block + 1 == shape.first_block(group + 1)) {
        if ((SB || SC) && shape.groups == 1) write_sums(a, sums, b, t, steps);
        group++;
      }
    }
  }
  if (first_chunk == 0 && a.dinitial)
    for (int64_t block = first; block < last; block++)
      write_state(a, w.carry + (b * shape.blocks + block) * row_size, b, block, a.dinitial);
}

// dB and dC of one chunk: the groups' partial sums, added to the first's in order.
void add_partials(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                  int64_t chunk, int64_t first_chunk) {
  const int64_t t = chunk * CHUNK, steps = a.length - t < CHUNK ? a.length - t : CHUNK;
  float* sums = w.partial(a, shape, b, 0, chunk - first_chunk);
  for (int64_t group = 1; group < shape.groups; group++) {
    const float* from = w.partial(a, shape, b, group, chunk - first_chunk);
    for (int64_t i = 0; i < steps * 2 * a.state; i++) sums[i] += from[i];
  }
  write_sums(a, sums, b, t, steps);
}

// (batch, blocks, rows, 16) sums to (width, rows), over the batch in order.
void add_batch(const ScanArgs& a, const float* sums, int64_t rows, float* out) {
  if (!out) return;
  const int64_t blocks = (a.width + BLOCK - 1) / BLOCK;
  for (int64_t d = 0; d < a.width; d++)
    for (int64_t n = 0; n < rows; n++) {
      float sum = 0;
      for (int64_t b = 0; b < a.batch; b++)
        sum += sums[((b * blocks + d / BLOCK) * rows + n) * BLOCK + d % BLOCK];
      out[d * rows + n] = sum;
    }
}

template <class F>
void with_projections(const ScanArgs& a, const F& f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (a.constant_B)
    a.constant_C ? f(No(), No()) : f(No(), Yes());
  else
    a.constant_C ? f(Yes(), No()) : f(Yes(), Yes());
}

}  // namespace

extern "C" {

int64_t scan_chunk() { return CHUNK; }

int64_t scan_workspace(const ScanArgs* a, int32_t backward) {
  return Workspace(*a, Shape(*a), backward).size;
}

void scan_forward(const ScanArgs* args) {
  const ScanArgs& a = *args;
  const Shape shape(a);
  Workspace w(a, shape, false);
  w.pack_parameters(a, shape.blocks);
  with_projections(a, [&](auto sb, auto sc) {
    parallel_for(a.team, a.batch * shape.parts, [&](int64_t task) {
      forward_task<decltype(sb)::value, decltype(sc)::value>(a, shape, w, task / shape.parts,
                                                             task % shape.parts);
    });
  });
}

void scan_backward(const ScanArgs* args) {
  const ScanArgs& a = *args;
  const Shape shape(a);
  Workspace w(a, shape, true);
  w.pack_parameters(a, shape.blocks);
  for (int64_t last = shape.chunks; last > 0;) {
    const int64_t first = (last - 1) / shape.segment * shape.segment;
    with_projections(a, [&](auto sb, auto sc) {
      parallel_for(a.team, a.batch * shape.parts, [&](int64_t task) {
        backward_task<decltype(sb)::value, decltype(sc)::value>(
            a, shape, w, task / shape.parts, task % shape.parts, first, last);
      });
    });
    if (shape.groups > 1 && (a.dB.data || a.dC.data))
      parallel_for(a.team, a.batch * (last - first), [&](int64_t task) {
        add_partials(a, shape, w, task / (last - first), first + task % (last - first), first);
      });
    last = first;
  }
  add_batch(a, w.dA, a.state, a.dA);
  add_batch(a, w.dB, a.state, a.dconstant_B);
  add_batch(a, w.dC, a.state, a.dconstant_C);
  add_batch(a, w.dD, 1, a.dD);
  add_batch(a, w.dbias, 1, a.dbias);
}

}  // extern "C"
