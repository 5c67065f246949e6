// The selective scan and its gradient: channels in vectors, time in chunks, recompute in backward.
//
// A task is one sequence and a group of blocks of 16 channels. It walks the chunks in time; in a
// chunk each block first turns its inputs into float32 rows in the first-level cache (any dtype, any
// width, softplus, gate), then takes a few states at a time: all their decays, then the recurrence,
// states held in registers.
// Forward keeps the state before every chunk (the checkpoints); backward recomputes a chunk from it.
//
// Nothing depends on the number of threads: groups, segments and the order of every sum follow from
// the shape. B_t and C_t are shared by all channels, so their gradients are sums over the lanes of a
// vector, over the blocks of a group, and over the groups as a binary tree: a task adds its own, and
// what several tasks have of a chunk is added after them, from `partials`.

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"
#include "arguments.h"

namespace {

// States at a time: as many as leave room in registers for them and their gradients, and beside
// their decays in a first-level cache of 32 KB for a chunk's rows.
#if defined(__AVX512F__)
constexpr int FWD_STATES = 8, BWD_STATES = 8;
#else
constexpr int FWD_STATES = 4, BWD_STATES = 4;
#endif
// Vectors of channels side by side: they share what is loaded of B_t and C_t, and in backward the
// sums over lanes.
constexpr int LANES = V > 1 ? 2 : 1;

using ScanArgs = Arguments<float>;

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
  float* carry;                 // (batch, blocks, state, 16): what a chunk hands to the next
  float *dA, *dB, *dC;          // the same
  float *dD, *dbias;            // (batch, blocks, 16)
  float* partials;              // (batch, parts, segment, CHUNK, 2 state)
  float* branches;              // (batch, parts, MOST_BRANCHES, CHUNK, 2 state)
  int64_t size = 0;
  static constexpr int64_t MOST_BRANCHES = 6;  // of a tree of 32 groups, while it is added up
  Workspace(const ScanArgs& a, const Shape& s, bool backward) {
    const int64_t parameters = s.blocks * a.state * BLOCK, sums = backward ? a.batch : 0;
    A = take(a, parameters);
    B = take(a, a.constant_B ? parameters : 0);
    C = take(a, a.constant_C ? parameters : 0);
    steepest = take(a, s.blocks);
    carry = take(a, backward || !a.checkpoints ? a.batch * parameters : 0);
    dA = take(a, sums * parameters);
    dB = take(a, a.constant_B ? sums * parameters : 0);
    dC = take(a, a.constant_C ? sums * parameters : 0);
    dD = take(a, sums * s.blocks * BLOCK);
    dbias = take(a, sums * s.blocks * BLOCK);
    const int64_t tasks = sums * s.parts, chunk = CHUNK * 2 * a.state;
    partials = take(a, s.parts > 1 ? tasks * s.segment * chunk : 0);
    branches = take(a, tasks * MOST_BRANCHES * chunk);
  }
  float* partial(const ScanArgs& a, const Shape& s, int64_t b, int64_t part, int64_t i) const {
    return partials + ((b * s.parts + part) * s.segment + i) * CHUNK * 2 * a.state;
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
INLINE vf projection(const Projection& p, int64_t t, int64_t n, int64_t l = 0) {
  if constexpr (SELECTIVE)
    return splat(p.data[t * p.stride + n]);
  else
    return load(p.data + n * BLOCK + l * W);
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

// Lines of memory to fetch, step by step while a pass over some states computes: a processor waits
// once a few tens of misses are under way, so that asking for all at once would stall it.
struct Lines {
  struct Line {
    const char* at;
    int64_t stride;
  };
  const Line *begin, *end;
  void fetch(int64_t t) const {
    for (const Line* line = begin; line < end; line++)
      __builtin_prefetch(line->at + t * line->stride);
  }
};
// The rows of a block's chunk that will be read, or written, in full; a wrong guess costs nothing.
struct Ahead {
  Lines::Line lines[7];
  int64_t count = 0;
  void add(const Rows& x, int64_t b, int64_t t, int64_t d) {
    if (!x.data) return;
    const int64_t size = x.dtype == FLOAT32 ? 4 : 2;
    const int64_t at = b * x.batch_stride + t * x.time_stride + d;
    lines[count++] = {x.data + at * size, x.time_stride * size};
  }
  // What falls to the next of `passes` passes.
  Lines share(int64_t passes) {
    const int64_t first = count * pass / passes, last = count * (pass + 1) / passes;
    pass++;
    return {lines + first, lines + last};
  }

 private:
  int64_t pass = 0;
};
// How often `for_states` calls its function, for every L vectors of a block.
template <int MOST, int L>
int64_t passes_of(int64_t state) {
  return (state / MOST + __builtin_popcountll(state % MOST)) * (V / L);
}

// A chunk of one block of channels in memory, where the block is whole; else a copy in `staging`.
struct Tile {
  void* data;
  int64_t stride;
  Tile(const Rows& x, int64_t b, int64_t t, int64_t d, int64_t valid, float* staging) {
    const int64_t size = x.dtype == FLOAT32 ? 4 : 2;
    const bool whole = valid == BLOCK;
    const int64_t at = b * x.batch_stride + t * x.time_stride + d;
    data = !x.data ? nullptr : whole ? x.data + at * size : (char*)staging;
    stride = whole ? x.time_stride : BLOCK;
  }
  // Of step t and the channels from c on.
  template <int TYPE>
  vf get(int64_t t, int64_t c) const {
    return load_as<TYPE>((const element<TYPE>*)data + t * stride + c);
  }
  template <int TYPE>
  void put(int64_t t, int64_t c, vf x) const {
    store_as<TYPE>((element<TYPE>*)data + t * stride + c, x);
  }
};
Tile read_tile(const Rows& x, int64_t b, int64_t t, int64_t steps, int64_t d, int64_t valid,
               float* staging) {
  if (x.data && valid < BLOCK) read_rows(x, b, t, steps, d, valid, staging, BLOCK);
  return Tile(x, b, t, d, valid, staging);
}

// f(Count<J>, t) for the J vectors of a chunk from step t on, four as long as it fits; vector j is of
// step t + j / V and the channels from j % V * W on.
template <class F>
INLINE void for_vectors(int64_t steps, const F& f) {
  constexpr int MOST = V > 4 ? V : 4;
  int64_t t = 0;
  for (; t + MOST / V <= steps; t += MOST / V) f(Count<MOST>(), t);
  for (; t < steps; t++) f(Count<V>(), t);
}

// exp(Δ A) for K states and L vectors of channels; Δ's rows are `row`, its vectors `vector` floats
// apart. They do not wait for one another as the steps of a recurrence do: apart from it they fill
// the pipes.
template <int K, int L, bool WITHIN, bool ROUGH>
static void decays_as(int64_t steps, const Lines& lines, const float* delta, int64_t row,
                      int64_t vector, const float* A, float* out) {
  for (int64_t t = 0; t < steps; t++) {
    lines.fetch(t);
    for (int l = 0; l < L; l++) {
      const vf dt = load(delta + t * row + l * vector);
      vf x[K];
      for (int k = 0; k < K; k++) x[k] = dt * load(A + k * BLOCK + l * W);
      exp2s<K, WITHIN, ROUGH>(x);
      for (int k = 0; k < K; k++) store(out + ((t * K + k) * L + l) * W, x[k]);
    }
  }
}

// `within` and `rough` are exp2s's; `rough` where Δ came in 16 bits.
template <int K, int L>
static void decays(bool within, bool rough, int64_t steps, const Lines& lines, const float* delta,
                   int64_t row, int64_t vector, const float* A, float* out) {
  const auto some = within  ? (rough ? decays_as<K, L, true, true> : decays_as<K, L, true, false>)
                    : rough ? decays_as<K, L, false, true>
                            : decays_as<K, L, false, false>;
  some(steps, lines, delta, row, vector, A, out);
}

// ---- Forward

// h and y of a span for K states and L vectors of channels; the rows are 16 floats apart.
template <int K, int L, bool SB, bool SC>
static void recur(const Span& span, const float* decay, const float* x, float* y, Projection B,
                  Projection C, float* state) {
  vf h[K][L];
  for (int k = 0; k < K; k++)
    for (int l = 0; l < L; l++)
      h[k][l] = span.reset ? splat(0.0f) : load(state + k * BLOCK + l * W);
  for (int64_t t = span.start; t < span.end; t++) {
    vf xt[L], sum[L];
    for (int l = 0; l < L; l++) {
      xt[l] = load(x + t * BLOCK + l * W);
      sum[l] = load(y + t * BLOCK + l * W);
    }
    for (int k = 0; k < K; k++)
      for (int l = 0; l < L; l++) {
        // This product first: it is the one that becomes an FMA, so that h is rounded once a step.
        const vf kept = load(decay + ((t * K + k) * L + l) * W) * h[k][l];
        h[k][l] = kept + projection<SB>(B, t, k, l) * xt[l];
        sum[l] += projection<SC>(C, t, k, l) * h[k][l];
      }
    for (int l = 0; l < L; l++) store(y + t * BLOCK + l * W, sum[l]);
  }
  for (int k = 0; k < K; k++)
    for (int l = 0; l < L; l++) store(state + k * BLOCK + l * W, h[k][l]);
}

// Δ, x = Δ u and what y starts from, D u; returns the largest |Δ|.
template <int TYPE>
static float enter(bool softplus, int64_t steps, Tile delta_in, Tile u_in, const float* bias,
                   const float* D, float* delta, float* x, float* y) {
  vf longest = splat(0.0f);
  for_vectors(steps, [&](auto count, int64_t t) __attribute__((always_inline)) {
    constexpr int J = decltype(count)::value;
    vf dt[J];
    for (int j = 0; j < J; j++)
      dt[j] = delta_in.get<TYPE>(t + j / V, j % V * W) + load(bias + j % V * W);
    if (softplus) softpluses<J>(dt, nullptr);
    for (int j = 0; j < J; j++) {
      const vf ut = u_in.get<TYPE>(t + j / V, j % V * W);
      const int64_t i = t * BLOCK + j * W;
      store(delta + i, dt[j]);
      store(x + i, ut * dt[j]);
      store(y + i, ut * load(D + j % V * W));
      longest = max(abs(dt[j]), longest);
    }
  });
  return largest_lane(longest);
}

// The gate, if there is one, and out.
template <int TYPE>
static void leave(int64_t steps, bool gated, Tile z_in, const float* y, Tile y_out) {
  for_vectors(steps, [&](auto count, int64_t t) __attribute__((always_inline)) {
    constexpr int J = decltype(count)::value;
    vf z[J], out[J];
    for (int j = 0; j < J; j++) out[j] = load(y + t * BLOCK + j * W);
    if (gated) {
      vf s[J];
      for (int j = 0; j < J; j++) s[j] = z[j] = z_in.get<TYPE>(t + j / V, j % V * W);
      sigmoids<J>(s);
      for (int j = 0; j < J; j++) out[j] *= z[j] * s[j];
    }
    for (int j = 0; j < J; j++) y_out.put<TYPE>(t + j / V, j % V * W, out[j]);
  });
}

template <bool SB, bool SC>
static void forward_task(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                         int64_t part) {
  alignas(64) float delta[CHUNK * BLOCK], u[CHUNK * BLOCK], y[CHUNK * BLOCK];
  alignas(64) float decay[CHUNK * FWD_STATES * LANES * W], state[MAX_STATE * BLOCK];
  alignas(64) float B_buffer[CHUNK * MAX_STATE], C_buffer[CHUNK * MAX_STATE];
  Span spans[CHUNK];
  const int64_t N = a.state, row_size = N * BLOCK;
  const int64_t first = shape.first_block(shape.first_group(part));
  const int64_t last = shape.first_block(shape.first_group(part + 1));
  const int64_t kept = a.checkpoints ? shape.chunks : 1;  // one place, for every chunk in turn
  float* checkpoints =
      (a.checkpoints ? a.checkpoints : w.carry) + b * kept * shape.blocks * row_size;
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

      const Tile delta_in = read_tile(a.delta, b, t, steps, d, valid, delta);
      const Tile u_in = read_tile(a.u, b, t, steps, d, valid, u);
      const float longest = with_type(
          valid == BLOCK ? a.u.dtype : FLOAT32, [&](auto type) {
            return enter<decltype(type)::value>(a.softplus, steps, delta_in, u_in, bias, D, delta,
                                                u, y);
          });
      const bool within = longest * w.steepest[block] <= EXP2_WITHIN;
      const bool rough = a.delta.dtype != FLOAT32;

      Ahead ahead;
      ahead.add(a.y, b, t, d);
      const bool goes_on = block + 1 < last;
      if (goes_on || t + CHUNK < a.length)
        for (const Rows* x : {&a.delta, &a.u, &a.z})
          ahead.add(*x, b, goes_on ? t : t + CHUNK, goes_on ? d + BLOCK : first * BLOCK);

      const float* before = checkpoints + (chunk % kept * shape.blocks + block) * row_size;
      const bool ends = chunk + 1 == shape.chunks;
      float* after = ends ? state
                          : checkpoints + ((chunk + 1) % kept * shape.blocks + block) * row_size;
      if (after != before) memcpy(after, before, row_size * sizeof(float));
      for_states<FWD_STATES>(N, [&](auto k, int64_t n) {
        constexpr int K = decltype(k)::value;
        for (int lane = 0; lane < BLOCK; lane += LANES * W) {
          const Lines lines = ahead.share(passes_of<FWD_STATES, LANES>(N));
          decays<K, LANES>(within, rough, steps, lines, delta + lane, BLOCK, W,
                           w.A + block * row_size + n * BLOCK + lane, decay);
          for (int64_t s = 0; s < count; s++)
            recur<K, LANES, SB, SC>(spans[s], decay, u + lane, y + lane,
                                    at<SB>(B, w.B + block * row_size, n, lane),
                                    at<SC>(C, w.C + block * row_size, n, lane),
                                    after + n * BLOCK + lane);
        }
      });
      if (ends) write_state(a, state, b, block, a.final_state);

      const Tile z_in = read_tile(a.z, b, t, steps, d, valid, u), y_out(a.y, b, t, d, valid, y);
      with_type(valid == BLOCK ? a.u.dtype : FLOAT32, [&](auto type) {
        leave<decltype(type)::value>(steps, a.z.data, z_in, y, y_out);
      });
      if (valid < BLOCK) write_rows(a.y, b, t, steps, d, valid, y, BLOCK);
    }
  }
}

// ---- Backward

// A chunk of one block, one vector of channels after the other, so that a pass over one of them finds
// its steps side by side.
struct Columns {
  alignas(64) float delta[CHUNK * BLOCK], x[CHUNK * BLOCK];   // Δ and Δ u
  alignas(64) float u[CHUNK * BLOCK], slope[CHUNK * BLOCK];   // slope: dΔ / d(delta)
  alignas(64) float dy[CHUNK * BLOCK], dgate[CHUNK * BLOCK];  // dy: before the gate; dz = dgate y
  alignas(64) float y[CHUNK * BLOCK];                         // before the gate
  alignas(64) float ddelta[CHUNK * BLOCK], dx[CHUNK * BLOCK];
};
// Where vector j from step t on lies, counted as in `for_vectors`.
INLINE int64_t column(int64_t t, int j) { return (j % V * CHUNK + t + j / V) * W; }

// What one pass over a few states of LANES vectors keeps: decay exp(Δ A), on the way back the
// gradient at Δ A in its place, and the state before each step.
struct Tape {
  alignas(64) float decay[CHUNK * BWD_STATES * LANES * W];
  alignas(64) float state[(CHUNK + 1) * BWD_STATES * LANES * W];
};

template <int K, int L, bool SB, bool SC, bool GATED>
static void replay(const Span& span, Columns& r, int lane, Projection B, Projection C,
                   Tape& tape) {
  const int j = lane / W;
  vf h[K][L];
  for (int k = 0; k < K; k++)
    for (int l = 0; l < L; l++)
      h[k][l] = span.reset ? splat(0.0f) : load(tape.state + ((span.start * K + k) * L + l) * W);
  for (int64_t t = span.start; t < span.end; t++) {
    vf xt[L], sum[L];
    for (int l = 0; l < L; l++) {
      xt[l] = load(r.x + column(t, j + l));
      sum[l] = GATED ? load(r.y + column(t, j + l)) : xt[l];
    }
    for (int k = 0; k < K; k++)
      for (int l = 0; l < L; l++) {
        const vf kept = load(tape.decay + ((t * K + k) * L + l) * W) * h[k][l];
        h[k][l] = kept + projection<SB>(B, t, k, l) * xt[l];
        store(tape.state + (((t + 1) * K + k) * L + l) * W, h[k][l]);
        if (GATED) sum[l] += projection<SC>(C, t, k, l) * h[k][l];
      }
    if (GATED)
      for (int l = 0; l < L; l++) store(r.y + column(t, j + l), sum[l]);
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

// sums: per step, dB of the K states, then dC, `stride` floats apart. dA and the gradient of Δ have
// a loop of their own, as there are no registers for their sums in the first.
template <int K, int L, bool SB, bool SC>
static void reverse(const Span& span, Columns& r, int lane, bool first, const float* A, Projection B,
                    Projection C, Tape& tape, float* carry, float* dA, float* dB, float* dC,
                    float* sums, int64_t stride) {
  static const float zeros[K * L * W] = {};
  const int j = lane / W;
  vf dh[K][L], db[K][L], dc[K][L];
  for (int k = 0; k < K; k++)
    for (int l = 0; l < L; l++) {
      dh[k][l] = load(carry + k * BLOCK + l * W);
      if (!SB) db[k][l] = load(dB + k * BLOCK + l * W);
      if (!SC) dc[k][l] = load(dC + k * BLOCK + l * W);
    }
  for (int64_t t = span.end - 1; t >= span.start; t--) {
    const float* before = span.reset && t == span.start ? zeros : tape.state + t * K * L * W;
    const float* after = tape.state + (t + 1) * K * L * W;
    float* decay = tape.decay + t * K * L * W;
    vf xt[L], dy[L], dx[L], products[2 * K];
    for (int l = 0; l < L; l++) {
      xt[l] = load(r.x + column(t, j + l));
      dy[l] = load(r.dy + column(t, j + l));
      dx[l] = first ? splat(0.0f) : load(r.dx + column(t, j + l));
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
      vf b[L], c[L];  // loaded before a store that might change them, for all the compiler knows
      for (int l = 0; l < L; l++) {
        b[l] = projection<SB>(B, t, k, l);
        c[l] = projection<SC>(C, t, k, l);
      }
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) {
        const int i = (k * L + l) * W;
        const vf h = load(after + i);
        const vf g = dh[k][l] + dy[l] * c[l];
        if (SC)
          products[K + k] = l ? products[K + k] + dy[l] * h : dy[l] * h;
        else
          dc[k][l] += dy[l] * h;
        if (SB)
          products[k] = l ? products[k] + g * xt[l] : g * xt[l];
        else
          db[k][l] += g * xt[l];
        dx[l] += g * b[l];
        dh[k][l] = g * load(decay + i);
        store(decay + i, dh[k][l] * load(before + i));
      }
    }
    for (int l = 0; l < L; l++) store(r.dx + column(t, j + l), dx[l]);
    if constexpr (SB && SC)
      add_lane_sums<2 * K>(products, sums + t * stride);
    else if constexpr (SB)
      add_lane_sums<K>(products, sums + t * stride);
    else if constexpr (SC)
      add_lane_sums<K>(products + K, sums + t * stride + K);
  }
  for (int l = 0; l < L; l++) {
    vf a[K], da[K];
    for (int k = 0; k < K; k++) {
      a[k] = load(A + k * BLOCK + l * W);
      da[k] = load(dA + k * BLOCK + l * W);
    }
    for (int64_t t = span.start; t < span.end; t++) {
      const vf dt = load(r.delta + column(t, j + l));
      vf ddt = first ? splat(0.0f) : load(r.ddelta + column(t, j + l));
      for (int k = 0; k < K; k++) {
        const vf q = load(tape.decay + ((t * K + k) * L + l) * W);
        da[k] += q * dt;
        ddt += q * a[k];
      }
      store(r.ddelta + column(t, j + l), ddt);
    }
    for (int k = 0; k < K; k++) store(dA + k * BLOCK + l * W, da[k]);
  }
  for (int k = 0; k < K; k++)
    for (int l = 0; l < L; l++) {
      store(carry + k * BLOCK + l * W, span.reset ? splat(0.0f) : dh[k][l]);
      if (!SB) store(dB + k * BLOCK + l * W, db[k][l]);
      if (!SC) store(dC + k * BLOCK + l * W, dc[k][l]);
    }
}

void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// The sums as `reverse` leaves them to a row of dB and one of dC for every step.
void write_sums(const ScanArgs& a, const float* sums, int64_t b, int64_t t, int64_t steps) {
  constexpr int64_t AT_ONCE = 16;  // threads other than the first may have small stacks
  alignas(64) float dB[AT_ONCE * MAX_STATE + W], dC[AT_ONCE * MAX_STATE + W];
  const int64_t N = a.state;
  for (int64_t done = 0; done < steps; done += AT_ONCE) {
    const int64_t some = steps - done < AT_ONCE ? steps - done : AT_ONCE;
    for (int64_t i = 0; i < some; i++)
      for_states<BWD_STATES>(N, [&](auto k, int64_t n) {
        constexpr int K = decltype(k)::value;
        const float* from = sums + ((done + i) * N + n) * 2;
        memcpy(dB + i * N + n, from, K * sizeof(float));
        memcpy(dC + i * N + n, from + K, K * sizeof(float));
      });
    if (a.dB.data) write_rows(a.dB, b, t + done, some, 0, N, dB, N);
    if (a.dC.data) write_rows(a.dC, b, t + done, some, 0, N, dC, N);
  }
}

template <int TYPE>
static float enter_backward(bool softplus, bool gated, int64_t steps, Tile delta_in, Tile u_in,
                            Tile dy_in, Tile z_in, const float* bias, const float* D, Columns& r) {
  vf longest = splat(0.0f);
  for_vectors(steps, [&](auto count, int64_t t) __attribute__((always_inline)) {
    constexpr int J = decltype(count)::value;
    vf dt[J], slope[J];
    for (int j = 0; j < J; j++) {
      dt[j] = delta_in.get<TYPE>(t + j / V, j % V * W) + load(bias + j % V * W);
      slope[j] = splat(1.0f);
    }
    if (softplus) softpluses<J>(dt, slope);
    for (int j = 0; j < J; j++) {
      const vf ut = u_in.get<TYPE>(t + j / V, j % V * W);
      store(r.delta + column(t, j), dt[j]);
      store(r.slope + column(t, j), slope[j]);
      store(r.u + column(t, j), ut);
      store(r.x + column(t, j), ut * dt[j]);
      longest = max(abs(dt[j]), longest);
    }
    vf z[J], s[J];
    if (gated) {
      for (int j = 0; j < J; j++) s[j] = z[j] = z_in.get<TYPE>(t + j / V, j % V * W);
      sigmoids<J>(s);
    }
    for (int j = 0; j < J; j++) {
      vf dy = dy_in.get<TYPE>(t + j / V, j % V * W);
      if (gated) {
        const vf gate = z[j] * s[j];
        store(r.dgate + column(t, j), dy * (s[j] + gate * (1.0f - s[j])));
        store(r.y + column(t, j), load(r.u + column(t, j)) * load(D + j % V * W));
        dy *= gate;
      }
      store(r.dy + column(t, j), dy);
    }
  });
  return largest_lane(longest);
}

// Tiles are where a gradient goes, null where it is not wanted; dD and dbias are sums over time.
template <int TYPE>
static void leave_backward(int64_t steps, const Columns& r, const float* D, Tile du, Tile ddelta,
                           Tile dz, float* dD, float* dbias) {
  for (int lane = 0; lane < BLOCK; lane += W) {
    vf sum_D = load(dD + lane), sum_bias = load(dbias + lane);
    const vf skip = load(D + lane);
    for (int64_t t = 0; t < steps; t++) {
      const int64_t i = column(t, lane / W);
      const vf ut = load(r.u + i), dy = load(r.dy + i), dx = load(r.dx + i);
      const vf dt = (load(r.ddelta + i) * LN2 + dx * ut) * load(r.slope + i);
      sum_D += dy * ut;
      sum_bias += dt;
      if (ddelta.data) ddelta.put<TYPE>(t, lane, dt);
      if (du.data) du.put<TYPE>(t, lane, dx * load(r.delta + i) + skip * dy);
      if (dz.data) dz.put<TYPE>(t, lane, load(r.y + i) * load(r.dgate + i));
    }
    store(dD + lane, sum_D);
    store(dbias + lane, sum_bias);
  }
}

template <bool SB, bool SC>
static void backward_task(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                          int64_t part, int64_t first_chunk, int64_t last_chunk) {
  Columns r;
  Tape tape;
  alignas(64) float staging[4][CHUNK * BLOCK];  // of a block narrower than 16 channels
  alignas(64) float B_buffer[CHUNK * MAX_STATE], C_buffer[CHUNK * MAX_STATE];
  Span spans[CHUNK];
  const int64_t N = a.state, row_size = N * BLOCK;
  const int64_t first_group = shape.first_group(part), last_group = shape.first_group(part + 1);
  const int64_t first = shape.first_block(first_group), last = shape.first_block(last_group);
  const int64_t branch_size = CHUNK * 2 * N;
  float* const branches =
      w.branches + (b * shape.parts + part) * Workspace::MOST_BRANCHES * branch_size;

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
    float* sums = branches;  // of this group; those before are the branches not yet added
    for (int64_t block = first; block < last; block++) {
      if ((SB || SC) && block == shape.first_block(group))
        memset(sums, 0, steps * 2 * N * sizeof(float));
      const int64_t d = block * BLOCK, valid = a.width - d < BLOCK ? a.width - d : BLOCK;
      const int64_t parameters = block * row_size;
      const int64_t at_sum = (b * shape.blocks + block) * row_size;
      alignas(64) float D[BLOCK] = {}, bias[BLOCK] = {};
      if (a.D) memcpy(D, a.D + d, valid * sizeof(float));
      if (a.bias) memcpy(bias, a.bias + d, valid * sizeof(float));

      const int32_t type = valid == BLOCK ? a.u.dtype : FLOAT32;
      const Tile delta_in = read_tile(a.delta, b, t, steps, d, valid, staging[0]);
      const Tile u_in = read_tile(a.u, b, t, steps, d, valid, staging[1]);
      const Tile dy_in = read_tile(a.dy, b, t, steps, d, valid, staging[2]);
      const Tile z_in = read_tile(a.z, b, t, steps, d, valid, staging[3]);
      const float longest = with_type(type, [&](auto type) {
        return enter_backward<decltype(type)::value>(a.softplus, a.z.data, steps, delta_in, u_in,
                                                     dy_in, z_in, bias, D, r);
      });
      const bool within = longest * w.steepest[block] <= EXP2_WITHIN;
      const bool rough = a.delta.dtype != FLOAT32;

      Ahead ahead;
      for (const Rows* x : {&a.du, &a.ddelta, &a.dz}) ahead.add(*x, b, t, d);
      const bool goes_on = block + 1 < last;
      if (goes_on || t > 0)
        for (const Rows* x : {&a.delta, &a.u, &a.dy, &a.z})
          ahead.add(*x, b, goes_on ? t : t - CHUNK, goes_on ? d + BLOCK : first * BLOCK);

      const float* before =
          a.checkpoints + ((b * shape.chunks + chunk) * shape.blocks + block) * row_size;
      for (int lane = 0; lane < BLOCK; lane += LANES * W)
        for_states<BWD_STATES>(N, [&](auto k, int64_t n) {
          constexpr int K = decltype(k)::value;
          const int64_t at_state = n * BLOCK + lane;
          const float* A = w.A + parameters + at_state;
          const Projection Bn = at<SB>(B, w.B + parameters, n, lane);
          const Projection Cn = at<SC>(C, w.C + parameters, n, lane);
          const Lines lines = ahead.share(passes_of<BWD_STATES, LANES>(N));
          for (int i = 0; i < K; i++)
            memcpy(tape.state + i * LANES * W, before + at_state + i * BLOCK,
                   LANES * W * sizeof(float));
          decays<K, LANES>(within, rough, steps, lines, r.delta + column(0, lane / W), W, CHUNK * W,
                           A, tape.decay);
          for (int64_t s = 0; s < count; s++)
            (a.dz.data ? replay<K, LANES, SB, SC, true> : replay<K, LANES, SB, SC, false>)(
                spans[s], r, lane, Bn, Cn, tape);
          for (int64_t s = count - 1; s >= 0; s--)
            reverse<K, LANES, SB, SC>(spans[s], r, lane, n == 0, A, Bn, Cn, tape,
                                      w.carry + at_sum + at_state, w.dA + at_sum + at_state,
                                      w.dB + at_sum + at_state, w.dC + at_sum + at_state,
                                      sums + 2 * n, 2 * N);
        });

      float* dD = w.dD + (b * shape.blocks + block) * BLOCK;
      float* dbias = w.dbias + (b * shape.blocks + block) * BLOCK;
      const Tile du(a.du, b, t, d, valid, staging[0]);
      const Tile ddelta(a.ddelta, b, t, d, valid, staging[1]);
      const Tile dz(a.dz, b, t, d, valid, staging[2]);
      with_type(type, [&](auto type) {
        leave_backward<decltype(type)::value>(steps, r, D, du, ddelta, dz, dD, dbias);
      });
      if (valid < BLOCK) {
        if (du.data) write_rows(a.du, b, t, steps, d, valid, staging[0], BLOCK);
        if (ddelta.data) write_rows(a.ddelta, b, t, steps, d, valid, staging[1], BLOCK);
        if (dz.data) write_rows(a.dz, b, t, steps, d, valid, staging[2], BLOCK);
      }

      if ((SB || SC) && block + 1 == shape.first_block(group + 1)) {
        group++;
        for (int64_t done = group - first_group; done % 2 == 0; done /= 2, sums -= branch_size)
          add(sums - branch_size, sums, steps * 2 * N);
        sums += branch_size;
      }
    }
    if (shape.parts > 1)
      memcpy(w.partial(a, shape, b, part, chunk - first_chunk), branches,
             steps * 2 * N * sizeof(float));
    else if (SB || SC)
      write_sums(a, branches, b, t, steps);
  }
  if (first_chunk == 0 && a.dinitial)
    for (int64_t block = first; block < last; block++)
      write_state(a, w.carry + (b * shape.blocks + block) * row_size, b, block, a.dinitial);
}

// dB and dC of one chunk from the parts' partial sums.
void add_partials(const ScanArgs& a, const Shape& shape, const Workspace& w, int64_t b,
                  int64_t chunk, int64_t first_chunk) {
  const int64_t t = chunk * CHUNK, steps = a.length - t < CHUNK ? a.length - t : CHUNK;
  const auto partial = [&](int64_t part) {
    return w.partial(a, shape, b, part, chunk - first_chunk);
  };
  for (int64_t step = 1; step < shape.parts; step *= 2)
    for (int64_t part = 0; part < shape.parts; part += 2 * step)
      add(partial(part), partial(part + step), steps * 2 * a.state);
  write_sums(a, partial(0), b, t, steps);
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

// ---- One step

// W floats from p on, 0 beyond the `valid` first.
INLINE vf load_some(const float* p, int64_t valid) {
  if (valid >= W) return load(p);
  float padded[W] = {};
  memcpy(padded, p, valid * sizeof(float));
  return load(padded);
}
INLINE void store_some(float* p, vf x, int64_t valid) {
  memcpy(p, &x, (valid < W ? valid : W) * sizeof(float));
}

struct StepArgs {
  int64_t batch, width, state;
  Team team;
  int64_t softplus;
  int64_t B_strides[2], C_strides[2];  // over the batch and over channels; one of them 0
  const float *before, *u, *delta, *z, *A, *B, *C, *D, *bias;  // z, D, bias: null if absent
  float *after, *y;
};

// Of one sequence: states lie along memory, so here they are the lanes. K vectors at a time; more than
// one only where they divide the states.
template <int K>
static void step_task(const StepArgs& a, int64_t b) {
  const int64_t N = a.state;
  for (int64_t d = 0; d < a.width; d += W) {
    const int64_t valid = a.width - d, at = b * a.width + d;
    float dt[W], x[W], y[W] = {};
    vf delta = load_some(a.delta + at, valid);
    const vf u = load_some(a.u + at, valid);
    if (a.bias) delta += load_some(a.bias + d, valid);
    if (a.softplus) softpluses<1>(&delta, nullptr);
    store(dt, delta);
    store(x, delta * u);
    for (int64_t c = 0; c < W && c < valid; c++) {
      const float* B = a.B + b * a.B_strides[0] + (d + c) * a.B_strides[1];
      const float* C = a.C + b * a.C_strides[0] + (d + c) * a.C_strides[1];
      const float *A = a.A + (d + c) * N, *before = a.before + (at + c) * N;
      vf sum = splat(0.0f);
      for (int64_t n = 0; n < N; n += K * W) {
        const int64_t left = K > 1 ? W : N - n;
        vf decay[K];
        for (int k = 0; k < K; k++) decay[k] = load_some(A + n + k * W, left) * (dt[c] * LOG2E);
        exp2s<K, false>(decay);
        for (int k = 0; k < K; k++) {
          const int64_t i = n + k * W;
          const vf h = decay[k] * load_some(before + i, left) + load_some(B + i, left) * x[c];
          sum += load_some(C + i, left) * h;
          store_some(a.after + (at + c) * N + i, h, left);
        }
      }
      y[c] = lane_sums<1, 1>(&sum)[0];
    }
    vf out = load(y);
    if (a.D) out += load_some(a.D + d, valid) * u;
    if (a.z) {
      const vf z = load_some(a.z + at, valid);
      out *= z * sigmoid(z);
    }
    store_some(a.y + at, out, valid);
  }
}

}  // namespace

extern "C" {

int64_t scan_workspace(const ScanArgs* a, int32_t backward) {
  return Workspace(*a, Shape(*a, false), backward).size;
}

void scan_forward(const ScanArgs* args) {
  const ScanArgs& a = *args;
  const Shape shape(a, false);
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
  const Shape shape(a, false);
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
    if (shape.parts > 1 && (a.dB.data || a.dC.data))
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

void scan_step(const StepArgs* a) {
  const auto task = a->state % (4 * W) == 0   ? step_task<4>
                    : a->state % (2 * W) == 0 ? step_task<2>
                                              : step_task<1>;
  parallel_for(a->team, a->batch, [&](int64_t b) { task(*a, b); });
}

}  // extern "C"
