// Vectors of the instruction set this file is compiled for, and the elementary functions on them.
//
// One library is built for each instruction set (native.py), so the width W is a constant. Channels
// come in blocks of 16, the lanes of an AVX-512 vector; narrower sets take a block in V pieces.
// Nothing may depend on -ffast-math: it made narrower builds wrong with finite values.

#pragma once

#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int BLOCK = 16;
constexpr int V = BLOCK / W;

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf splat(float x) { return x - (vf){}; }

#if defined(__AVX512F__)
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
INLINE vf max(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }
#endif
INLINE vf abs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

INLINE float largest_lane(vf x) {
  float largest = x[0];
  for (int i = 1; i < W; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// To the nearest integer, |x| < 2^22.
INLINE vf nearest(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + 0x1.8p23f) - 0x1.8p23f;
#endif
}
// p 2^n; p is in [1/2, 2] and n an integer (without AVX-512: within [-126, 127]).
INLINE vf scale(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (vf)((vi)p + ((vi)(n + 0x1.8p23f) << 23));
#endif
}
// The compiler cannot merge what x is computed from with what it is used for (into an FMA).
INLINE void settle(vf& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
}

// 2^x of K vectors, two in step: one after another a processor overlaps too few such chains, four in
// step take twice as long with AVX-512. WITHIN: the caller knows that |x| <= EXP2_WITHIN, and gets
// the same bits for less. NaN stays NaN; far below the range of float32 the result is 0 or the
// smallest normal number.
//
// On [-1/2, 1/2] the polynomial's relative error is 9.2e-8. Its constant term is exactly 1: an error
// there would multiply over a long memory (x near 0 at thousands of steps) and grow into dA.
// ROUGH, for x made of numbers rounded to 8 or 11 bits: a term less, and the error of the result is
// that of x changed by 1.5e-5 of itself.
constexpr float EXP2_WITHIN = 126.0f;
template <int K, bool WITHIN, bool ROUGH = false>
INLINE void exp2s(vf* x) {
  if constexpr (K > 2) {
    exp2s<2, WITHIN, ROUGH>(x);
    exp2s<K - 2, WITHIN, ROUGH>(x + 2);
    return;
  }
  vf n[K], p[K];
  for (int k = 0; k < K; k++) {
    if (!WITHIN) {
#if defined(__AVX512F__)
      x[k] = max(splat(-200.0f), x[k]);
#else
      x[k] = min(splat(127.0f), max(splat(-126.0f), x[k]));
#endif
    }
    settle(x[k]);  // the same product with and without the bounds
    n[k] = nearest(x[k]);
  }
  for (int k = 0; k < K; k++) x[k] -= n[k];
  constexpr float FINE[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f,
                            0x1.62e42ap-1f, 1.0f};
  constexpr float COARSE[] = {0x1.394774p-7f, 0x1.c964c4p-5f, 0x1.ec04a4p-3f, 0x1.62e2e2p-1f,
                              1.0f};
  constexpr int DEGREE = ROUGH ? 4 : 5;
  const float* c = ROUGH ? COARSE : FINE;
  for (int k = 0; k < K; k++) p[k] = c[0] * x[k] + c[1];
#pragma GCC unroll 4
  for (int i = 2; i <= DEGREE; i++)
    for (int k = 0; k < K; k++) p[k] = p[k] * x[k] + c[i];
  for (int k = 0; k < K; k++) x[k] = scale(p[k], n[k]);
}
INLINE vf exp2(vf x) {
  exp2s<1, false>(&x);
  return x;
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

// 1 / x for x in [1, 2^126], within 2 units in the last place.
INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  const vf y = (vf)_mm256_rcp_ps((__m256)x);
#else
  const vf y = 1.0f / x;
#endif
  return y + y * (1.0f - x * y);
}

// 1 / (1 + e^-x) of K vectors in step, 2^-125 for less.
template <int K>
INLINE void sigmoids(vf* x) {
  for (int k = 0; k < K; k++) x[k] = min(splat(125.0f), max(splat(-125.0f), x[k] * -LOG2E));
  exp2s<K, true>(x);
  for (int k = 0; k < K; k++) x[k] = reciprocal(1.0f + x[k]);
}
INLINE vf sigmoid(vf x) {
  sigmoids<1>(&x);
  return x;
}

// log(1 + w) for w in [0, 1], relative error 6e-9 before rounding; no division.
template <int K>
INLINE void log1p_units(vf* w) {
  vf p[K];
  for (int k = 0; k < K; k++) p[k] = w[k] * -0.0033184732f + 0.020204589f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] - 0.05766445f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] + 0.10680556f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] - 0.15355396f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] + 0.19695401f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] - 0.24958588f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] + 0.33330512f;
  for (int k = 0; k < K; k++) p[k] = p[k] * w[k] - 0.4999993f;
  for (int k = 0; k < K; k++) w[k] = (p[k] * w[k]) * w[k] + w[k];
}

