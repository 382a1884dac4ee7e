// A causal convolution as long as the sequence.      y_t = sum_{s <= t} K_s u_{t - s} + D u_t
//
// u, y (B, L, channels), K (channels, taps), D (channels). Real polynomials are multiplied modulo x^n - i, n >= L: the product is
// lo + i hi, and lo is the causal convolution: a complex transform of n numbers where zero padding needs 2 n (the right-angle convolution
// of Crandall and Fagin, Discrete weighted transforms and large-integer arithmetic, 1994). A transform goes down by levels:
//     x^m - c = prod_r (x^{m / R} - c_r),   c_r the R-th roots of c
// takes each block, a remainder modulo x^m - c, to R blocks below it, its remainders modulo the factors; block b has b R .. b R + R - 1.
// Values stay in the order in which they come out, and the way back undoes it. The channels stand side by side in vectors; a complex
// number is a vector of real parts and one of imaginary parts.
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t LEAF = 4;               // the radix of the last level
constexpr int64_t CHUNK = 64;             // blocks of at most so many numbers pass all their levels in the first cache
constexpr int64_t GROUP_BYTES = 4 << 20;  // what the tiles of a group may take together

template <class T> struct Complex { Vector<T> re, im; };
template <class T> constexpr int64_t PITCH = 2 * WIDTH<T>;  // of complex numbers in memory

template <class T> INLINE Complex<T> get(const T* x) { return {load(x), load(x + WIDTH<T>)}; }
template <class T> INLINE void put(T* x, Complex<T> a) { store(x, a.re), store(x + WIDTH<T>, a.im); }
template <class T> INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T> INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) { return {a.re - b.re, a.im - b.im}; }
template <class T> INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// a_r <- sum_s a_s e^{sign 2 pi i r s / R}
template <int R, int sign, class T> INLINE void dft(Complex<T>* a) {
  if constexpr (R == 2) {
    const Complex<T> difference = a[0] - a[1];
    a[0] = a[0] + a[1], a[1] = difference;
  } else if constexpr (R == 3) {
    const Complex<T> sum = a[1] + a[2], difference = a[1] - a[2];
    const T half = T(0.5), height = T(sign * 0.86602540378443864676);
    const Complex<T> middle{a[0].re - sum.re * half, a[0].im - sum.im * half}, side{-difference.im * height, difference.re * height};
    a[0] = a[0] + sum, a[1] = middle + side, a[2] = middle - side;
  } else {
    const Complex<T> even = a[0] + a[2], minus = a[0] - a[2], odd = a[1] + a[3], across = a[1] - a[3], side{-across.im, across.re};
    a[0] = even + odd, a[2] = even - odd;
    a[sign > 0 ? 1 : 3] = minus + side, a[sign > 0 ? 3 : 1] = minus - side;
  }
}

// The coefficients of R blocks' worth, a_s, to the values at the roots of a block, which hold t, t^2 .. t^{R - 1} with t^R = c; and back,
// R times as large.
template <int R, class T> INLINE void evaluate(Complex<T>* a, const T* roots) {
  for (int s = 1; s < R; s++) {
    const T re = roots[2 * s - 2], im = roots[2 * s - 1];
    a[s] = {a[s].re * re - a[s].im * im, a[s].re * im + a[s].im * re};
  }
  dft<R, 1>(a);
}

template <int R, class T> INLINE void interpolate(Complex<T>* a, const T* roots) {
  dft<R, -1>(a);
  for (int s = 1; s < R; s++) {
    const T re = roots[2 * s - 2], im = roots[2 * s - 1];
    a[s] = {a[s].re * re + a[s].im * im, a[s].im * re - a[s].re * im};
  }
}

template <class T> struct Level {
  int64_t radix, size;   // of its blocks
  std::vector<T> roots;  // of block after block
};

template <class T> struct Plan {
  int64_t n = 8;  // 2^k or 3 2^k
  std::vector<Level<T>> levels;

  explicit Plan(int64_t L) {
    while (n < L) n = n % 3 ? n / 2 * 3 : n / 3 * 4;
    std::vector<int64_t> radices{LEAF};  // the last one first
    int64_t rest = n / LEAF;
    for (; rest % 4 == 0; rest /= 4) radices.push_back(4);
    if (rest % 2 == 0) radices.push_back(2);
    if (rest % 3 == 0) radices.push_back(3);
    std::vector<double> angles{0.25};  // of each block's c, in turns: that of i
    for (int64_t size = n; !radices.empty(); size /= radices.back(), radices.pop_back()) {
      const int64_t R = radices.back();
      Level<T> level{R, size, {}};
      std::vector<double> below;
      for (const double angle : angles) {
        for (int64_t s = 1; s < R; s++) {
          const double turned = 6.283185307179586476925 * s * angle / R;
          level.roots.push_back(T(std::cos(turned))), level.roots.push_back(T(std::sin(turned)));
        }
        for (int64_t r = 0; r < R; r++) below.push_back((angle + r) / R);
      }
      levels.push_back(std::move(level));
      angles.swap(below);
    }
  }
};

