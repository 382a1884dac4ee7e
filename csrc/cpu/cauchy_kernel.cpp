// Cauchy sums at the roots of unity, over both of each pair of conjugates, for R numerators at once.
//
//   Q[h, r, k] = sum_n v / (i s - c w) + conj(v) / (i s - c conj(w)),   s = sin(pi k / L), c = cos(pi k / L), k = 0 .. L / 2
//              = sum_n (i s a - c b) / (e + i f),   a = 2 Re v,  b = 2 Re(v conj(w)),  e = (c |w|)^2 - s^2,  f = -2 s c Re w
//
// w (H, N), v (H, R, N), Q (H, R, K = L / 2 + 1) complex, stored re im; Re w < 0. The points k stand side by side in a vector. e is taken as a
// product, exact where |w| is near s / c: there the sum has its peak.
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

constexpr int G = VECTOR_BYTES == 64 ? 4 : 2;  // numerators at a time: their sums stay in registers

template <class T> struct Points {  // s and c in whole vectors; those beyond K are i, where nothing has a pole
  std::vector<T> s, c;
  Points(int64_t L, int64_t K) {
    const int64_t whole = (K + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
    s.assign(whole, T(1)), c.assign(whole, T(0));
    for (int64_t k = 0; k < K; k++) {
      const double angle = M_PI * double(k) / double(L);
      s[k] = T(std::sin(angle)), c[k] = 2 * k == L ? T(0) : T(std::cos(angle));
    }
  }
  int64_t size() const { return int64_t(s.size()); }
};

// 1 / (e + i f) = E - i F
template <class T> struct Reciprocal {
  Vector<T> E, F;
  inline __attribute__((always_inline)) Reciprocal(Vector<T> s, Vector<T> c, T size, T re) {
    const Vector<T> at = c * size, e = (at - s) * (at + s), f = s * c * (-2 * re), inverse = T(1) / (e * e + f * f);
    E = e * inverse, F = f * inverse;
  }
};

template <class T> struct Poles {  // of one channel: |w|, Re w, and a, b of each numerator
  std::vector<T> size, re, a, b;
  Poles(const T* w, const T* v, int64_t N, int64_t R) : size(N), re(N), a(R * N), b(R * N) {
    for (int64_t n = 0; n < N; n++) size[n] = T(std::hypot(double(w[2 * n]), double(w[2 * n + 1]))), re[n] = w[2 * n];
    for (int64_t i = 0; i < R * N; i++) {
      const int64_t n = i % N;
      a[i] = 2 * v[2 * i], b[i] = T(2 * (double(v[2 * i]) * w[2 * n] + double(v[2 * i + 1]) * w[2 * n + 1]));
    }
  }
};

template <class V, int... I> INLINE V low(V re, V im, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(re, im, (I / 2 + I % 2 * int(sizeof...(I)))...);
}
template <class V, int... I> INLINE V high(V re, V im, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(re, im, (int(sizeof...(I)) / 2 + I / 2 + I % 2 * int(sizeof...(I)))...);
}

// NR numerators of one channel; those of a pass share the reciprocals.
template <class T, int NR> void forward(const Points<T>& points, const Poles<T>& poles, int64_t first, T* Q, int64_t N, int64_t K) {
  constexpr int64_t W = WIDTH<T>;
  const T *a = poles.a.data() + first * N, *b = poles.b.data() + first * N;
  for (int64_t k = 0; k < K; k += W) {
    const Vector<T> s = load(points.s.data() + k), c = load(points.c.data() + k);
    Vector<T> aE[NR] = {}, aF[NR] = {}, bE[NR] = {}, bF[NR] = {};
    for (int64_t n = 0; n < N; n++) {
      const Reciprocal<T> z(s, c, poles.size[n], poles.re[n]);
#pragma GCC unroll 4
      for (int r = 0; r < NR; r++) {
        const T ar = a[r * N + n], br = b[r * N + n];
        aE[r] += z.E * ar, aF[r] += z.F * ar, bE[r] += z.E * br, bF[r] += z.F * br;
      }
    }
    for (int r = 0; r < NR; r++) {
      const Vector<T> re = s * aF[r] - c * bE[r], im = s * aE[r] + c * bF[r];
      T* out = Q + 2 * ((first + r) * K + k);
      store(out, low(re, im, Lanes<T>{}), 2 * (K - k)), store(out + W, high(re, im, Lanes<T>{}), 2 * (K - k) - W);
    }
  }
}

// g, the gradient of Q with its real and imaginary parts apart, in whole vectors: to those of a, b, |w|^2 and Re w.
template <class T, int NR>
void backward(
    const Points<T>& points, const Poles<T>& poles, int64_t first, const std::vector<T>& g, T* ga, T* gb, T* gsquare, T* gre, int64_t N) {
  const int64_t whole = points.size();
  const T* parts = g.data() + 2 * first * whole;
  for (int64_t n = 0; n < N; n++) {
    Vector<T> to_a[NR] = {}, to_b[NR] = {}, to_square{}, to_re{};
    T a[NR], b[NR];
    for (int r = 0; r < NR; r++) a[r] = poles.a[(first + r) * N + n], b[r] = poles.b[(first + r) * N + n];
    for (int64_t k = 0; k < whole; k += WIDTH<T>) {
      const Vector<T> s = load(points.s.data() + k), c = load(points.c.data() + k);
      const Reciprocal<T> z(s, c, poles.size[n], poles.re[n]);
      const Vector<T> sE = s * z.E, sF = s * z.F, cE = c * z.E, cF = c * z.F;
      Vector<T> ag1{}, ag2{}, bg1{}, bg2{};
#pragma GCC unroll 4
      for (int r = 0; r < NR; r++) {
        const Vector<T> g1 = load(parts + 2 * r * whole + k), g2 = load(parts + (2 * r + 1) * whole + k);
        to_a[r] += g1 * sF + g2 * sE, to_b[r] += g2 * cF - g1 * cE;
        ag1 += g1 * a[r], ag2 += g2 * a[r], bg1 += g1 * b[r], bg2 += g2 * b[r];
      }
      // With S = sum_r conj(g) (i s a - c b) the loss moves by Re(S dZ), and dZ = -Z^2 (de + i df).
      const Vector<T> S_re = s * ag2 - c * bg1, S_im = s * ag1 + c * bg2, Z_re = z.E * z.E - z.F * z.F, Z_im = T(-2) * z.E * z.F;
      to_square += c * c * (S_im * Z_im - S_re * Z_re);
      to_re += s * c * (S_re * Z_im + S_im * Z_re);
    }
    for (int r = 0; r < NR; r++) ga[(first + r) * N + n] = sum<T>(to_a[r]), gb[(first + r) * N + n] = sum<T>(to_b[r]);
    gsquare[n] += sum<T>(to_square), gre[n] -= 2 * sum<T>(to_re);
  }
}

// f(first, their number as a constant) for G numerators at a time.
template <class F> void in_groups(int64_t R, F f) {
  int64_t r = 0;
  for (; r + G <= R; r += G) f(r, std::integral_constant<int, G>{});
  for (; G == 4 && r + 2 <= R; r += 2) f(r, std::integral_constant<int, 2>{});
  for (; r < R; r++) f(r, std::integral_constant<int, 1>{});
}

template <class T> void forward(const Points<T>& points, const T* w, const T* v, T* Q, int64_t N, int64_t R, int64_t K) {
  const Poles<T> poles(w, v, N, R);
  in_groups(R, [&](int64_t first, auto count) { forward<T, count>(points, poles, first, Q, N, K); });
}

template <class T>
void backward(const Points<T>& points, const T* w, const T* v, const T* gQ, T* gw, T* gv, int64_t N, int64_t R, int64_t K) {
  const int64_t whole = points.size();
  const Poles<T> poles(w, v, N, R);
  std::vector<T> g(2 * R * whole), ga(R * N), gb(R * N), gsquare(N), gre(N);
  for (int64_t r = 0; r < R; r++)
    for (int64_t k = 0; k < K; k++)
      for (int i = 0; i < 2; i++) g[(2 * r + i) * whole + k] = gQ[2 * (r * K + k) + i];
  in_groups(R, [&](int64_t first, auto count) {
    backward<T, count>(points, poles, first, g, ga.data(), gb.data(), gsquare.data(), gre.data(), N);
  });
  for (int64_t n = 0; n < N; n++) {
    const T w_re = w[2 * n], w_im = w[2 * n + 1];
    T re = gre[n] + 2 * gsquare[n] * w_re, im = 2 * gsquare[n] * w_im;
    for (int64_t i = n; i < R * N; i += N) {
      re += 2 * gb[i] * v[2 * i], im += 2 * gb[i] * v[2 * i + 1];
      gv[2 * i] = 2 * (ga[i] + gb[i] * w_re), gv[2 * i + 1] = 2 * gb[i] * w_im;
    }
    gw[2 * n] = re, gw[2 * n + 1] = im;
  }
}

}  // namespace

