// h_t = a_t h_{t-1} + x_t, per channel, real or complex.      x, h (B, L, D), h0 (B, D) or null; a (B, L, D), or (D) for all steps
//
// A task is one tile of channels of one row: it reads and writes each element once, the state stays in registers. Complex tensors come as
// twice as many real numbers; D counts real numbers throughout.
#include "simd.h"

namespace {

constexpr int K = 4;  // vectors in a tile

template <class T> struct Real {
  struct Decay {
    Vector<T> a;
    INLINE Decay of(Vector<T> a) { return {a}; }
    inline __attribute__((always_inline)) Decay conjugate() const { return *this; }
    inline __attribute__((always_inline)) Vector<T> operator*(Vector<T> b) const { return a * b; }
  };
};
template <class T, bool COMPLEX> struct DecayOf { using type = typename Real<T>::Decay; };
template <class T> struct DecayOf<T, true> { using type = Factor<T>; };

// NV vectors; only the last one may be narrower, `last` real numbers.
template <class T, bool COMPLEX, bool PER_STEP, int NV, class Last>
void forward(const T* a, const T* x, const T* h0, T* h, int64_t L, int64_t D, Last last) {
  using Decay = typename DecayOf<T, COMPLEX>::type;
  constexpr int64_t W = WIDTH<T>;
  auto lanes = [&](int j) -> int64_t { return j == NV - 1 ? last : W; };
  Vector<T> state[NV];
  Decay decay[NV];
  for (int j = 0; j < NV; j++) {
    state[j] = h0 ? load(h0 + j * W, lanes(j)) : Vector<T>{};
    if (!PER_STEP) decay[j] = Decay::of(load(a + j * W, lanes(j)));
  }
  for (int64_t t = 0; t < L; t++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      const int64_t at = t * D + j * W;
      if (PER_STEP) decay[j] = Decay::of(load(a + at, lanes(j)));
      state[j] = decay[j] * state[j] + load(x + at, lanes(j));
      store(h + at, state[j], lanes(j));
    }
  }
}

// g_t = gh_t + conj(a_{t+1}) g_{t+1} is the gradient of x_t; that of a_t is g_t conj(h_{t-1}), that of h0 is conj(a_0) g_0.
template <class T, bool COMPLEX, bool PER_STEP, int NV, class Last>
void backward(const T* a, const T* h, const T* h0, const T* gh, T* gx, T* ga, T* gh0, int64_t L, int64_t D, Last last) {
  using Decay = typename DecayOf<T, COMPLEX>::type;
  constexpr int64_t W = WIDTH<T>;
  auto lanes = [&](int j) -> int64_t { return j == NV - 1 ? last : W; };
  Vector<T> carried[NV], total[NV];
  Decay decay[NV];
  for (int j = 0; j < NV; j++) {
    carried[j] = total[j] = Vector<T>{};
    if (!PER_STEP) decay[j] = Decay::of(load(a + j * W, lanes(j))).conjugate();
  }
  for (int64_t t = L - 1; t >= 0; t--) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      const int64_t at = t * D + j * W;
      Vector<T> g = load(gh + at, lanes(j)) + carried[j];
      store(gx + at, g, lanes(j));
      Vector<T> before = t ? load(h + at - D, lanes(j)) : h0 ? load(h0 + j * W, lanes(j)) : Vector<T>{};
      Vector<T> of_a = Decay::of(before).conjugate() * g;
      if (PER_STEP) {
        store(ga + at, of_a, lanes(j));
        decay[j] = Decay::of(load(a + at, lanes(j))).conjugate();
      } else {
        total[j] += of_a;
      }
      carried[j] = decay[j] * g;
    }
  }
  for (int j = 0; j < NV; j++) {
    if (!PER_STEP) store(ga + j * W, total[j], lanes(j));
    if (gh0) store(gh0 + j * W, carried[j], lanes(j));
  }
}

// Calls f(NV, row, first channel, numbers in the last vector) for each tile of each row, in parallel.
template <class T, class F> void over_tiles(int64_t B, int64_t D, int64_t threads, F f) {
  constexpr int64_t W = WIDTH<T>, tile = K * W;
  const int64_t tiles = (D + tile - 1) / tile;
  const int team = team_for(threads, B * tiles);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t task = 0; task < B * tiles; task++) {
    const FlushTiny flush;
    const int64_t b = task / tiles, d = task % tiles * tile, n = d + tile < D ? tile : D - d, vectors = (n + W - 1) / W;
    with_lanes<T>(n - (vectors - 1) * W, [=](auto last) {
      switch (vectors) {
        case 1: f(std::integral_constant<int, 1>{}, b, d, last); break;
        case 2: f(std::integral_constant<int, 2>{}, b, d, last); break;
        case 3: f(std::integral_constant<int, 3>{}, b, d, last); break;
        default: f(std::integral_constant<int, 4>{}, b, d, last);
      }
    });
  }
}

template <class T, bool COMPLEX, bool PER_STEP>
void forward_all(const T* a, const T* x, const T* h0, T* h, int64_t B, int64_t L, int64_t D, int64_t threads) {
  over_tiles<T>(B, D, threads, [=](auto NV, int64_t b, int64_t d, auto last) {
    const int64_t at = b * L * D + d;
    forward<T, COMPLEX, PER_STEP, NV>(a + (PER_STEP ? at : d), x + at, h0 ? h0 + b * D + d : nullptr, h + at, L, D, last);
  });
}

template <class T, bool COMPLEX, bool PER_STEP>
void backward_all(
    const T* a, const T* h, const T* h0, const T* gh, T* gx, T* ga, T* gh0, int64_t B, int64_t L, int64_t D, int64_t threads) {
  over_tiles<T>(B, D, threads, [=](auto NV, int64_t b, int64_t d, auto last) {
    const int64_t at = b * L * D + d, row = b * D + d;
    backward<T, COMPLEX, PER_STEP, NV>(
        a + (PER_STEP ? at : d), h + at, h0 ? h0 + row : nullptr, gh + at, gx + at, ga + (PER_STEP ? at : row), gh0 ? gh0 + row : nullptr, L, D,
        last);
  });
}

}  // namespace

// A constant decay's gradient comes out per row, ga (B, D); the caller adds the rows up.
#define DEFINE(NAME, T, COMPLEX)                                                                                                          \
  EXPORT void linear_recurrence_##NAME(                                                                                                   \
      const T* a, const T* x, const T* h0, T* h, int64_t per_step, int64_t B, int64_t L, int64_t D, int64_t threads) {                    \
    (per_step ? forward_all<T, COMPLEX, true> : forward_all<T, COMPLEX, false>)(a, x, h0, h, B, L, D, threads);                           \
  }                                                                                                                                       \
  EXPORT void linear_recurrence_backward_##NAME(                                                                                          \
      const T* a, const T* h, const T* h0, const T* gh, T* gx, T* ga, T* gh0, int64_t per_step, int64_t B, int64_t L, int64_t D,          \
      int64_t threads) {                                                                                                                  \
    (per_step ? backward_all<T, COMPLEX, true> : backward_all<T, COMPLEX, false>)(a, h, h0, gh, gx, ga, gh0, B, L, D, threads);           \
  }

DEFINE(float32, float, false)
DEFINE(float64, double, false)
DEFINE(complex64, float, true)
DEFINE(complex128, double, true)
