// What a CPU can do at most: exp2 and multiply-adds a second, and bytes read from memory a second.
//
// Built once for each instruction set, with the vectors and the exp2 of the kernels themselves, so
// that a kernel's floor is counted in the operations it is made of.

#include <time.h>

#include "../../../kernels/csrc/parallel.h"
#include "../../../kernels/csrc/simd.h"

namespace {

constexpr int64_t FLOATS = 2048;  // in and out lie in the first-level cache: loads and stores are free
// As many side by side as hide the latency of one, and fit registers.
constexpr int CHAINS = W == 16 ? 16 : 10;

// How many vectors in step are fastest differs between processors, by a factor of two.
template <int TOGETHER>
void repeat_exp2(int64_t repeats) {
  alignas(64) float in[FLOATS], out[FLOATS];
  for (int64_t i = 0; i < FLOATS; i++) in[i] = -8.0f * (float)i / FLOATS;
  for (int64_t r = 0; r < repeats; r++) {
    for (int64_t i = 0; i < FLOATS; i += TOGETHER * W) {
      vf x[TOGETHER];
      for (int k = 0; k < TOGETHER; k++) x[k] = load(in + i + k * W);
      exp2s<TOGETHER, true>(x);
      for (int k = 0; k < TOGETHER; k++) store(out + i + k * W, x[k]);
    }
    asm volatile("" : : "r"(in), "r"(out) : "memory");
  }
}

float repeat_multiply_add(int64_t repeats) {
  vf a = splat(0.5f), b = splat(1.0f), sums[CHAINS];
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (int k = 0; k < CHAINS; k++) sums[k] = splat((float)k);
  for (int64_t r = 0; r < repeats; r++)
#pragma GCC unroll 16
    for (int k = 0; k < CHAINS; k++) sums[k] = sums[k] * a + b;
  for (int k = 1; k < CHAINS; k++) sums[0] += sums[k];
  return sums[0][0];
}

float read(const float* x, int64_t count) {
  vf sums[8] = {};
  for (int64_t i = 0; i + 8 * W <= count; i += 8 * W)
    for (int k = 0; k < 8; k++) sums[k] += load(x + i + k * W);
  for (int k = 1; k < 8; k++) sums[0] += sums[k];
  return sums[0][0];
}

// Each thread does `amount` of work; the rates a second add up. A thread's own clock, which stands
// still while another process has the core, keeps a busy machine from looking slow.
template <class Work>
void rate(const Team& team, double* rates, double amount, const Work& work) {
  parallel_for(team, team.threads, [&](int64_t i) {
    timespec began, ended;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &began);
    work(i);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ended);
    rates[i] = amount / (ended.tv_sec - began.tv_sec + 1e-9 * (ended.tv_nsec - began.tv_nsec));
  });
}

volatile float sink;

}  // namespace

extern "C" {

// One rate a thread, into `rates`; `together` is 2, 4 or 8 vectors.
void peak_exp2(const Team* team, int64_t repeats, int64_t together, double* rates) {
  const auto work = together == 2 ? repeat_exp2<2> : together == 4 ? repeat_exp2<4> : repeat_exp2<8>;
  rate(*team, rates, (double)repeats * FLOATS, [&](int64_t) { work(repeats); });
}

void peak_multiply_add(const Team* team, int64_t repeats, double* rates) {
  rate(*team, rates, (double)repeats * CHAINS * W,
       [&](int64_t) { sink = repeat_multiply_add(repeats); });
}

void peak_read(const Team* team, const float* x, int64_t count, double* rates) {
  const int64_t share = count / team->threads;
  rate(*team, rates, share * 4.0, [&](int64_t i) { sink = read(x + i * share, share); });
}

}  // extern "C"
