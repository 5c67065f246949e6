// The selective scan and its gradient for what scan.cpp leaves out: complex A, and double precision.
//
// The same walk with the same tasks, chunks and checkpoints (arguments.h), one state at a time. A
// number is a vector of real parts and, where A is complex, one of imaginary parts: channels are the
// lanes here too. Gradients of complex numbers follow PyTorch: d/dRe + i d/dIm. Python has brought
// every real input to T. Nothing depends on the number of threads.

#include <math.h>

#include "../../csrc/parallel.h"
#include "../../csrc/simd.h"
#include "arguments.h"

namespace {

template <class T>
struct Vectors {
  static constexpr int LANES = W * 4 / sizeof(T);
  typedef T type __attribute__((vector_size(W * 4)));
};
template <class T>
using vec = typename Vectors<T>::type;

template <class T>
INLINE vec<T> get(const T* p) {
  vec<T> x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
INLINE void put(T* p, vec<T> x) {
  memcpy(p, &x, sizeof x);
}

// Elementary functions: those of simd.h in float, the C library's in double.
INLINE vec<float> exponential(vec<float> x) { return exp2((vf)(x * LOG2E)); }
INLINE vec<double> exponential(vec<double> x) {
  for (int i = 0; i < Vectors<double>::LANES; i++) x[i] = exp(x[i]);
  return x;
}

// Float angles are reduced by π/2 in three parts, of which the first two multiply exactly up to 2^12
// quarter turns; there the error is that of a correctly rounded angle.
INLINE void sine_cosine(vec<float> angle, vec<float>* sine, vec<float>* cosine) {
  const vf turns = nearest(angle * 0.636619772367581343f);
  const vi quadrant = __builtin_convertvector(turns, vi);
  vf r = angle - turns * 1.5703125f;
  r = r - turns * 4.837512969970703125e-4f;
  r = r - turns * 7.54978995489188216e-8f;
  const vf z = r * r;
  vf s = z * -1.9515295891e-4f + 8.3321608736e-3f;
  s = (s * z - 1.6666654611e-1f) * (z * r) + r;
  vf c = z * 2.443315711809948e-5f - 1.388731625493765e-3f;
  c = (c * z + 4.166664568298827e-2f) * (z * z) + (1.0f - 0.5f * z);
  const vf first = (quadrant & 1) ? c : s, second = (quadrant & 1) ? s : c;
  *sine = (vf)((vi)first ^ (quadrant & 2) << 30);
  *cosine = (vf)((vi)second ^ ((quadrant + 1) & 2) << 30);
}
INLINE void sine_cosine(vec<double> angle, vec<double>* sine, vec<double>* cosine) {
  for (int i = 0; i < Vectors<double>::LANES; i++) {
    (*sine)[i] = sin(angle[i]);
    (*cosine)[i] = cos(angle[i]);
  }
}

INLINE void gate_of(vec<float> z, vec<float>* sigmoid_z) { *sigmoid_z = sigmoid(z); }
INLINE void gate_of(vec<double> z, vec<double>* sigmoid_z) {
  for (int i = 0; i < Vectors<double>::LANES; i++) (*sigmoid_z)[i] = 1.0 / (1.0 + exp(-z[i]));
}

INLINE void softplus_of(vec<float>* x, vec<float>* slope) { softpluses<1>(x, slope); }
INLINE void softplus_of(vec<double>* x, vec<double>* slope) {
  for (int i = 0; i < Vectors<double>::LANES; i++) {
    const double w = exp(-fabs((*x)[i]));
    (*slope)[i] = ((*x)[i] > 0 ? 1.0 : w) / (1.0 + w);
    (*x)[i] = fmax((*x)[i], 0.0) + log1p(w);
  }
}

// A number in every lane: real, or complex with P == 2 parts.
template <class T, int P>
struct Number {
  vec<T> part[P];
};
template <class T, int P>
INLINE Number<T, P> spread(const T* p) {  // one number in memory, its parts adjacent, to all lanes
  Number<T, P> x;
  for (int i = 0; i < P; i++) x.part[i] = p[i] - vec<T>{};
  return x;
}
template <class T, int P>
INLINE Number<T, P> row(const T* p) {  // rows of real and of imaginary parts lie 16 apart
  Number<T, P> x;
  for (int i = 0; i < P; i++) x.part[i] = get(p + i * BLOCK);
  return x;
}
template <class T, int P>
INLINE void put_row(T* p, const Number<T, P>& x) {
  for (int i = 0; i < P; i++) put(p + i * BLOCK, x.part[i]);
}
template <class T, int P>
INLINE Number<T, P> operator+(Number<T, P> x, const Number<T, P>& y) {
  for (int i = 0; i < P; i++) x.part[i] += y.part[i];
  return x;
}
template <class T, int P>
INLINE Number<T, P> operator*(Number<T, P> x, vec<T> y) {
  for (int i = 0; i < P; i++) x.part[i] *= y;
  return x;
}
template <class T, int P>
INLINE Number<T, P> operator*(const Number<T, P>& x, const Number<T, P>& y) {
  Number<T, P> z;
  if constexpr (P == 1) {
    z.part[0] = x.part[0] * y.part[0];
  } else {
    z.part[0] = x.part[0] * y.part[0] - x.part[1] * y.part[1];
    z.part[1] = x.part[0] * y.part[1] + x.part[1] * y.part[0];
  }
  return z;
}
template <class T, int P>
INLINE Number<T, P> conjugate(Number<T, P> x) {
  if constexpr (P == 2) x.part[1] = -x.part[1];
  return x;
}
// Re(x y).
template <class T, int P>
INLINE vec<T> real_product(const Number<T, P>& x, const Number<T, P>& y) {
  if constexpr (P == 1) return x.part[0] * y.part[0];
  else return x.part[0] * y.part[0] - x.part[1] * y.part[1];
}
// e^(x dt).
template <class T, int P>
INLINE Number<T, P> decay_of(const Number<T, P>& x, vec<T> dt) {
  Number<T, P> z;
  z.part[0] = exponential(x.part[0] * dt);
  if constexpr (P == 2) {
    vec<T> sine, cosine;
    sine_cosine(x.part[1] * dt, &sine, &cosine);
    z.part[1] = z.part[0] * sine;
    z.part[0] = z.part[0] * cosine;
  }
  return z;
}

template <class T, int P>
struct Scan {
  static constexpr int LANES = Vectors<T>::LANES;
  static constexpr int64_t ROW = P * BLOCK;  // a state of 16 channels
  static constexpr T WEIGHT = P;             // a complex state stands for itself and its conjugate
  using Num = Number<T, P>;
  using Args = Arguments<T>;

  const Args& a;
  const Shape shape;
  const int64_t N, block_size, parameters;
  int64_t size = 0;
  T *A, *B, *C;                 // (blocks, state, parts, 16)
  T *carry, *dA, *dB, *dC;      // (batch, blocks, state, parts, 16)
  T *dD, *dbias;                // (batch, blocks, 16)
  T* partials;                  // (batch, groups, segment, CHUNK, state, dB and dC, parts)

  Scan(const Args& a, bool backward)
      : a(a), shape(a, true), N(a.state), block_size(N * ROW), parameters(shape.blocks * block_size) {
    const int64_t sums = backward ? a.batch : 0;
    A = take(parameters);
    B = take(a.constant_B ? parameters : 0);
    C = take(a.constant_C ? parameters : 0);
    carry = take(backward || !a.checkpoints ? a.batch * parameters : 0);
    dA = take(sums * parameters);
    dB = take(a.constant_B ? sums * parameters : 0);
    dC = take(a.constant_C ? sums * parameters : 0);
    dD = take(sums * shape.blocks * BLOCK);
    dbias = take(sums * shape.blocks * BLOCK);
    partials = take(sums * shape.groups * shape.segment * CHUNK * N * 2 * P);
  }
  T* take(int64_t numbers) {
    T* p = a.workspace + size;
    size += (numbers + BLOCK - 1) / BLOCK * BLOCK;
    return p;
  }
  T* partial(int64_t b, int64_t group, int64_t i) const {
    return partials + ((b * shape.groups + group) * shape.segment + i) * CHUNK * N * 2 * P;
  }

  // (width, state) in memory, from and to a block's rows; zero beyond the width or without `in`.
  void read_rows(const T* in, int64_t block, T* out) const {
    for (int64_t i = 0; i < BLOCK; i++) {
      const int64_t d = block * BLOCK + i;
      for (int64_t n = 0; n < N * P; n++)
        out[n * BLOCK + i] = in && d < a.width ? in[d * N * P + n] : 0;
    }
  }
  void write_rows(const T* in, int64_t block, T* out) const {
    for (int64_t i = 0; i < BLOCK && block * BLOCK + i < a.width; i++)
      for (int64_t n = 0; n < N * P; n++)
        out[(block * BLOCK + i) * N * P + n] = in[n * BLOCK + i];
  }
  const T* of_sequence(const T* states, int64_t b) const {
    return states ? states + b * a.width * N * P : nullptr;
  }
  void pack() const {
    for (int64_t block = 0; block < shape.blocks; block++) {
      read_rows(a.A, block, A + block * block_size);
      if (a.constant_B) read_rows(a.constant_B, block, B + block * block_size);
      if (a.constant_C) read_rows(a.constant_C, block, C + block * block_size);
    }
  }

  // A chunk of 16 channels of x, and back.
  void read_tile(const Rows& x, int64_t b, int64_t t, int64_t steps, int64_t d, T* out) const {
    const int64_t valid = a.width - d < BLOCK ? a.width - d : BLOCK;
    for (int64_t i = 0; i < steps; i++) {
      const T* in = (const T*)x.data + b * x.batch_stride + (t + i) * x.time_stride + d;
      for (int64_t c = 0; c < BLOCK; c++) out[i * BLOCK + c] = c < valid ? in[c] : 0;
    }
  }
  void write_tile(const Rows& x, int64_t b, int64_t t, int64_t steps, int64_t d,
                  const T* in) const {
    const int64_t valid = a.width - d < BLOCK ? a.width - d : BLOCK;
    for (int64_t i = 0; i < steps; i++)
      memcpy((T*)x.data + b * x.batch_stride + (t + i) * x.time_stride + d, in + i * BLOCK,
             valid * sizeof(T));
  }
  void read_parameter(const T* in, int64_t d, T* out) const {
    for (int64_t c = 0; c < BLOCK; c++) out[c] = in && d + c < a.width ? in[d + c] : 0;
  }

  // B or C at step t and state n: one number for all channels, or a row of them.
  Num projection(const Rows& selective, const T* constant, int64_t b, int64_t t, int64_t block,
                 int64_t n, int lane) const {
    if (constant) return row<T, P>(constant + block * block_size + n * ROW + lane);
    return spread<T, P>((const T*)selective.data +
                        (b * selective.batch_stride + t * selective.time_stride + n) * P);
  }

  struct Tile {  // rows of 16 channels
    alignas(64) T delta[CHUNK * BLOCK], slope[CHUNK * BLOCK], u[CHUNK * BLOCK], x[CHUNK * BLOCK];
    alignas(64) T y[CHUNK * BLOCK], z[CHUNK * BLOCK], D[BLOCK], bias[BLOCK];
  };
  struct Place {
    int64_t b, block, t, steps;
    int64_t channel() const { return block * BLOCK; }
  };

  // Δ, its slope, x = Δ u and what y starts from, D u.
  void enter(const Place& at, Tile& r) const {
    read_parameter(a.D, at.channel(), r.D);
    read_parameter(a.bias, at.channel(), r.bias);
    read_tile(a.delta, at.b, at.t, at.steps, at.channel(), r.delta);
    read_tile(a.u, at.b, at.t, at.steps, at.channel(), r.u);
    if (a.z.data) read_tile(a.z, at.b, at.t, at.steps, at.channel(), r.z);
    for (int64_t i = 0; i < at.steps * BLOCK; i += LANES) {
      vec<T> dt = get(r.delta + i) + get(r.bias + i % BLOCK), slope = T(1) - vec<T>{};
      if (a.softplus) softplus_of(&dt, &slope);
      put(r.delta + i, dt);
      put(r.slope + i, slope);
      put(r.x + i, get(r.u + i) * dt);
      put(r.y + i, get(r.u + i) * get(r.D + i % BLOCK));
    }
  }

  void forward_task(int64_t b, int64_t part) const {
    Tile r;
    Span spans[CHUNK];
    alignas(64) T state[MAX_STATE * ROW];
    const int64_t first = shape.first_block(shape.first_group(part));
    const int64_t last = shape.first_block(shape.first_group(part + 1));
    const int64_t kept = a.checkpoints ? shape.chunks : 1;
    T* checkpoints = (a.checkpoints ? a.checkpoints : carry) + b * kept * parameters;
    for (int64_t block = first; block < last; block++)
      read_rows(of_sequence(a.initial, b), block, checkpoints + block * block_size);
    for (int64_t chunk = 0; chunk < shape.chunks; chunk++) {
      const int64_t t = chunk * CHUNK, steps = a.length - t < CHUNK ? a.length - t : CHUNK;
      const int64_t count = spans_of(a, b, t, steps, spans);
      for (int64_t block = first; block < last; block++) {
        enter({b, block, t, steps}, r);
        const T* before = checkpoints + chunk % kept * parameters + block * block_size;
        const bool ends = chunk + 1 == shape.chunks;
        T* after = ends ? state : checkpoints + (chunk + 1) % kept * parameters + block * block_size;
        for (int64_t n = 0; n < N; n++)
          for (int lane = 0; lane < BLOCK; lane += LANES) {
            const int64_t at = n * ROW + lane;
            const Num An = row<T, P>(A + block * block_size + at);
            Num h = row<T, P>(before + at);
            for (int64_t s = 0; s < count; s++) {
              if (spans[s].reset) h = Num{};
              for (int64_t i = spans[s].start; i < spans[s].end; i++) {
                const int64_t j = i * BLOCK + lane;
                const Num Bn = projection(a.B, a.constant_B ? B : nullptr, b, t + i, block, n, lane);
                const Num Cn = projection(a.C, a.constant_C ? C : nullptr, b, t + i, block, n, lane);
                h = decay_of(An, get(r.delta + j)) * h + Bn * get(r.x + j);
                put(r.y + j, get(r.y + j) + WEIGHT * real_product(Cn, h));
              }
            }
            put_row(after + at, h);
          }
        if (ends) write_rows(state, block, a.final_state + b * a.width * N * P);
        if (a.z.data)
          for (int64_t i = 0; i < steps * BLOCK; i += LANES) {
            vec<T> z = get(r.z + i), s;
            gate_of(z, &s);
            put(r.y + i, get(r.y + i) * (z * s));
          }
        write_tile(a.y, b, t, steps, block * BLOCK, r.y);
      }
    }
  }

  struct Tape {  // of one state and one vector of channels: decays, and the states around each step
    Num decay[CHUNK], state[CHUNK + 1];
  };

  // Sums over the lanes, added to dB or dC of one step and state.
  INLINE void add_lanes(T* sums, const Num& x) {
    for (int p = 0; p < P; p++) {
      T sum = 0;
      for (int i = 0; i < LANES; i++) sum += x.part[p][i];
      sums[p] += sum;
    }
  }
  static void add_row(T* sums, const Num& x) {
    for (int p = 0; p < P; p++) put(sums + p * BLOCK, get(sums + p * BLOCK) + x.part[p]);
  }

  void backward_task(int64_t b, int64_t part, int64_t first_chunk, int64_t last_chunk) const {
    Tile r;
    Tape tape;
    Span spans[CHUNK];
    alignas(64) T dy[CHUNK * BLOCK], dgate[CHUNK * BLOCK];
    alignas(64) T ddelta[CHUNK * BLOCK], dx[CHUNK * BLOCK];
    const bool selective = a.B.data || a.C.data;
    const int64_t first_group = shape.first_group(part), last_group = shape.first_group(part + 1);
    const int64_t first = shape.first_block(first_group), last = shape.first_block(last_group);
    if (last_chunk == shape.chunks)
      for (int64_t block = first; block < last; block++) {
        const int64_t at = (b * shape.blocks + block) * block_size;
        read_rows(of_sequence(a.dfinal, b), block, carry + at);
        memset(dA + at, 0, block_size * sizeof(T));
        if (a.constant_B) memset(dB + at, 0, block_size * sizeof(T));
        if (a.constant_C) memset(dC + at, 0, block_size * sizeof(T));
        memset(dD + (b * shape.blocks + block) * BLOCK, 0, BLOCK * sizeof(T));
        memset(dbias + (b * shape.blocks + block) * BLOCK, 0, BLOCK * sizeof(T));
      }
    for (int64_t chunk = last_chunk - 1; chunk >= first_chunk; chunk--) {
      const int64_t t = chunk * CHUNK, steps = a.length - t < CHUNK ? a.length - t : CHUNK;
      const int64_t count = spans_of(a, b, t, steps, spans);
      int64_t group = first_group;
      T* sums = nullptr;
      for (int64_t block = first; block < last; block++) {
        if (selective && block == shape.first_block(group)) {
          sums = partial(b, group++, chunk - first_chunk);
          memset(sums, 0, steps * N * 2 * P * sizeof(T));
        }
        const Place place{b, block, t, steps};
        enter(place, r);
        read_tile(a.dy, b, t, steps, block * BLOCK, dy);
        memset(ddelta, 0, steps * BLOCK * sizeof(T));
        memset(dx, 0, steps * BLOCK * sizeof(T));
        if (a.z.data)
          for (int64_t i = 0; i < steps * BLOCK; i += LANES) {
            vec<T> z = get(r.z + i), s;
            gate_of(z, &s);
            const vec<T> gate = z * s;
            put(dgate + i, get(dy + i) * (s + gate * (T(1) - s)));
            put(dy + i, get(dy + i) * gate);
          }
        const T* before = a.checkpoints + (b * shape.chunks + chunk) * parameters + block * block_size;
        for (int64_t n = 0; n < N; n++)
          for (int lane = 0; lane < BLOCK; lane += LANES) {
            const int64_t at = n * ROW + lane, at_sum = (b * shape.blocks + block) * block_size + at;
            const Num An = row<T, P>(A + block * block_size + at);
            Num h = row<T, P>(before + at);
            for (int64_t s = 0; s < count; s++) {
              if (spans[s].reset) h = Num{};
              for (int64_t i = spans[s].start; i < spans[s].end; i++) {
                const int64_t j = i * BLOCK + lane;
                const Num Bn = projection(a.B, a.constant_B ? B : nullptr, b, t + i, block, n, lane);
                const Num Cn = projection(a.C, a.constant_C ? C : nullptr, b, t + i, block, n, lane);
                tape.state[i] = h;
                tape.decay[i] = decay_of(An, get(r.delta + j));
                h = tape.decay[i] * h + Bn * get(r.x + j);
                put(r.y + j, get(r.y + j) + WEIGHT * real_product(Cn, h));
              }
            }
            tape.state[steps] = h;
            Num dh = row<T, P>(carry + at_sum), da = row<T, P>(dA + at_sum);
            for (int64_t s = count - 1; s >= 0; s--) {
              for (int64_t i = spans[s].end - 1; i >= spans[s].start; i--) {
                const int64_t j = i * BLOCK + lane;
                const Num Bn = projection(a.B, a.constant_B ? B : nullptr, b, t + i, block, n, lane);
                const Num Cn = projection(a.C, a.constant_C ? C : nullptr, b, t + i, block, n, lane);
                // The state after step i: the next step's before, unless that was reset.
                const Num after = i + 1 < spans[s].end || i + 1 == steps
                                      ? tape.state[i + 1]
                                      : tape.decay[i] * tape.state[i] + Bn * get(r.x + j);
                const vec<T> dout = WEIGHT * get(dy + j);
                const Num g = dh + conjugate(Cn) * dout;
                const Num dCn = conjugate(after) * dout, dBn = g * get(r.x + j);
                T* step = sums + (i * N + n) * 2 * P;
                if (a.constant_B) add_row(dB + at_sum, dBn);
                else add_lanes(step, dBn);
                if (a.constant_C) add_row(dC + at_sum, dCn);
                else add_lanes(step + P, dCn);
                put(dx + j, get(dx + j) + real_product(conjugate(Bn), g));
                dh = conjugate(tape.decay[i]) * g;
                const Num q = conjugate(tape.state[i]) * dh;  // the adjoint of Δ A
                da = da + q * get(r.delta + j);
                put(ddelta + j, get(ddelta + j) + real_product(conjugate(An), q));
              }
              if (spans[s].reset) dh = Num{};
            }
            put_row(carry + at_sum, dh);
            put_row(dA + at_sum, da);
          }
        T* sum_D = dD + (b * shape.blocks + block) * BLOCK;
        T* sum_bias = dbias + (b * shape.blocks + block) * BLOCK;
        for (int64_t i = 0; i < steps * BLOCK; i += LANES) {
          const vec<T> ut = get(r.u + i), dyt = get(dy + i), dxt = get(dx + i);
          const vec<T> dt = (get(ddelta + i) + dxt * ut) * get(r.slope + i);
          put(sum_D + i % BLOCK, get(sum_D + i % BLOCK) + dyt * ut);
          put(sum_bias + i % BLOCK, get(sum_bias + i % BLOCK) + dt);
          put(ddelta + i, dt);
          put(dx + i, dxt * get(r.delta + i) + get(r.D + i % BLOCK) * dyt);
          if (a.z.data) put(r.y + i, get(r.y + i) * get(dgate + i));
        }
        if (a.du.data) write_tile(a.du, b, t, steps, block * BLOCK, dx);
        if (a.ddelta.data) write_tile(a.ddelta, b, t, steps, block * BLOCK, ddelta);
        if (a.dz.data) write_tile(a.dz, b, t, steps, block * BLOCK, r.y);
      }
    }
    if (first_chunk == 0 && a.dinitial)
      for (int64_t block = first; block < last; block++)
        write_rows(carry + (b * shape.blocks + block) * block_size, block,
                   a.dinitial + b * a.width * N * P);
  }

  // dB and dC of one chunk: the groups' partial sums in order.
  void add_partials(int64_t b, int64_t chunk, int64_t first_chunk) const {
    const int64_t t = chunk * CHUNK, steps = a.length - t < CHUNK ? a.length - t : CHUNK;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t n = 0; n < N; n++)
        for (int p = 0; p < 2 * P; p++) {
          T sum = 0;
          for (int64_t group = 0; group < shape.groups; group++)
            sum += partial(b, group, chunk - first_chunk)[(i * N + n) * 2 * P + p];
          const Rows& out = p < P ? a.dB : a.dC;
          if (out.data)
            ((T*)out.data)[(b * out.batch_stride + (t + i) * out.time_stride + n) * P + p % P] = sum;
        }
  }

  // (batch, blocks, rows, 16) sums to (width, rows), over the batch in order.
  void add_batch(const T* sums, int64_t rows, T* out) const {
    if (!out) return;
    for (int64_t d = 0; d < a.width; d++)
      for (int64_t n = 0; n < rows; n++) {
        T sum = 0;
        for (int64_t b = 0; b < a.batch; b++)
          sum += sums[((b * shape.blocks + d / BLOCK) * rows + n) * BLOCK + d % BLOCK];
        out[d * rows + n] = sum;
      }
  }

  void forward() const {
    pack();
    parallel_for(a.team, a.batch * shape.parts,
                 [&](int64_t task) { forward_task(task / shape.parts, task % shape.parts); });
  }
  void backward() const {
    pack();
    for (int64_t last = shape.chunks; last > 0;) {
      const int64_t first = (last - 1) / shape.segment * shape.segment;
      parallel_for(a.team, a.batch * shape.parts, [&](int64_t task) {
        backward_task(task / shape.parts, task % shape.parts, first, last);
      });
      if (a.dB.data || a.dC.data)
        parallel_for(a.team, a.batch * (last - first), [&](int64_t task) {
          add_partials(task / (last - first), first + task % (last - first), first);
        });
      last = first;
    }
    add_batch(dA, N * P, a.dA);
    add_batch(dB, N * P, a.dconstant_B);
    add_batch(dC, N * P, a.dconstant_C);
    add_batch(dD, 1, a.dD);
    add_batch(dbias, 1, a.dbias);
  }
};

// f of the scan that `in_double` and the arguments ask for.
template <class F>
auto with_scan(const void* arguments, bool in_double, bool backward, const F& f) {
  const auto& single = *(const Arguments<float>*)arguments;
  const auto& twice = *(const Arguments<double>*)arguments;
  if (!in_double) return f(Scan<float, 2>(single, backward));
  if (twice.complex) return f(Scan<double, 2>(twice, backward));
  return f(Scan<double, 1>(twice, backward));
}

}  // namespace

extern "C" {

int64_t scan_workspace(const void* arguments, int32_t backward, int32_t in_double) {
  return with_scan(arguments, in_double, backward, [](const auto& scan) { return scan.size; });
}

void scan_forward(const void* arguments, int32_t in_double) {
  with_scan(arguments, in_double, false, [](const auto& scan) { scan.forward(); });
}

void scan_backward(const void* arguments, int32_t in_double) {
  with_scan(arguments, in_double, true, [](const auto& scan) { scan.backward(); });
}

}  // extern "C"
