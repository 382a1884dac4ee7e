// Depthwise, dilated, causal convolution.      y_t = bias + sum_k w_k x_{t - (K - 1 - k) dilation}
//
// x, y (B, L, D), w (K, D), bias (D) or null; state (B, T, D) holds the T = (K - 1) dilation inputs before x.
//
// A task is GROUP vectors of channels of one row. It takes BLOCK steps at a time, so that memory is read in long pieces and comes from the
// cache when the next taps want it again. Three and four taps have a loop of their own for the steps that need neither the state nor a
// bound, with everything but x in registers; `any` does all the rest.
#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t BLOCK = 64, GROUP = 8;

template <class T> struct Row {  // from one channel on: the state, then x
  const T *state, *x;
  int64_t D, L, tail, K, dilation;
  const T* at(int64_t t) const { return t < 0 ? state + (tail + t) * D : x + t * D; }
  Row from(int64_t d) const { return {state + d, x + d, D, L, tail, K, dilation}; }
};

template <class T, class Lanes> void forward_any(const Row<T>& row, const T* w, const T* bias, T* y, int64_t t0, int64_t t1, Lanes lanes) {
  for (int64_t t = t0; t < t1; t++) {
    Vector<T> sum = bias ? load(bias, lanes) : Vector<T>{};
    for (int64_t k = 0; k < row.K; k++) sum += load(w + k * row.D, lanes) * load(row.at(t - (row.K - 1 - k) * row.dilation), lanes);
    store(y + t * row.D, sum, lanes);
  }
}

template <class T, int K, int V> void forward_inside(const Row<T>& row, const T* w, const T* bias, T* y, int64_t t0, int64_t t1) {
  constexpr int64_t W = WIDTH<T>;
  Vector<T> taps[K][V], start[V];
  for (int j = 0; j < V; j++) {
    start[j] = bias ? load(bias + j * W) : Vector<T>{};
    for (int k = 0; k < K; k++) taps[k][j] = load(w + k * row.D + j * W);
  }
  for (int64_t t = t0; t < t1; t++) {
    Vector<T> sum[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      sum[j] = start[j];
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) sum[j] += taps[k][j] * load(row.x + (t - (K - 1 - k) * row.dilation) * row.D + j * W);
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) store(y + t * row.D + j * W, sum[j]);
  }
}

// What the backward pass writes: gx_s = sum_k w_k gy_{s + (K - 1 - k) dilation}, for the inputs of the state too, gw_k = the sum of
// gy_{s + (K - 1 - k) dilation} x_s, gbias = sum_t gy_t; the last two are added to.
template <class T> struct Gradients {
  const T* gy;
  T *gx, *gstate, *gw, *gbias;
  Gradients from(int64_t d) const { return {gy + d, gx + d, gstate + d, gw + d, gbias + d}; }
};

template <class T, class Lanes> void backward_any(const Row<T>& row, const T* w, Gradients<T> g, int64_t s0, int64_t s1, Lanes lanes) {
  const int64_t D = row.D;
  auto bounds = [&](int64_t later) { return std::make_pair(std::max(s0, -later), std::min(s1, row.L - later)); };
  for (int64_t s = s0; s < s1; s++) {
    Vector<T> sum{};
    for (int64_t k = row.K - 1, t = s; k >= 0 && t < row.L; k--, t += row.dilation)
      if (t >= 0) sum += load(w + k * D, lanes) * load(g.gy + t * D, lanes);
    store(s < 0 ? g.gstate + (row.tail + s) * D : g.gx + s * D, sum, lanes);
  }
  for (int64_t k = 0; k < row.K; k++) {
    const int64_t later = (row.K - 1 - k) * row.dilation;
    const auto [from, to] = bounds(later);
    Vector<T> sum = load(g.gw + k * D, lanes);
    for (int64_t s = from; s < to; s++) sum += load(g.gy + (s + later) * D, lanes) * load(row.at(s), lanes);
    store(g.gw + k * D, sum, lanes);
  }
  Vector<T> sum = load(g.gbias, lanes);
  for (int64_t s = std::max<int64_t>(s0, 0); s < s1; s++) sum += load(g.gy + s * D, lanes);
  store(g.gbias, sum, lanes);
}

template <class T, int K, int V> void backward_inside(const Row<T>& row, const T* w, Gradients<T> g, int64_t s0, int64_t s1) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t D = row.D;
  Vector<T> taps[K][V], of_taps[K][V], of_bias[V];
  for (int j = 0; j < V; j++) {
    of_bias[j] = load(g.gbias + j * W);
    for (int k = 0; k < K; k++) taps[k][j] = load(w + k * D + j * W), of_taps[k][j] = load(g.gw + k * D + j * W);
  }
  for (int64_t s = s0; s < s1; s++) {
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      const Vector<T> x = load(row.x + s * D + j * W);
      Vector<T> sum{};
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) {
        const Vector<T> gy = load(g.gy + (s + (K - 1 - k) * row.dilation) * D + j * W);
        sum += taps[k][j] * gy;
        of_taps[k][j] += x * gy;
        if (k == K - 1) of_bias[j] += gy;
      }
      store(g.gx + s * D + j * W, sum);
    }
  }
  for (int j = 0; j < V; j++) {
    store(g.gbias + j * W, of_bias[j]);
    for (int k = 0; k < K; k++) store(g.gw + k * D + j * W, of_taps[k][j]);
  }
}

