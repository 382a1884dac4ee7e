// Depthwise, dilated, causal convolution.      y_t = bias + sum_k w_k x_{t - (K - 1 - k) dilation}
//
// x, y (B, L, D), w (K, D), bias (D) or null; state (B, T, D) holds the T = (K - 1) dilation inputs before x. A thread takes STEPS steps of one
// channel; adjacent threads read adjacent channels. What limits it is memory; the taps' overlap comes from the cache.
#include "numbers.h"
#include "sums.h"

namespace {

constexpr int THREADS = 128, STEPS = 8;

template <class T> struct Rows {  // the state, then x
  const T* RESTRICT state;
  const T* RESTRICT x;
  int64_t L, D, tail;
  DEVICE T at(int64_t b, int64_t t, int64_t d) const { return t < 0 ? state[(b * tail + tail + t) * D + d] : x[(b * L + t) * D + d]; }
};

// The thread's row, first step (counted from 0) and channel.
struct Place { int64_t b, t, d; };
DEVICE bool find(const Block& block, int thread, int64_t steps, int64_t D, Place& at) {
  const int64_t tiles = parts(D, THREADS), rest = block.index / tiles, runs = parts(steps, STEPS);
  at = {rest / runs, rest % runs * STEPS, block.index % tiles * THREADS + thread};
  return at.d < D;
}

template <class T> struct Forward {
  static constexpr int THREADS = ::THREADS;
  Rows<T> rows;
  const T* RESTRICT w;
  const T* RESTRICT bias;  // or null
  T* RESTRICT y;
  int64_t K, dilation;

  DEVICE void operator()(const Block& block) const {
    block.each([&](int thread) {
      Place at;
      const int64_t L = rows.L, D = rows.D;
      if (!find(block, thread, L, D, at)) return;
      T sums[STEPS];
      UNROLL for (int i = 0; i < STEPS; i++) sums[i] = bias ? bias[at.d] : T(0);
      for (int64_t k = 0; k < K; k++) {
        const T tap = w[k * D + at.d];
        UNROLL for (int i = 0; i < STEPS; i++)
          if (at.t + i < L) sums[i] += tap * rows.at(at.b, at.t + i - (K - 1 - k) * dilation, at.d);
      }
      UNROLL for (int i = 0; i < STEPS; i++)
        if (at.t + i < L) y[(at.b * L + at.t + i) * D + at.d] = sums[i];
    });
  }
};

// gx_s = sum_k w_k gy_{s + (K - 1 - k) dilation}, for the inputs of the state too.
template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  const T* RESTRICT w;
  const T* RESTRICT gy;
  T* RESTRICT gx;
  T* RESTRICT gstate;
  int64_t L, D, tail, K, dilation;

  DEVICE void operator()(const Block& block) const {
    block.each([&](int thread) {
      Place at;
      if (!find(block, thread, tail + L, D, at)) return;
      T sums[STEPS] = {};
      for (int64_t k = 0; k < K; k++) {
        const T tap = w[k * D + at.d];
        UNROLL for (int i = 0; i < STEPS; i++) {
          const int64_t t = at.t + i - k * dilation;  // s counts from -tail, and tail = (K - 1) dilation
          if (t >= 0 && t < L) sums[i] += tap * gy[(at.b * L + t) * D + at.d];
        }
      }
      UNROLL for (int i = 0; i < STEPS; i++) {
        const int64_t s = at.t + i - tail;
        if (s < 0)
          gstate[(at.b * tail + tail + s) * D + at.d] = sums[i];
        else if (s < L)
          gx[(at.b * L + s) * D + at.d] = sums[i];
      }
    });
  }
};

template <class T> struct OfTap {  // outer = (row, k)
  Rows<T> rows;
  const T* RESTRICT gy;
  int64_t K, dilation;
  DEVICE T operator()(int64_t outer, int64_t t, int64_t d) const {
    const int64_t b = outer / K, k = outer % K;
    return gy[(b * rows.L + t) * rows.D + d] * rows.at(b, t - (K - 1 - k) * dilation, d);
  }
};

template <class T> struct OfBias {
  const T* RESTRICT gy;
  int64_t L, D;
  DEVICE T operator()(int64_t b, int64_t t, int64_t d) const { return gy[(b * L + t) * D + d]; }
};

template <class T>
int64_t forward(
    const T* x, const T* w, const T* bias, const T* state, T* y, int64_t dilation, int64_t B, int64_t L, int64_t D, int64_t K, int64_t stream) {
  const Rows<T> rows{state, x, L, D, (K - 1) * dilation};
  return launch(Forward<T>{rows, w, bias, y, K, dilation}, B * parts(L, STEPS) * parts(D, THREADS), THREADS, 0, stream);
}

template <class T>
int64_t backward(
    const T* x, const T* w, const T* state, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t dilation, int64_t B, int64_t L, int64_t D,
    int64_t K, int64_t stream) {
  const int64_t tail = (K - 1) * dilation, blocks = B * parts(tail + L, STEPS) * parts(D, THREADS);
  int64_t failed = launch(Backward<T>{w, gy, gx, gstate, L, D, tail, K, dilation}, blocks, THREADS, 0, stream);
  if (!failed) failed = sum_over_time(OfTap<T>{{state, x, L, D, tail}, gy, K, dilation}, gw, B * K, L, D, stream);
  return failed ? failed : sum_over_time(OfBias<T>{gy, L, D}, gbias, B, L, D, stream);
}

}  // namespace

// Backward, gw (B, K, D) and gbias (B, D) come per row; the caller adds them up.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t causal_conv_##NAME(                                                                                                      \
      const T* x, const T* w, const T* bias, const T* state, T* y, int64_t dilation, int64_t B, int64_t L, int64_t D, int64_t K,          \
      int64_t stream) {                                                                                                                   \
    return forward<T>(x, w, bias, state, y, dilation, B, L, D, K, stream);                                                                \
  }                                                                                                                                       \
  EXPORT int64_t causal_conv_backward_##NAME(                                                                                             \
      const T* x, const T* w, const T* state, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t dilation, int64_t B, int64_t L,     \
      int64_t D, int64_t K, int64_t stream) {                                                                                             \
    return backward<T>(x, w, state, gy, gx, gstate, gw, gbias, dilation, B, L, D, K, stream);                                             \
  }

DEFINE(float32, float)
DEFINE(float64, double)
