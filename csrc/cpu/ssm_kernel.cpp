// The convolution kernel of a diagonal state space, a Vandermonde product.      K[h, l] = 2 Re sum_n c[h, n] e^{w[h, n] l}
//
// w, c (H, N) complex, stored re im; K (H, L). Positions stand side by side: a vector of z^l is carried on by a factor z^WIDTH. So that its
// rounding does not add up, it starts anew from double precision every RESTART vectors.
#include <algorithm>
#include <complex>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t RESTART = 32;
constexpr int G = 4;  // states at a time
using Complex = std::complex<double>;

// scale * e^{w l} for the positions l .. l + WIDTH - 1 and G states, and the factor to the next ones. States beyond N count as 0.
template <class T> struct Powers {
  Vector<T> re[G] = {}, im[G] = {};
  T step_re[G] = {}, step_im[G] = {};

  void start(const T* w, int64_t l, int64_t states) {
    for (int n = 0; n < G; n++) {
      const Complex z = n < states ? Complex(w[2 * n], w[2 * n + 1]) : Complex(0);
      const Complex one = std::exp(z), far = std::exp(z * double(WIDTH<T>));
      Complex p = n < states ? std::exp(z * double(l)) : Complex(0);
      for (int i = 0; i < WIDTH<T>; i++, p *= one) re[n][i] = T(p.real()), im[n][i] = T(p.imag());
      step_re[n] = T(far.real()), step_im[n] = T(far.imag());
    }
  }
  inline __attribute__((always_inline)) void advance(int n) {
    const Vector<T> r = re[n] * step_re[n] - im[n] * step_im[n];
    im[n] = re[n] * step_im[n] + im[n] * step_re[n];
    re[n] = r;
  }
};

template <class T> void forward(const T* w, const T* c, T* K, int64_t N, int64_t L) {
  constexpr int64_t W = WIDTH<T>;
  std::fill(K, K + L, T(0));
  for (int64_t n0 = 0; n0 < N; n0 += G) {
    const int64_t states = std::min<int64_t>(G, N - n0);
    T c_re[G] = {}, c_im[G] = {};
    for (int n = 0; n < states; n++) c_re[n] = 2 * c[2 * (n0 + n)], c_im[n] = 2 * c[2 * (n0 + n) + 1];
    Powers<T> z;
    for (int64_t l = 0, i = 0; l < L; l += W, i++) {
      if (i % RESTART == 0) z.start(w + 2 * n0, l, states);
      Vector<T> sum = load(K + l, L - l);
#pragma GCC unroll 4
      for (int n = 0; n < G; n++) {
        sum += z.re[n] * c_re[n] - z.im[n] * c_im[n];
        z.advance(n);
      }
      store(K + l, sum, L - l);
    }
  }
}

// gc_n = 2 sum_l g_l conj(e^{w_n l}),   gw_n = conj(c_n) 2 sum_l l g_l conj(e^{w_n l})
template <class T> void backward(const T* w, const T* c, const T* g, T* gw, T* gc, int64_t N, int64_t L) {
  constexpr int64_t W = WIDTH<T>;
  Vector<T> first{};
  for (int i = 0; i < W; i++) first[i] = T(i);
  for (int64_t n0 = 0; n0 < N; n0 += G) {
    const int64_t states = std::min<int64_t>(G, N - n0);
    Vector<T> plain_re[G] = {}, plain_im[G] = {}, times_re[G] = {}, times_im[G] = {};
    Powers<T> z;
    for (int64_t l = 0, i = 0; l < L; l += W, i++) {
      if (i % RESTART == 0) z.start(w + 2 * n0, l, states);
      const Vector<T> now = load(g + l, L - l), times = now * (first + T(l));
#pragma GCC unroll 4
      for (int n = 0; n < G; n++) {
        plain_re[n] += now * z.re[n];
        plain_im[n] -= now * z.im[n];
        times_re[n] += times * z.re[n];
        times_im[n] -= times * z.im[n];
        z.advance(n);
      }
    }
    for (int n = 0; n < states; n++) {
      const int64_t at = 2 * (n0 + n);
      gc[at] = 2 * sum<T>(plain_re[n]), gc[at + 1] = 2 * sum<T>(plain_im[n]);
      const Complex moment(2 * sum<T>(times_re[n]), 2 * sum<T>(times_im[n])), product = moment * Complex(c[at], -c[at + 1]);
      gw[at] = T(product.real()), gw[at + 1] = T(product.imag());
    }
  }
}

}  // namespace

#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void ssm_kernel_##NAME(const T* w, const T* c, T* K, int64_t H, int64_t N, int64_t L, int64_t threads) {                         \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                                                     \
    for (int64_t h = 0; h < H; h++) forward<T>(w + 2 * h * N, c + 2 * h * N, K + h * L, N, L);                                            \
  }                                                                                                                                       \
  EXPORT void ssm_kernel_backward_##NAME(                                                                                                 \
      const T* w, const T* c, const T* g, T* gw, T* gc, int64_t H, int64_t N, int64_t L, int64_t threads) {                               \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                                                     \
    for (int64_t h = 0; h < H; h++)                                                                                                       \
      backward<T>(w + 2 * h * N, c + 2 * h * N, g + h * L, gw + 2 * h * N, gc + 2 * h * N, N, L);                                         \
  }

DEFINE(float32, float)
DEFINE(float64, double)
