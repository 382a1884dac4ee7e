// Complex numbers, and functions of both precisions by one name, on the GPU and on the host.
#pragma once

#include <math.h>

#include "grid.h"

namespace {

template <class T> struct alignas(2 * sizeof(T)) Complex { T re, im; };

template <class T> ANYWHERE Complex<T> operator+(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T> ANYWHERE Complex<T> operator-(Complex<T> a, Complex<T> b) { return {a.re - b.re, a.im - b.im}; }
template <class T> ANYWHERE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T> ANYWHERE Complex<T> conjugate(Complex<T> a) { return {a.re, -a.im}; }
ANYWHERE float conjugate(float a) { return a; }
ANYWHERE double conjugate(double a) { return a; }

template <class S> struct One { ANYWHERE static S value() { return S(1); } };
template <class T> struct One<Complex<T>> { ANYWHERE static Complex<T> value() { return {T(1), T(0)}; } };

ANYWHERE float power_of_2(float x) { return exp2f(x); }
ANYWHERE double power_of_2(double x) { return exp2(x); }
ANYWHERE float rounded_down(float x) { return floorf(x); }
ANYWHERE double rounded_down(double x) { return floor(x); }
ANYWHERE float hyperbolic_tangent(float x) { return tanhf(x); }
ANYWHERE double hyperbolic_tangent(double x) { return tanh(x); }

// e^{i x}
ANYWHERE Complex<float> wave(float x) {
#ifdef __CUDA_ARCH__
  Complex<float> w;
  sincosf(x, &w.im, &w.re);
  return w;
#else
  return {cosf(x), sinf(x)};
#endif
}
ANYWHERE Complex<double> wave(double x) {
#ifdef __CUDA_ARCH__
  Complex<double> w;
  sincos(x, &w.im, &w.re);
  return w;
#else
  return {cos(x), sin(x)};
#endif
}

// e^{pi i x}
ANYWHERE Complex<float> half_turns(float x) {
#ifdef __CUDA_ARCH__
  Complex<float> w;
  sincospif(x, &w.im, &w.re);
  return w;
#else
  const Complex<double> w = wave(3.14159265358979323846 * double(x));
  return {float(w.re), float(w.im)};
#endif
}
ANYWHERE Complex<double> half_turns(double x) {
#ifdef __CUDA_ARCH__
  Complex<double> w;
  sincospi(x, &w.im, &w.re);
  return w;
#else
  return wave(3.14159265358979323846 * x);
#endif
}

}  // namespace
