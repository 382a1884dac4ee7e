// Vectors of T as wide as the instruction set that a file is compiled for, and what the kernels do with them.
//
// A kernel walks over time with the channels side by side: a `Tile` of up to K vectors of adjacent channels, its state in registers. The
// last tile of a row may be narrower; it is the same code with loads and stores that stop at the last channel.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int64_t WIDTH = VECTOR_BYTES / sizeof(T);

template <class T> INLINE Vector<T> splat(T x) { return Vector<T>{} + x; }

// n: how many of the lanes exist; the others are read as 0 and not written.
template <class T> INLINE Vector<T> load(const T* p, int64_t n = WIDTH<T>) {
  Vector<T> v{};
  if (n >= WIDTH<T>)
    std::memcpy(&v, p, sizeof v);
  else if (n > 0)
    std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T> INLINE void store(T* p, Vector<T> v, int64_t n = WIDTH<T>) {
  if (n >= WIDTH<T>)
    std::memcpy(p, &v, sizeof v);
  else if (n > 0)
    std::memcpy(p, &v, n * sizeof(T));
}

// f(lanes), with the number as a constant where the vector is whole: then no load or store in a loop asks for it.
template <class T, class F> INLINE void with_lanes(int64_t lanes, F f) {
  if (lanes >= WIDTH<T>)
    f(std::integral_constant<int64_t, WIDTH<T>>{});
  else
    f(lanes);
}

// While it lives, this thread takes numbers below the smallest normal one (1e-38 in float) as 0: whatever decays gets there, and the
// processor would need a hundred cycles for each.
struct FlushTiny {
#if defined(__SSE__)
  const unsigned before = __builtin_ia32_stmxcsr();
  FlushTiny() { __builtin_ia32_ldmxcsr(before | 0x8040); }  // results and operands
  ~FlushTiny() { __builtin_ia32_ldmxcsr(before); }
#else
  FlushTiny() {}
  ~FlushTiny() {}
#endif
};

// The threads that a call uses, of those it was given: a thread without a task would be woken for nothing.
INLINE int team_for(int64_t threads, int64_t tasks) { return int(tasks < 1 ? 1 : tasks < threads ? tasks : threads); }

// ---- complex numbers, stored re im re im ...; n counts real numbers

template <class V, int... I> INLINE V even_twice(V v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I & ~1)...); }
template <class V, int... I> INLINE V odd_twice(V v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I | 1)...); }
template <class V, int... I> INLINE V swapped(V v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I ^ 1)...); }
template <class V, int... I> INLINE V signs(std::integer_sequence<int, I...>) { return V{(I & 1 ? 1 : -1)...}; }
template <class T> using Lanes = std::make_integer_sequence<int, WIDTH<T>>;

// The lanes added up, by halves.
template <int STEP, class V, int... I> INLINE V moved(V v, std::integer_sequence<int, I...>) { return __builtin_shufflevector(v, v, (I ^ STEP)...); }
template <class T, int STEP = WIDTH<T> / 2> INLINE T sum(Vector<T> v) {
  if constexpr (STEP == 0)
    return v[0];
  else
    return sum<T, STEP / 2>(v + moved<STEP>(v, Lanes<T>{}));
}

// A factor, taken apart once: re re, and -im im. conjugate() of it costs nothing more.
template <class T> struct Factor {
  Vector<T> re, im;
  INLINE Factor of(Vector<T> a) { return {even_twice(a, Lanes<T>{}), odd_twice(a, Lanes<T>{}) * signs<Vector<T>>(Lanes<T>{})}; }
  inline __attribute__((always_inline)) Factor conjugate() const { return {re, -im}; }
  inline __attribute__((always_inline)) Vector<T> operator*(Vector<T> b) const { return re * b + im * swapped(b, Lanes<T>{}); }
};

// ---- 2^x for x <= 0: the exponential of every decay. A polynomial on [-1/2, 1/2]: relative error 2e-7 in float, in double 2e-16; 2^-126
// and 2^-1022 below that.
// x > 128 gives any number: the caller keeps it out. A bound here makes Mamba's scan take 1.7 times as long.

