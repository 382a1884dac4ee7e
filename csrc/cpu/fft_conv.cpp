// A causal convolution as long as the sequence.      y_t = sum_{s <= t} K_s u_{t - s} + D u_t
//
// u, y (B, L, channels), K (channels, taps), D (channels). Real polynomials are multiplied modulo x^n - i, n >= L: the product is
// lo + i hi, and lo is the causal convolution: a complex transform of n numbers where zero padding needs 2 n (the right-angle convolution
// of Crandall and Fagin, Discrete weighted transforms and large-integer arithmetic, 1994). include/fft.h has the transform.
#include <algorithm>
#include <array>
#include <memory>

#include "fft.h"

namespace {

constexpr int64_t GROUP_BYTES = 4 << 20;  // what the tiles of a group may take together

// ---- (channels, taps) to rows of channels, by squares of a vector's width

template <class V, int... I> INLINE V zip_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I & 1) * int(sizeof...(I)))...);
}
template <class V, int... I> INLINE V zip_high(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (int(sizeof...(I)) / 2 + I / 2 + (I & 1) * int(sizeof...(I)))...);
}

template <class T> INLINE void transpose(Vector<T>* a) {
  constexpr int W = WIDTH<T>;
  for (int round = 1; round < W; round *= 2) {
    Vector<T> b[W];
    for (int i = 0; i < W / 2; i++) {
      b[2 * i] = zip_low(a[i], a[i + W / 2], Lanes<T>{});
      b[2 * i + 1] = zip_high(a[i], a[i + W / 2], Lanes<T>{});
    }
    std::copy_n(b, W, a);
  }
}

// taps numbers of each channel -> `room` rows, zeros behind; and back.
template <class T> void to_rows(const T* K, T* rows, int64_t taps, int64_t room, int64_t lanes) {
  constexpr int64_t W = WIDTH<T>;
  for (int64_t t = 0; t < room; t += W) {
    Vector<T> a[W] = {};
    for (int64_t i = 0; i < lanes; i++) a[i] = load(K + i * taps + t, taps - t);
    transpose<T>(a);
    for (int64_t i = 0; i < W; i++) store(rows + (t + i) * W, a[i]);
  }
}

template <class T> void from_rows(const T* rows, T* K, int64_t taps, int64_t lanes) {
  constexpr int64_t W = WIDTH<T>;
  for (int64_t t = 0; t < taps; t += W) {
    Vector<T> a[W];
    for (int64_t i = 0; i < W; i++) a[i] = load(rows + (t + i) * W);
    transpose<T>(a);
    for (int64_t i = 0; i < lanes; i++) store(K + i * taps + t, a[i], taps - t);
  }
}

// ---- the work

template <class T> struct Buffer {  // begins on a vector's border; not cleared
  std::unique_ptr<T[]> data;
  T* at;
  explicit Buffer(int64_t size) : data(new T[size + WIDTH<T>]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data.get());
    at = data.get() + (VECTOR_BYTES - address % VECTOR_BYTES) % VECTOR_BYTES / sizeof(T);
  }
};