#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void cauchy_kernel_##NAME(const T* w, const T* v, T* Q, int64_t H, int64_t N, int64_t R, int64_t L, int64_t threads) {           \
    const int64_t K = L / 2 + 1;                                                                                                          \
    const Points<T> points(L, K);                                                                                                         \
    const int team = team_for(threads, H);                                                                                                \
    _Pragma("omp parallel for num_threads(team) if (team > 1)")                                                                           \
    for (int64_t h = 0; h < H; h++) forward<T>(points, w + 2 * h * N, v + 2 * h * R * N, Q + 2 * h * R * K, N, R, K);                     \
  }                                                                                                                                       \
  EXPORT void cauchy_kernel_backward_##NAME(                                                                                              \
      const T* w, const T* v, const T* g, T* gw, T* gv, int64_t H, int64_t N, int64_t R, int64_t L, int64_t threads) {                    \
    const int64_t K = L / 2 + 1;                                                                                                          \
    const Points<T> points(L, K);                                                                                                         \
    const int team = team_for(threads, H);                                                                                                \
    _Pragma("omp parallel for num_threads(team) if (team > 1)")                                                                           \
    for (int64_t h = 0; h < H; h++)                                                                                                       \
      backward<T>(points, w + 2 * h * N, v + 2 * h * R * N, g + 2 * h * R * K, gw + 2 * h * N, gv + 2 * h * R * N, N, R, K);              \
  }

DEFINE(float32, float)
DEFINE(float64, double)