// softplus(x) = log(1 + e^x) of K vectors in step, and unless `derivative` is null its derivative,
// sigmoid(x), from the same exponential.
template <int K>
INLINE void softpluses(vf* x, vf* derivative) {
  vf w[K];
  for (int k = 0; k < K; k++) w[k] = max(splat(-EXP2_WITHIN), abs(x[k]) * -LOG2E);
  exp2s<K, true>(w);
  if (derivative)
    for (int k = 0; k < K; k++)
      derivative[k] = (x[k] > 0.0f ? splat(1.0f) : w[k]) * reciprocal(1.0f + w[k]);
  log1p_units<K>(w);
  for (int k = 0; k < K; k++) x[k] = max(splat(0.0f), x[k]) + w[k];
}

// Lane i of lane_sums<1, M>(p) is the sum of the lanes of p[i], for M = W vectors; for M < W, lanes
// i < M. Pairs are merged as a tree, so that each level halves the vectors and nothing is scalar.
// Lanes two apart are added first, then neighbours: that takes the cheapest shuffles.
template <int S, int... I>
INLINE vf merge(vf a, vf b, std::integer_sequence<int, I...>) {
  if constexpr (S == 2) {
    const vf even = __builtin_shufflevector(a, b, ((I & ~3) + (I & 1) * 2 + (I & 2) / 2 * W)...);
    const vf odd = __builtin_shufflevector(a, b, ((I & ~3) + (I & 1) * 2 + 1 + (I & 2) / 2 * W)...);
    return even + odd;
  } else {
    constexpr int DISTANCE = S == 1 ? 2 : S;
    const vf kept = __builtin_shufflevector(a, b, ((I & DISTANCE) ? I + W : I)...);
    const vf moved =
        __builtin_shufflevector(a, b, ((I & DISTANCE) ? (I ^ DISTANCE) + W : I ^ DISTANCE)...);
    return kept + moved;
  }
}
template <int S>
INLINE vf merge(vf a, vf b) {
  return merge<S>(a, b, std::make_integer_sequence<int, W>());
}
template <int S, int M>
INLINE vf lane_sums(const vf* p) {
  if constexpr (S == W) {
    return p[0];
  } else if constexpr (M == 1) {
    const vf folded = merge<S>(p[0], p[0]);
    return lane_sums<S * 2, 1>(&folded);
  } else {
    vf half[M / 2];
    for (int i = 0; i < M / 2; i++) half[i] = merge<S>(p[2 * i], p[2 * i + 1]);
    return lane_sums<S * 2, M / 2>(half);
  }
}

// float32, bfloat16 and float16 in memory; all arithmetic is in float32.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// f(std::integral_constant<int, type>).
template <class F>
INLINE auto with_type(int32_t type, const F& f) {
  if (type == BFLOAT16) return f(std::integral_constant<int, BFLOAT16>());
  if (type == FLOAT16) return f(std::integral_constant<int, FLOAT16>());
  return f(std::integral_constant<int, FLOAT32>());
}

template <int TYPE>
using element = std::conditional_t<TYPE == FLOAT32, float, uint16_t>;

// To 32 bits, and back numbers below 2^16; compilers convert vectors of 8 by halves.
INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
INLINE vh narrow(vu x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i y = (__m256i)x;
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
#else
  return __builtin_convertvector(x, vh);
#endif
}