// The blocks first .. first + count - 1 of a level, to those below them, or back.
template <bool DOWN, int R, class T> void pass(const Level<T>& level, T* x, int64_t first, int64_t count) {
  const int64_t below = level.size / R;
  for (int64_t b = first; b < first + count; b++) {
    T* block = x + b * level.size * PITCH<T>;
    const T* roots = level.roots.data() + b * 2 * (R - 1);
    for (int64_t j = 0; j < below; j++) {
      Complex<T> a[R];
      for (int s = 0; s < R; s++) a[s] = get(block + (j + s * below) * PITCH<T>);
      DOWN ? evaluate<R>(a, roots) : interpolate<R>(a, roots);
      for (int s = 0; s < R; s++) put(block + (j + s * below) * PITCH<T>, a[s]);
    }
  }
}

template <bool DOWN, class T> void pass(const Level<T>& level, T* x, int64_t first, int64_t count) {
  (level.radix == 4 ? pass<DOWN, 4, T> : level.radix == 3 ? pass<DOWN, 3, T> : pass<DOWN, 2, T>)(level, x, first, count);
}

// The first level, from n real rows; and back to the real parts.
template <int R, class T> void enter(const Plan<T>& plan, const T* rows, T* x) {
  const int64_t below = plan.n / R;
  for (int64_t j = 0; j < below; j++) {
    Complex<T> a[R];
    for (int s = 0; s < R; s++) a[s] = {load(rows + (j + s * below) * WIDTH<T>), Vector<T>{}};
    evaluate<R>(a, plan.levels[0].roots.data());
    for (int s = 0; s < R; s++) put(x + (j + s * below) * PITCH<T>, a[s]);
  }
}

template <int R, class T> void leave(const Plan<T>& plan, const T* x, T* rows) {
  const int64_t below = plan.n / R;
  for (int64_t j = 0; j < below; j++) {
    Complex<T> a[R];
    for (int s = 0; s < R; s++) a[s] = get(x + (j + s * below) * PITCH<T>);
    interpolate<R>(a, plan.levels[0].roots.data());
    for (int s = 0; s < R; s++) store(rows + (j + s * below) * WIDTH<T>, a[s].re);
  }
}

template <class T> void enter(const Plan<T>& plan, const T* rows, T* x) {
  const int64_t R = plan.levels[0].radix;
  (R == 4 ? enter<4, T> : R == 3 ? enter<3, T> : enter<2, T>)(plan, rows, x);
}

template <class T> void leave(const Plan<T>& plan, const T* x, T* rows) {
  const int64_t R = plan.levels[0].radix;
  (R == 4 ? leave<4, T> : R == 3 ? leave<3, T> : leave<2, T>)(plan, x, rows);
}

// The other levels, depth first: `count` blocks of `level` down in each of `falling`, at the bottom `leaf(offset, roots)` for each block of
// four, then up in `rising`, unless it is null.
template <class T, size_t S, class F>
void walk(
    const Plan<T>& plan, const std::array<T*, S>& falling, T* rising, F leaf, size_t level = 1, int64_t first = 0, int64_t count = 0) {
  const Level<T>& now = plan.levels[level];
  if (level == 1) count = plan.levels[0].radix;
  if (level + 1 == plan.levels.size()) {
    for (int64_t b = first; b < first + count; b++) leaf(b * LEAF * PITCH<T>, now.roots.data() + b * 2 * (LEAF - 1));
    return;
  }
  const int64_t part = now.size > CHUNK ? 1 : count;
  for (int64_t b = first; b < first + count; b += part) {
    for (T* x : falling) pass<true>(now, x, b, part);
    walk(plan, falling, rising, leaf, level + 1, b * now.radix, part * now.radix);
    if (rising) pass<false>(now, rising, b, part);
  }
}

template <class T> struct Leaf {
  Complex<T> a[LEAF];
  explicit inline __attribute__((always_inline)) Leaf(const T* x) {
    for (int s = 0; s < LEAF; s++) a[s] = get(x + s * PITCH<T>);
  }
  inline __attribute__((always_inline)) void write(T* x) const {
    for (int s = 0; s < LEAF; s++) put(x + s * PITCH<T>, a[s]);
  }
};

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