INLINE Vector<float> exp2_decay(Vector<float> x) {
  x = x < -126.f ? splat(-126.f) : x;
  const Vector<float> magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  Vector<float> shifted = x + magic;
  Vector<float> f = x - (shifted - magic);
  Vector<float> p = splat(1.3276472e-3f);
  p = p * f + 9.675542e-3f;
  p = p * f + 5.550713e-2f;
  p = p * f + 2.4022120e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
  VectorOf<float>::bits n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

INLINE Vector<double> exp2_decay(Vector<double> x) {
  x = x < -1022. ? splat(-1022.) : x;
  const Vector<double> magic = splat(6755399441055744.);  // 1.5 * 2^52
  const Vector<double> shifted = x + magic, f = (x - (shifted - magic)) * 0.693147180559945309417;
  constexpr double inverse_factorials[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                           1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1.,      1.};
  Vector<double> p = splat(1. / 6227020800);
  for (const double factor : inverse_factorials) p = p * f + factor;
  VectorOf<double>::bits n, bits;
  std::memcpy(&n, &shifted, sizeof n);
  std::memcpy(&bits, &p, sizeof bits);
  bits += n << 52;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// ---- sin and cos of an angle in [-8, 8]: reduction to [-pi/4, pi/4] by the nearest quarter turn, then Taylor polynomials; error 1e-7,
// in double 1e-16

template <class T> struct Wave { Vector<T> sin, cos; };

INLINE Wave<float> wave(Vector<float> x) {
  const Vector<float> magic = splat(12582912.f);
  const Vector<float> shifted = x * 0.636619772f + magic, quarters = shifted - magic;
  VectorOf<float>::bits k;
  std::memcpy(&k, &shifted, sizeof k);
  Vector<float> r = x - quarters * 1.57079637f;  // pi / 2 in two parts
  r = r + quarters * 4.37113883e-8f;
  const Vector<float> q = r * r;
  Vector<float> s = splat(-1.9515296e-4f);
  s = s * q + 8.3321609e-3f;
  s = s * q - 1.6666655e-1f;
  s = s * q * r + r;
  Vector<float> c = splat(2.4433157e-5f);
  c = c * q - 1.3887316e-3f;
  c = c * q + 4.1666646e-2f;
  c = c * q * q - 0.5f * q + 1.f;
  const auto odd = (k & 1) != 0;
  Vector<float> sin = odd ? c : s, cos = odd ? s : c;
  sin = (k & 2) != 0 ? -sin : sin;
  cos = ((k + 1) & 2) != 0 ? -cos : cos;
  return {sin, cos};
}

INLINE Wave<double> wave(Vector<double> x) {
  const Vector<double> magic = splat(6755399441055744.);
  const Vector<double> shifted = x * 0.636619772367581343076 + magic, quarters = shifted - magic;
  VectorOf<double>::bits k;
  std::memcpy(&k, &shifted, sizeof k);
  Vector<double> r = x - quarters * 1.57079632673412561417;  // the first part has 33 bits, so the product is exact
  r = r - quarters * 6.07710050650619224932e-11;
  const Vector<double> q = r * r;
  Vector<double> s = splat(-1. / 1307674368000), c = splat(1. / 20922789888000);
  for (const double factor : {1. / 6227020800, -1. / 39916800, 1. / 362880, -1. / 5040, 1. / 120, -1. / 6}) s = s * q + factor;
  for (const double factor : {-1. / 87178291200, 1. / 479001600, -1. / 3628800, 1. / 40320, -1. / 720, 1. / 24}) c = c * q + factor;
  s = s * q * r + r;
  c = c * q * q - 0.5 * q + 1.;
  const auto odd = (k & 1) != 0;
  const Vector<double> sin = odd ? c : s, cos = odd ? s : c;
  return {(k & 2) != 0 ? -sin : sin, ((k + 1) & 2) != 0 ? -cos : cos};
}

template <class T> INLINE Vector<T> floored(Vector<T> x) {
  for (int i = 0; i < WIDTH<T>; i++) x[i] = std::floor(x[i]);
  return x;
}
