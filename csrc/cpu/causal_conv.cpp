// Depthwise, dilated, causal convolution.      y_t = bias + sum_k w_k x_{t - (K - 1 - k) dilation}
//
// x, y (B, L, D), w (K, D), bias (D) or null; state (B, T, D) holds the T = (K - 1) dilation inputs before x.
#include <algorithm>

#include "simd.h"

namespace {

template <class T> struct Row {  // one tile of channels of one row: the state, then x
  const T *state, *x;
  int64_t D, tail, lanes;
  inline __attribute__((always_inline)) Vector<T> at(int64_t t) const { return load(t < 0 ? state + (tail + t) * D : x + t * D, lanes); }
};

// KS taps held in registers; 0: any number, read from memory.
template <class T, int KS>
void forward(const Row<T>& row, const T* w, const T* bias, T* y, int64_t L, int64_t K, int64_t dilation) {
  const Vector<T> start = bias ? load(bias, row.lanes) : Vector<T>{};
  Vector<T> taps[KS ? KS : 1];
  for (int k = 0; k < KS; k++) taps[k] = load(w + k * row.D, row.lanes);
  for (int64_t t = 0; t < L; t++) {
    Vector<T> sum = start;
    if (KS)
      for (int k = 0; k < KS; k++) sum += taps[k] * row.at(t - (KS - 1 - k) * dilation);
    else
      for (int64_t k = 0; k < K; k++) sum += load(w + k * row.D, row.lanes) * row.at(t - (K - 1 - k) * dilation);
    store(y + t * row.D, sum, row.lanes);
  }
}

// gx_t = sum_k w_k gy_{t + (K - 1 - k) dilation}, for the inputs of the state too; gw_k = sum_t gy_t x_{t - ...}; gbias = sum_t gy_t.
template <class T>
void backward(
    const Row<T>& row, const T* w, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t L, int64_t K, int64_t dilation) {
  const int64_t D = row.D, lanes = row.lanes;
  for (int64_t t = -row.tail; t < L; t++) {
    Vector<T> sum{};
    for (int64_t k = K - 1, later = t; k >= 0 && later < L; k--, later += dilation)
      if (later >= 0) sum += load(w + k * D, lanes) * load(gy + later * D, lanes);
    store(t < 0 ? gstate + (row.tail + t) * D : gx + t * D, sum, lanes);
  }
  Vector<T> total{};
  for (int64_t t = 0; t < L; t++) total += load(gy + t * D, lanes);
  store(gbias, total, lanes);
  for (int64_t k = 0; k < K; k++) {
    Vector<T> sum{};
    for (int64_t t = 0, from = -(K - 1 - k) * dilation; t < L; t++, from++) sum += load(gy + t * D, lanes) * row.at(from);
    store(gw + k * D, sum, lanes);
  }
}

template <class T, class F> void over_tiles(int64_t B, int64_t D, int64_t threads, F f) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t tiles = (D + W - 1) / W;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < B * tiles; task++) f(task / tiles, task % tiles * W, std::min(W, D - task % tiles * W));
}

template <class T>
void forward_all(
    const T* x, const T* w, const T* bias, const T* state, T* y, int64_t dilation, int64_t B, int64_t L, int64_t D, int64_t K, int64_t threads) {
  const int64_t tail = (K - 1) * dilation;
  over_tiles<T>(B, D, threads, [=](int64_t b, int64_t d, int64_t lanes) {
    const Row<T> row{state + b * tail * D + d, x + b * L * D + d, D, tail, lanes};
    const T* start = bias ? bias + d : nullptr;
    (K == 4 ? forward<T, 4> : K == 3 ? forward<T, 3> : K == 2 ? forward<T, 2> : forward<T, 0>)(row, w + d, start, y + b * L * D + d, L, K, dilation);
  });
}

template <class T>
void backward_all(
    const T* x, const T* w, const T* state, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t dilation, int64_t B, int64_t L, int64_t D,
    int64_t K, int64_t threads) {
  const int64_t tail = (K - 1) * dilation;
  over_tiles<T>(B, D, threads, [=](int64_t b, int64_t d, int64_t lanes) {
    const int64_t at = b * L * D + d, before = b * tail * D + d;
    const Row<T> row{state + before, x + at, D, tail, lanes};
    backward(row, w + d, gy + at, gx + at, gstate + before, gw + b * K * D + d, gbias + b * D + d, L, K, dilation);
  });
}

}  // namespace

// Backward, gw (B, K, D) and gbias (B, D) come per row; the caller adds them up.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void causal_conv_##NAME(                                                                                                         \
      const T* x, const T* w, const T* bias, const T* state, T* y, int64_t dilation, int64_t B, int64_t L, int64_t D, int64_t K,          \
      int64_t threads) {                                                                                                                  \
    forward_all<T>(x, w, bias, state, y, dilation, B, L, D, K, threads);                                                                  \
  }                                                                                                                                       \
  EXPORT void causal_conv_backward_##NAME(                                                                                                \
      const T* x, const T* w, const T* state, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t dilation, int64_t B, int64_t L,     \
      int64_t D, int64_t K, int64_t threads) {                                                                                            \
    backward_all<T>(x, w, state, gy, gx, gstate, gw, gbias, dilation, B, L, D, K, threads);                                               \
  }

DEFINE(float32, float)
DEFINE(float64, double)
