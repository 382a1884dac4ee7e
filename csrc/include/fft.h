// The values of polynomials modulo x^n - i at its roots, and back. A transform goes down by levels:
//     x^m - c = prod_r (x^{m / R} - c_r),   c_r the R-th roots of c
// takes each block, a remainder modulo x^m - c, to R blocks below it, its remainders modulo the factors; block b has b R .. b R + R - 1.
// Values stay in the order in which they come out, and the way back undoes it. The channels stand side by side in vectors; a complex
// number is a vector of real parts and one of imaginary parts.
#pragma once

#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t LEAF = 4;               // the radix of the last level
constexpr int64_t CHUNK = 64;             // blocks of at most so many numbers pass all their levels in the first cache

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

}  // namespace