// Up to `most` adjacent tiles of channels, and what a thread works on them with. They share one walk along each (L, channels): rows that are
// read one vector at a time would cost more than the transforms.
template <class T> struct Group {
  const Plan<T>& plan;
  int64_t L, channels, taps;
  int64_t room;  // of a tile's rows: n in whole squares
  Buffer<T> rows, gradient_rows, spectra, totals, x, g;
  int64_t lanes = 0, tiles = 0;

  Group(const Plan<T>& plan, int64_t L, int64_t channels, int64_t taps, int64_t most, bool backward)
      : plan(plan), L(L), channels(channels), taps(taps), room((plan.n + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>), rows(most * room * WIDTH<T>),
        gradient_rows(backward * most * room * WIDTH<T>), spectra(most * plan.n * PITCH<T>), totals(backward * most * plan.n * PITCH<T>),
        x(plan.n * PITCH<T>), g(backward * plan.n * PITCH<T>) {}

  void take(int64_t channels_left, int64_t most) {
    lanes = std::min(channels_left, most * WIDTH<T>);
    tiles = (lanes + WIDTH<T> - 1) / WIDTH<T>;
  }
  int64_t width(int64_t tile) const { return std::min(WIDTH<T>, lanes - tile * WIDTH<T>); }
  T* rows_of(Buffer<T>& buffer, int64_t tile) { return buffer.at + tile * room * WIDTH<T>; }
  T* values_of(Buffer<T>& buffer, int64_t tile) { return buffer.at + tile * plan.n * PITCH<T>; }

  // (L, channels) -> rows of each tile, zeros behind; and back. A negative step walks backwards in time.
  void read(const T* from, Buffer<T>& buffer, int64_t step) {
    const int64_t whole = lanes / WIDTH<T>, rest = lanes % WIDTH<T>;
    for (int64_t t = 0; t < L; t++, from += step) {
      for (int64_t i = 0; i < whole; i++) store(rows_of(buffer, i) + t * WIDTH<T>, load(from + i * WIDTH<T>));
      if (rest) store(rows_of(buffer, whole) + t * WIDTH<T>, load(from + whole * WIDTH<T>, rest));
    }
    for (int64_t i = 0; i < tiles; i++) std::fill(rows_of(buffer, i) + L * WIDTH<T>, rows_of(buffer, i + 1), T(0));
  }
  void write(Buffer<T>& buffer, T* to, int64_t step) {
    const int64_t whole = lanes / WIDTH<T>, rest = lanes % WIDTH<T>;
    for (int64_t t = 0; t < L; t++, to += step) {
      for (int64_t i = 0; i < whole; i++) store(to + i * WIDTH<T>, load(rows_of(buffer, i) + t * WIDTH<T>));
      if (rest) store(to + whole * WIDTH<T>, load(rows_of(buffer, whole) + t * WIDTH<T>), rest);
    }
  }

  // Of K / n, where D is a part of K_0.
  void transform_kernels(const T* K, const T* D) {
    const T scale = T(1) / T(plan.n);
    for (int64_t i = 0; i < tiles; i++) {
      to_rows(K + i * WIDTH<T> * taps, rows.at, taps, room, width(i));
      store(rows.at, load(rows.at) + load(D + i * WIDTH<T>, width(i)));
      for (int64_t t = 0; t < plan.n; t++) store(rows.at + t * WIDTH<T>, load(rows.at + t * WIDTH<T>) * scale);
      T* values = values_of(spectra, i);
      enter(plan, rows.at, values);
      walk(plan, std::array{values}, static_cast<T*>(nullptr), [=](int64_t at, const T* roots) {
        Leaf<T> v(values + at);
        evaluate<LEAF>(v.a, roots);
        v.write(values + at);
      });
    }
  }

  void forward(const T* u, const T* K, const T* D, T* y, int64_t B) {
    transform_kernels(K, D);
    for (int64_t b = 0; b < B; b++, u += L * channels, y += L * channels) {
      read(u, rows, channels);
      for (int64_t i = 0; i < tiles; i++) {
        T* work = x.at;
        const T* factors = values_of(spectra, i);
        enter(plan, rows_of(rows, i), work);
        walk(plan, std::array{work}, work, [=](int64_t at, const T* roots) {
          Leaf<T> v(work + at);
          const Leaf<T> factor(factors + at);
          evaluate<LEAF>(v.a, roots);
          for (int s = 0; s < LEAF; s++) v.a[s] = v.a[s] * factor.a[s];
          interpolate<LEAF>(v.a, roots);
          v.write(work + at);
        });
        leave(plan, work, rows_of(rows, i));
      }
      write(rows, y, channels);
    }
  }

  // Backwards in time, t' = L - 1 - t, the gradients are causal convolutions too: gu' = K * gy' and gK' = sum_b u * gy'. gD = gK_0.
  void backward(const T* u, const T* K, const T* D, const T* gy, T* gu, T* gK, T* gD, int64_t B) {
    transform_kernels(K, D);
    std::fill(totals.at, values_of(totals, tiles), T(0));
    const int64_t last = (L - 1) * channels;
    for (int64_t b = 0; b < B; b++, u += L * channels, gy += L * channels, gu += L * channels) {
      read(u, rows, channels);
      read(gy + last, gradient_rows, -channels);
      for (int64_t i = 0; i < tiles; i++) {
        T *work = x.at, *gradient = g.at, *total = values_of(totals, i);
        const T* factors = values_of(spectra, i);
        enter(plan, rows_of(rows, i), work);
        enter(plan, rows_of(gradient_rows, i), gradient);
        walk(plan, std::array{work, gradient}, gradient, [=](int64_t at, const T* roots) {
          Leaf<T> v(work + at), w(gradient + at), sum(total + at);
          const Leaf<T> factor(factors + at);
          evaluate<LEAF>(v.a, roots);
          evaluate<LEAF>(w.a, roots);
          for (int s = 0; s < LEAF; s++) {
            sum.a[s] = sum.a[s] + v.a[s] * w.a[s];
            w.a[s] = w.a[s] * factor.a[s];
          }
          sum.write(total + at);
          interpolate<LEAF>(w.a, roots);
          w.write(gradient + at);
        });
        leave(plan, gradient, rows_of(gradient_rows, i));
      }
      write(gradient_rows, gu + last, -channels);
    }
    for (int64_t i = 0; i < tiles; i++) finish(values_of(totals, i), gK + i * WIDTH<T> * taps, gD + i * WIDTH<T>, width(i));
  }

  void finish(T* total, T* gK, T* gD, int64_t width) {
    walk(plan, std::array<T*, 0>{}, total, [=](int64_t at, const T* roots) {
      Leaf<T> v(total + at);
      interpolate<LEAF>(v.a, roots);
      v.write(total + at);
    });
    leave(plan, total, rows.at);
    const T scale = T(1) / T(plan.n);
    for (int64_t t = 0; t < L; t++) store(gradient_rows.at + (L - 1 - t) * WIDTH<T>, load(rows.at + t * WIDTH<T>) * scale);
    store(gD, load(gradient_rows.at), width);
    from_rows(gradient_rows.at, gK, taps, width);
  }
};

// f(group, first channel) for all channels; the tiles of a group are few where n is large or the channels must go round.
template <class T, class F>
void over_groups(int64_t L, int64_t channels, int64_t taps, bool backward, int64_t threads, F f) {
  const Plan<T> plan(L);
  const int64_t per_thread = (channels + threads * WIDTH<T> - 1) / (threads * WIDTH<T>);
  const int64_t fitting = GROUP_BYTES / (plan.n * (backward ? 6 : 3) * VECTOR_BYTES);
  const int64_t most = std::clamp<int64_t>(std::min(per_thread, fitting), 1, 4);
  const int team = team_for(threads, (channels + most * WIDTH<T> - 1) / (most * WIDTH<T>));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    Group<T> group(plan, L, channels, taps, most, backward);
#pragma omp for
    for (int64_t d = 0; d < channels; d += most * WIDTH<T>) {
      group.take(channels - d, most);
      f(group, d);
    }
  }
}