INLINE vf from_half(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu x = widen(h), magnitude = x & 0x7fffu;
  const vu finite = (vu)((vf)(magnitude << 13) * 0x1p112f);  // rebias; subnormals come out right
  const vu special = 0x7f800000u | magnitude << 13;
  return (vf)((magnitude >= 0x7c00u ? special : finite) | (x & 0x8000u) << 16);
#endif
}
INLINE vh to_half(vf f) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu x = (vu)f, magnitude = x & 0x7fffffffu;
  const vu rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const vu tiny = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;  // the add rounds to subnormal steps
  const vu special = magnitude > 0x7f800000u ? (vu){} + 0x7e00u : (vu){} + 0x7c00u;
  vu out = magnitude < 0x38800000u ? tiny : rounded;
  out = magnitude >= 0x477ff000u ? special : out;
  return narrow(out | (x >> 16 & 0x8000u));
#endif
}

template <int TYPE>
INLINE vf load_as(const element<TYPE>* p) {
  if constexpr (TYPE == FLOAT32) {
    return load(p);
  } else {
    vh h;
    memcpy(&h, p, sizeof h);
    if constexpr (TYPE == BFLOAT16)
      return (vf)(widen(h) << 16);
    else
      return from_half(h);
  }
}
template <int TYPE>
INLINE void store_as(element<TYPE>* p, vf x) {
  if constexpr (TYPE == FLOAT32) {
    store(p, x);
  } else {
    vh h;
    if constexpr (TYPE == BFLOAT16) {
      const vu bits = (vu)x;
      const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      h = narrow(rounded | ((vu)(x != x) & 0x7fc0u));  // NaN stays NaN
    } else {
      h = to_half(x);
    }
    memcpy(p, &h, sizeof h);
  }
}

// A (batch, length, channels) tensor whose channels are adjacent; data is null if it is absent.
struct Rows {
  char* data;
  int64_t batch_stride, time_stride;  // in elements
  int32_t dtype, unused;
};

template <int TYPE>
INLINE element<TYPE>* row(const Rows& x, int64_t b, int64_t t, int64_t d) {
  return (element<TYPE>*)x.data + b * x.batch_stride + t * x.time_stride + d;
}

// `count` rows from time t on of `valid` channels from d on, to rows of `stride` floats; what lies
// beyond the valid channels, up to a multiple of 16, becomes 0.
template <int TYPE>
static void read_rows_as(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t d,
                         int64_t valid, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; i++) {
    const element<TYPE>* in = row<TYPE>(x, b, t + i, d);
    float* to = out + i * stride;
    int64_t c = 0;
    for (; c + W <= valid; c += W) store(to + c, load_as<TYPE>(in + c));
    if (c < valid) {
      element<TYPE> padded[W] = {};
      for (int64_t k = c; k < valid; k++) padded[k - c] = in[k];
      store(to + c, load_as<TYPE>(padded));
      c += W;
    }
    for (; c % BLOCK; c += W) store(to + c, splat(0.0f));
  }
}
static void read_rows(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t d, int64_t valid,
                      float* out, int64_t stride) {
  if (x.dtype == FLOAT32) read_rows_as<FLOAT32>(x, b, t, count, d, valid, out, stride);
  if (x.dtype == BFLOAT16) read_rows_as<BFLOAT16>(x, b, t, count, d, valid, out, stride);
  if (x.dtype == FLOAT16) read_rows_as<FLOAT16>(x, b, t, count, d, valid, out, stride);
}

template <int TYPE>
static void write_rows_as(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t d,
                          int64_t valid, const float* in, int64_t stride) {
  for (int64_t i = 0; i < count; i++) {
    element<TYPE>* out = row<TYPE>(x, b, t + i, d);
    const float* from = in + i * stride;
    int64_t c = 0;
    for (; c + W <= valid; c += W) store_as<TYPE>(out + c, load(from + c));
    if (c < valid) {
      element<TYPE> padded[W];
      store_as<TYPE>(padded, load(from + c));
      for (int64_t k = c; k < valid; k++) out[k] = padded[k - c];
    }
  }
}
static void write_rows(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t d,
                       int64_t valid, const float* in, int64_t stride) {
  if (x.dtype == FLOAT32) write_rows_as<FLOAT32>(x, b, t, count, d, valid, in, stride);
  if (x.dtype == BFLOAT16) write_rows_as<BFLOAT16>(x, b, t, count, d, valid, in, stride);
  if (x.dtype == FLOAT16) write_rows_as<FLOAT16>(x, b, t, count, d, valid, in, stride);
}
