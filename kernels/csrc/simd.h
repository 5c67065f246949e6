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

// 2^f on [-1/2, 1/2], relative error 9.2e-8. The constant term is exactly 1: an error there would
// multiply over a long memory (x near 0 at thousands of steps) and grow into dA.
INLINE vf exp2_fraction(vf f) {
  vf p = splat(0x1.5bba14p-10f);
  p = p * f + splat(0x1.3cea88p-7f);
  p = p * f + splat(0x1.c6b752p-5f);
  p = p * f + splat(0x1.ebf9bcp-3f);
  p = p * f + splat(0x1.62e42ap-1f);
  return p * f + splat(1.0f);
}

// 2^x. NaN stays NaN; far below the range of float32 the result is 0 or the smallest normal number.
INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  x = max(splat(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction(x - (vf)n), n);
#else
  const vf magic = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
  x = max(splat(-126.0f), x);
  x = min(splat(127.0f), x);
  const vf shifted = x + magic;
  const vf p = exp2_fraction(x - (shifted - magic));
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp2(x * -LOG2E)); }

// log(1 + w) for w in [0, 1], relative error 6e-9 before rounding; no division.
INLINE vf log1p_unit(vf w) {
  vf p = splat(-0.0033184732f);
  p = p * w + splat(0.020204589f);
  p = p * w + splat(-0.05766445f);
  p = p * w + splat(0.10680556f);
  p = p * w + splat(-0.15355396f);
  p = p * w + splat(0.19695401f);
  p = p * w + splat(-0.24958588f);
  p = p * w + splat(0.33330512f);
  p = p * w + splat(-0.4999993f);
  return (p * w) * w + w;
}

// softplus(x) = log(1 + e^x), and its derivative sigmoid(x), from one exponential.
INLINE vf softplus(vf x) { return max(splat(0.0f), x) + log1p_unit(exp2(abs(x) * -LOG2E)); }
INLINE vf softplus(vf x, vf* derivative) {
  const vf w = exp2(abs(x) * -LOG2E);
  *derivative = (x > 0.0f ? splat(1.0f) : w) / (1.0f + w);
  return max(splat(0.0f), x) + log1p_unit(w);
}

// Lane i of the result is the sum of the lanes of p[i], for M = W vectors; for M < W, lanes
// i < M. Pairs are merged as a tree, so that each level halves the vectors and nothing is scalar.
template <int S, int... I>
INLINE vf merge(vf a, vf b, std::integer_sequence<int, I...>) {
  const vf kept = __builtin_shufflevector(a, b, ((I & S) ? I + W : I)...);
  const vf moved = __builtin_shufflevector(a, b, ((I & S) ? (I ^ S) + W : I ^ S)...);
  return kept + moved;
}
template <int S, int M>
INLINE vf lane_sums(const vf* p) {
  if constexpr (S == W) {
    return p[0];
  } else if constexpr (M == 1) {
    const vf folded = merge<S>(p[0], p[0], std::make_integer_sequence<int, W>());
    return lane_sums<S * 2, 1>(&folded);
  } else {
    vf half[M / 2];
    for (int i = 0; i < M / 2; i++)
      half[i] = merge<S>(p[2 * i], p[2 * i + 1], std::make_integer_sequence<int, W>());
    return lane_sums<S * 2, M / 2>(half);
  }
}

// float32, bfloat16 and float16 in memory; all arithmetic is in float32.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <int TYPE>
using element = std::conditional_t<TYPE == FLOAT32, float, uint16_t>;

INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
INLINE vh narrow(vu x) { return __builtin_convertvector(x, vh); }

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
      h = narrow((bits & 0x7fffffffu) > 0x7f800000u ? (vu){} + 0x7fc0u : rounded);
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

// Asks for rows that will be read (or written, in full) soon; a wrong guess costs nothing.
template <bool WRITE>
INLINE void prefetch_rows(const Rows& x, int64_t b, int64_t t, int64_t count, int64_t d) {
  if (!x.data) return;
  const int64_t size = x.dtype == FLOAT32 ? 4 : 2;
  const char* at = x.data + (b * x.batch_stride + t * x.time_stride + d) * size;
  for (int64_t i = 0; i < count; i++) __builtin_prefetch(at + i * x.time_stride * size, WRITE, 3);
}