template <class T>
void forward_all(const T* u, const T* K, const T* D, T* y, int64_t B, int64_t L, int64_t channels, int64_t taps, int64_t threads) {
  if (B * L == 0) return;
  over_groups<T>(L, channels, taps, false, threads, [=](Group<T>& group, int64_t d) { group.forward(u + d, K + d * taps, D + d, y + d, B); });
}

template <class T>
void backward_all(
    const T* u, const T* K, const T* D, const T* gy, T* gu, T* gK, T* gD, int64_t B, int64_t L, int64_t channels, int64_t taps,
    int64_t threads) {
  if (B * L == 0) {
    std::fill_n(gK, channels * taps, T(0));
    std::fill_n(gD, channels, T(0));
    return;
  }
  over_groups<T>(L, channels, taps, true, threads, [=](Group<T>& group, int64_t d) {
    group.backward(u + d, K + d * taps, D + d, gy + d, gu + d, gK + d * taps, gD + d, B);
  });
}

}  // namespace

// taps <= L
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void fft_conv_##NAME(                                                                                                            \
      const T* u, const T* K, const T* D, T* y, int64_t B, int64_t L, int64_t channels, int64_t taps, int64_t threads) {                  \
    forward_all<T>(u, K, D, y, B, L, channels, taps, threads);                                                                            \
  }                                                                                                                                       \
  EXPORT void fft_conv_backward_##NAME(                                                                                                   \
      const T* u, const T* K, const T* D, const T* gy, T* gu, T* gK, T* gD, int64_t B, int64_t L, int64_t channels, int64_t taps,         \
      int64_t threads) {                                                                                                                  \
    backward_all<T>(u, K, D, gy, gu, gK, gD, B, L, channels, taps, threads);                                                              \
  }

DEFINE(float32, float)
DEFINE(float64, double)
