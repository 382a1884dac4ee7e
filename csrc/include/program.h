// What the instructions of a program share (cpu/decode.cpp, cpu/linear.cpp).
#pragma once

#include <algorithm>

#include "simd.h"

using V = Vector<float>;
constexpr int64_t W = WIDTH<float>, GROUP = 16;
constexpr int64_t GRAIN = 1 << 20;  // multiply-adds for each thread, as in lab/ops/native.py

struct Rows {
  float* base;
  int64_t pitch;
  float* operator[](int64_t b) const { return base + b * pitch; }
};

struct Call {  // what all instructions of one token share
  int64_t B;
  const int64_t *tokens, *start;  // (B), and the position of each row at t = 0
  int64_t t, threads;
  bool wrong;  // a token or a position that its table does not have
};

struct Operands {
  const int64_t* at;
  int64_t number() { return *at++; }
  float* array() { return reinterpret_cast<float*>(*at++); }
  Rows rows() {
    float* base = array();
    return {base, number()};
  }
  float real() {
    double x;
    std::memcpy(&x, at++, sizeof x);
    return float(x);
  }
};

template <class F> INLINE void over(int64_t width, F f) {  // f(i, lanes) for vectors of a row
  int64_t i = 0;
  for (; i + W <= width; i += W) f(i, std::integral_constant<int64_t, W>{});
  if (i < width) f(i, width - i);
}

// f(first, end) on parts of 0 .. n, whole multiples of `unit`, as many as `work` is worth.
template <class F> void in_parts(int64_t n, int64_t unit, int64_t work, int64_t threads, F f) {
  const int64_t units = (n + unit - 1) / unit;
  const int team = team_for(std::min(threads, work / GRAIN), units);
  if (team <= 1) return f(int64_t(0), n);
#pragma omp parallel for num_threads(team)
  for (int part = 0; part < team; part++) f(units * part / team * unit, std::min(n, units * (part + 1) / team * unit));
}

// y = weight x + bias, with weights in float or packed
void linear(Operands o, Call& call);
void linear_packed(Operands o, Call& call);

// a mixture of experts
void experts(Operands o, Call& call);
