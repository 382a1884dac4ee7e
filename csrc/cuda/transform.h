// The values of polynomials modulo x^n - i at its roots, and back, in the shared memory of a block; n = 16 2^levels.
//
//     x^m - c = (x^{m / 2} - t) (x^{m / 2} + t),   t^2 = c
//
// takes each block of m numbers, a remainder modulo x^m - c, to two of half the size, two of these levels at a time. Values stay in the order
// in which they come out, and the way back undoes it. The numbers c of a level are e^{2 pi i turn(level, b)} for its blocks b.
// A thread has POINTS adjacent numbers, whose last four levels it does in registers. A block may transform several channels side by side.
#pragma once

#include "numbers.h"

namespace {

constexpr int POINTS = 16;

template <class T> struct Leaf { Complex<T> at[POINTS]; };

template <class T> struct Transform {
  int64_t n;
  int levels;
  explicit Transform(int64_t L) : n(POINTS), levels(0) {
    while (n < L) n *= 2, levels++;
  }

  ANYWHERE int64_t threads() const { return n / POINTS; }   // of a channel
  ANYWHERE int64_t room() const { return n + n / POINTS; }  // of a channel, in numbers: one in 17 is left out, or the leaves would share a bank
  DEVICE static int64_t slot(int64_t i) { return i + i / POINTS; }
  DEVICE Complex<T>* channel(Complex<T>* values, int thread) const { return values + thread / threads() * room(); }

  DEVICE static T turn(int level, int64_t b) {  // the bits of b from the last to the first, as a fraction, and a quarter of the last place
    int64_t reversed = 0;
    for (int i = 0; i < level; i++) reversed |= (b >> i & 1) << (level - 1 - i);
    return (T(reversed) + T(0.25)) / T(int64_t(1) << level);
  }

  // Two levels at once, of four numbers a quarter of a block apart; turn: the block's. Up: four times as large.
  template <bool DOWN> DEVICE static void butterfly(Complex<T>& a, Complex<T>& b, Complex<T>& c, Complex<T>& d, T turn) {
    const Complex<T> w = half_turns(turn / 2), w2 = w * w, w3 = w2 * w;
    if (DOWN) {
      b = b * w, c = c * w2, d = d * w3;
      const Complex<T> even = a + c, minus = a - c, odd = b + d, across = b - d, side{-across.im, across.re};
      a = even + odd, b = even - odd, c = minus + side, d = minus - side;
    } else {
      const Complex<T> even = a + b, odd = a - b, plus = c + d, across = c - d, side{across.im, -across.re};
      a = even + plus, b = (odd + side) * conjugate(w), c = (even - plus) * conjugate(w2), d = (odd - side) * conjugate(w3);
    }
  }

  template <bool DOWN> DEVICE void by_four(const Block& block, Complex<T>* values, int level) const {
    const int64_t apart = (n >> level) / 4;
    block.each([&](int thread) {
      Complex<T>* const x = channel(values, thread);
      for (int64_t i = thread % threads(); i < n / 4; i += threads()) {
        const int64_t b = i / apart, first = b * 4 * apart + i % apart;
        butterfly<DOWN>(x[slot(first)], x[slot(first + apart)], x[slot(first + 2 * apart)], x[slot(first + 3 * apart)], turn(level, b));
      }
    });
  }

  template <bool DOWN> DEVICE void by_two(const Block& block, Complex<T>* values) const {  // the first level
    block.each([&](int thread) {
      Complex<T>* const x = channel(values, thread);
      const Complex<T> w = half_turns(turn(0, 0));
      for (int64_t i = thread % threads(); i < n / 2; i += threads()) {
        Complex<T>&a = x[slot(i)], &b = x[slot(i + n / 2)];
        const Complex<T> low = a, high = DOWN ? b * w : b;
        a = low + high, b = DOWN ? low - high : (low - high) * conjugate(w);
      }
    });
  }

  DEVICE void fall(const Block& block, Complex<T>* values) const {
    if (levels % 2) by_two<true>(block, values);
    for (int level = levels % 2; level < levels; level += 2) by_four<true>(block, values, level);
  }
  DEVICE void rise(const Block& block, Complex<T>* values) const {
    for (int level = levels - 2; level >= levels % 2; level -= 2) by_four<false>(block, values, level);
    if (levels % 2) by_two<false>(block, values);
  }

  // The last four levels of the thread's own numbers: from memory, and back to it.
  template <bool DOWN> DEVICE void both(Leaf<T>& leaf, int64_t b, int level, int apart) const {
    UNROLL for (int first = 0; first < POINTS; first += 4 * apart) {
      const T angle = turn(level, b * (POINTS / (4 * apart)) + first / (4 * apart));
      UNROLL for (int j = first; j < first + apart; j++)
        butterfly<DOWN>(leaf.at[j], leaf.at[j + apart], leaf.at[j + 2 * apart], leaf.at[j + 3 * apart], angle);
    }
  }
  DEVICE Leaf<T> take(Complex<T>* values, int thread) const {
    const int64_t b = thread % threads();
    const Complex<T>* const x = channel(values, thread) + b * (POINTS + 1);
    Leaf<T> leaf;
    UNROLL for (int i = 0; i < POINTS; i++) leaf.at[i] = x[i];
    both<true>(leaf, b, levels, 4);
    both<true>(leaf, b, levels + 2, 1);
    return leaf;
  }
  DEVICE void put(Leaf<T> leaf, Complex<T>* values, int thread) const {
    const int64_t b = thread % threads();
    Complex<T>* const x = channel(values, thread) + b * (POINTS + 1);
    both<false>(leaf, b, levels + 2, 1);
    both<false>(leaf, b, levels, 4);
    UNROLL for (int i = 0; i < POINTS; i++) x[i] = leaf.at[i];
  }
};

}  // namespace