// Calls f(row, first channel, the channel behind the last) for the groups of each row, in parallel.
template <class T, class F> void over_groups(int64_t B, int64_t D, int64_t threads, F f) {
  constexpr int64_t size = GROUP * WIDTH<T>;
  const int64_t groups = (D + size - 1) / size;
  const int team = team_for(threads, B * groups);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t task = 0; task < B * groups; task++) f(task / groups, task % groups * size, std::min(D, (task % groups + 1) * size));
}

// The steps t0 .. t1 of the channels d0 .. d1: inside(V, d) for V whole vectors at channel d where there is such a loop, else any(d, lanes).
template <class T, int V, class Inside, class Any> void over_tiles(int64_t d0, int64_t d1, bool has_loop, Inside inside, Any any) {
  constexpr int64_t W = WIDTH<T>;
  int64_t d = d0;
  if (has_loop) {
    for (; d + V * W <= d1; d += V * W) inside(std::integral_constant<int, V>{}, d);
    for (; d + W <= d1; d += W) inside(std::integral_constant<int, 1>{}, d);
  }
  for (; d < d1; d += W) with_lanes<T>(d1 - d, [&](auto lanes) { any(d, lanes); });
}

template <class T>
void forward_all(
    const T* x, const T* w, const T* bias, const T* state, T* y, int64_t dilation, int64_t B, int64_t L, int64_t D, int64_t K, int64_t threads) {
  const int64_t tail = (K - 1) * dilation;
  over_groups<T>(B, D, threads, [=](int64_t b, int64_t d0, int64_t d1) {
    const Row<T> row{state + b * tail * D, x + b * L * D, D, L, tail, K, dilation};
    T* const out = y + b * L * D;
    auto part = [&](int64_t t0, int64_t t1, bool inside) {
      over_tiles<T, 4>(
          d0, d1, inside && (K == 3 || K == 4),
          [&](auto V, int64_t d) {
            (K == 4 ? forward_inside<T, 4, V> : forward_inside<T, 3, V>)(row.from(d), w + d, bias ? bias + d : nullptr, out + d, t0, t1);
          },
          [&](int64_t d, auto lanes) { forward_any(row.from(d), w + d, bias ? bias + d : nullptr, out + d, t0, t1, lanes); });
    };
    const int64_t first = std::min(tail, L);
    for (int64_t t = 0; t < first; t += BLOCK) part(t, std::min(t + BLOCK, first), false);
    for (int64_t t = first; t < L; t += BLOCK) part(t, std::min(t + BLOCK, L), true);
  });
}

template <class T>
void backward_all(
    const T* x, const T* w, const T* state, const T* gy, T* gx, T* gstate, T* gw, T* gbias, int64_t dilation, int64_t B, int64_t L, int64_t D,
    int64_t K, int64_t threads) {
  const int64_t tail = (K - 1) * dilation;
  over_groups<T>(B, D, threads, [=](int64_t b, int64_t d0, int64_t d1) {
    const Row<T> row{state + b * tail * D, x + b * L * D, D, L, tail, K, dilation};
    const Gradients<T> g{gy + b * L * D, gx + b * L * D, gstate + b * tail * D, gw + b * K * D, gbias + b * D};
    std::fill(g.gbias + d0, g.gbias + d1, T(0));
    for (int64_t k = 0; k < K; k++) std::fill(g.gw + k * D + d0, g.gw + k * D + d1, T(0));
    auto part = [&](int64_t s0, int64_t s1, bool inside) {
      over_tiles<T, 2>(
          d0, d1, inside && (K == 3 || K == 4),
          [&](auto V, int64_t d) { (K == 4 ? backward_inside<T, 4, V> : backward_inside<T, 3, V>)(row.from(d), w + d, g.from(d), s0, s1); },
          [&](int64_t d, auto lanes) { backward_any(row.from(d), w + d, g.from(d), s0, s1, lanes); });
    };
    const int64_t last = std::max<int64_t>(L - tail, 0);  // from here on gy ends
    for (int64_t s = -tail; s < 0; s += BLOCK) part(s, std::min<int64_t>(s + BLOCK, 0), false);
    for (int64_t s = 0; s < last; s += BLOCK) part(s, std::min(s + BLOCK, last), true);
    for (int64_t s = last; s < L; s += BLOCK) part(s, std::min(s + BLOCK, L), false);
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
