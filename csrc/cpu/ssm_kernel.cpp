// The convolution kernel of a diagonal state space, a Vandermonde product.      K[h, l] = 2 Re sum_n c[h, n] e^{w[h, n] l}
//
// w, c (H, N) complex, stored re im; K (H, L). Positions stand side by side: a vector of z^l is carried on by a factor z^WIDTH. So that its
// rounding does not add up, it starts anew every RESTART vectors, from a power that is carried on in double precision.
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

constexpr int64_t RESTART = 32;
constexpr int G = 4;  // states at a time

struct Complex {
  double re, im;
  Complex operator*(Complex b) const { return {re * b.re - im * b.im, re * b.im + im * b.re}; }
};

Complex power_of_2(Complex z, int64_t exponent) {  // z^exponent
  for (; exponent > 1; exponent /= 2) z = z * z;
  return z;
}

// scale * z^l, z = e^w, for the positions l .. l + WIDTH - 1 and G states. States beyond N count as 0.
template <class T> struct Powers {
  static constexpr int64_t W = WIDTH<T>;
  Vector<T> re[G] = {}, im[G] = {};
  T step_re[G] = {}, step_im[G] = {};  // z^W
  double lane_re[G][W] = {}, lane_im[G][W] = {};  // z^0 .. z^(W - 1)
  Complex next[G] = {}, leap[G] = {};  // the power to start from, and z^(W RESTART)

  Powers(const T* w, const Complex* scale, int64_t states) {
    for (int n = 0; n < states; n++) {
      const double size = std::exp(double(w[2 * n])), angle = double(w[2 * n + 1]);
      const Complex z{size * std::cos(angle), size * std::sin(angle)}, step = power_of_2(z, W);
      Complex p{1, 0};
      for (int i = 0; i < W; i++, p = p * z) lane_re[n][i] = p.re, lane_im[n][i] = p.im;
      step_re[n] = T(step.re), step_im[n] = T(step.im);
      next[n] = scale[n], leap[n] = power_of_2(step, RESTART);
    }
  }
  void restart() {
    for (int n = 0; n < G; n++) {
      const Complex p = next[n];
      T r[W], i[W];
      for (int k = 0; k < W; k++) {
        r[k] = T(p.re * lane_re[n][k] - p.im * lane_im[n][k]);
        i[k] = T(p.re * lane_im[n][k] + p.im * lane_re[n][k]);
      }
      re[n] = load(r), im[n] = load(i);
      next[n] = p * leap[n];
    }
  }
  inline __attribute__((always_inline)) void advance(int n) {
    const Vector<T> r = re[n] * step_re[n] - im[n] * step_im[n];
    im[n] = re[n] * step_im[n] + im[n] * step_re[n];
    re[n] = r;
  }
};

// f(l, lanes) for the vectors of positions, with the powers of l in z.
template <class T, class F> INLINE void over_positions(Powers<T>& z, int64_t L, F f) {
  constexpr int64_t W = WIDTH<T>;
  for (int64_t start = 0; start < L; start += W * RESTART) {
    z.restart();
    const int64_t end = std::min(start + W * RESTART, L);
    int64_t l = start;
    for (; l + W <= end; l += W) f(l, std::integral_constant<int64_t, W>{});
    if (l < end) f(l, end - l);
  }
}

template <class T> void forward(const T* w, const T* c, T* K, int64_t N, int64_t L) {
  const FlushTiny flush;
  std::fill(K, K + L, T(0));
  for (int64_t n0 = 0; n0 < N; n0 += G) {
    const int64_t states = std::min<int64_t>(G, N - n0);
    Complex twice[G] = {};
    for (int n = 0; n < states; n++) twice[n] = {2 * double(c[2 * (n0 + n)]), 2 * double(c[2 * (n0 + n) + 1])};
    Powers<T> z(w + 2 * n0, twice, states);
    over_positions<T>(z, L, [&](int64_t l, auto lanes) {
      Vector<T> sum = load(K + l, lanes);
#pragma GCC unroll 4
      for (int n = 0; n < G; n++) {
        sum += z.re[n];
        z.advance(n);
      }
      store(K + l, sum, lanes);
    });
  }
}

// gc_n = 2 sum_l g_l conj(z_n^l),   gw_n = conj(c_n) 2 sum_l l g_l conj(z_n^l)
template <class T> void backward(const T* w, const T* c, const T* g, T* gw, T* gc, int64_t N, int64_t L) {
  const FlushTiny flush;
  Vector<T> first{};
  for (int i = 0; i < WIDTH<T>; i++) first[i] = T(i);
  for (int64_t n0 = 0; n0 < N; n0 += G) {
    const int64_t states = std::min<int64_t>(G, N - n0);
    Vector<T> plain_re[G] = {}, plain_im[G] = {}, times_re[G] = {}, times_im[G] = {};
    const Complex twos[G] = {{2, 0}, {2, 0}, {2, 0}, {2, 0}};
    Powers<T> z(w + 2 * n0, twos, states);
    over_positions<T>(z, L, [&](int64_t l, auto lanes) {
      const Vector<T> now = load(g + l, lanes), times = now * (first + T(l));
#pragma GCC unroll 4
      for (int n = 0; n < G; n++) {
        plain_re[n] += now * z.re[n];
        plain_im[n] -= now * z.im[n];
        times_re[n] += times * z.re[n];
        times_im[n] -= times * z.im[n];
        z.advance(n);
      }
    });
    for (int n = 0; n < states; n++) {
      const int64_t at = 2 * (n0 + n);
      gc[at] = sum<T>(plain_re[n]), gc[at + 1] = sum<T>(plain_im[n]);
      const Complex moment{sum<T>(times_re[n]), sum<T>(times_im[n])}, product = moment * Complex{c[at], -c[at + 1]};
      gw[at] = T(product.re), gw[at + 1] = T(product.im);
    }
  }
}

}  // namespace

#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void ssm_kernel_##NAME(const T* w, const T* c, T* K, int64_t H, int64_t N, int64_t L, int64_t threads) {                         \
    const int team = team_for(threads, H);                                                                                                \
    _Pragma("omp parallel for num_threads(team) if (team > 1)")                                                                           \
    for (int64_t h = 0; h < H; h++) forward<T>(w + 2 * h * N, c + 2 * h * N, K + h * L, N, L);                                            \
  }                                                                                                                                       \
  EXPORT void ssm_kernel_backward_##NAME(                                                                                                 \
      const T* w, const T* c, const T* g, T* gw, T* gc, int64_t H, int64_t N, int64_t L, int64_t threads) {                               \
    const int team = team_for(threads, H);                                                                                                \
    _Pragma("omp parallel for num_threads(team) if (team > 1)")                                                                           \
    for (int64_t h = 0; h < H; h++)                                                                                                       \
      backward<T>(w + 2 * h * N, c + 2 * h * N, g + h * L, gw + 2 * h * N, gc + 2 * h * N, N, L);                                         \
  }

DEFINE(float32, float)
DEFINE(float64, double)
