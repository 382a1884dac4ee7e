// The convolution kernel of a diagonal state space, a Vandermonde product.      K[h, l] = 2 Re sum_n c[h, n] e^{w[h, n] l}
//
// w, c (H, N) complex, stored re im; K (H, L). A thread takes RUN positions, THREADS apart, so that adjacent threads write adjacent positions.
// For each state it computes the first power in double precision and goes on by a factor e^{w THREADS}: an angle w l of thousands of turns has
// no digits left in float. What limits it is that sine and cosine in double: one in RUN positions.
#include "numbers.h"
#include "sums.h"

namespace {

constexpr int THREADS = 128, RUN = 16;

// e^{w l}, taken in double precision
template <class T> ANYWHERE Complex<double> power(Complex<T> w, int64_t l) {
  const double size = exp(double(w.re) * double(l));
  const Complex<double> turned = wave(double(w.im) * double(l));
  return {size * turned.re, size * turned.im};
}
template <class T> ANYWHERE Complex<T> in_precision(Complex<double> z) { return {T(z.re), T(z.im)}; }

// A block is a run of positions of one h.
template <class T> struct Forward {
  static constexpr int THREADS = ::THREADS;
  const Complex<T>* RESTRICT w;
  const Complex<T>* RESTRICT c;
  T* RESTRICT K;
  int64_t N, L;

  DEVICE void operator()(const Block& block) const {
    const int64_t runs = parts(L, THREADS * RUN), h = block.index / runs, start = block.index % runs * THREADS * RUN;
    block.each([&](int thread) {
      T sums[RUN] = {};
      for (int64_t n = 0; n < N; n++) {
        const Complex<T> exponent = w[h * N + n], factor = c[h * N + n], step = in_precision<T>(power(exponent, THREADS));
        const Complex<double> twice{2 * double(factor.re), 2 * double(factor.im)};
        Complex<T> z = in_precision<T>(twice * power(exponent, start + thread));
        UNROLL for (int i = 0; i < RUN; i++) {
          sums[i] += z.re;
          z = z * step;
        }
      }
      UNROLL for (int i = 0; i < RUN; i++) {
        const int64_t l = start + thread + i * THREADS;
        if (l < L) K[h * L + l] = sums[i];
      }
    });
  }
};

// gc_n = 2 sum_l g_l conj(z_n^l),   gw_n = conj(c_n) 2 sum_l l g_l conj(z_n^l).      A block is one state, its threads share the positions.
template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  const Complex<T>* RESTRICT w;
  const Complex<T>* RESTRICT c;
  const T* RESTRICT g;
  Complex<T>* RESTRICT gw;
  Complex<T>* RESTRICT gc;
  int64_t N, L;

  struct Sums {
    Complex<T> plain, times;
    DEVICE Sums operator+(const Sums& other) const { return {plain + other.plain, times + other.times}; }
  };

  DEVICE void operator()(const Block& block) const {
    const int64_t h = block.index / N, state = block.index;
    Sums* const sums = block.memory<Sums>();
    block.each([&](int thread) {
      const Complex<T> step = in_precision<T>(power(w[state], THREADS));
      Sums sum{};
      for (int64_t start = 0; start < L; start += THREADS * RUN) {
        Complex<T> z = in_precision<T>(power(w[state], start + thread));
        UNROLL for (int i = 0; i < RUN; i++) {
          const int64_t l = start + thread + i * THREADS;
          const T now = l < L ? 2 * g[h * L + l] : T(0), times = now * T(l);
          sum = sum + Sums{{now * z.re, -now * z.im}, {times * z.re, -times * z.im}};
          z = z * step;
        }
      }
      sums[thread] = sum;
    });
    add_up(block, sums);
    block.each([&](int thread) {
      if (thread) return;
      gc[state] = sums[0].plain;
      gw[state] = sums[0].times * conjugate(c[state]);
    });
  }
};

template <class T> const Complex<T>* in(const T* p) { return reinterpret_cast<const Complex<T>*>(p); }
template <class T> Complex<T>* to(T* p) { return reinterpret_cast<Complex<T>*>(p); }

}  // namespace

#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t ssm_kernel_##NAME(const T* w, const T* c, T* K, int64_t H, int64_t N, int64_t L, int64_t stream) {                       \
    return launch(Forward<T>{in(w), in(c), K, N, L}, H * parts(L, THREADS * RUN), THREADS, 0, stream);                                    \
  }                                                                                                                                       \
  EXPORT int64_t ssm_kernel_backward_##NAME(                                                                                              \
      const T* w, const T* c, const T* g, T* gw, T* gc, int64_t H, int64_t N, int64_t L, int64_t stream) {                                \
    return launch(Backward<T>{in(w), in(c), g, to(gw), to(gc), N, L}, H * N, THREADS, THREADS * sizeof(Backward<T>::Sums), stream);       \
  }

DEFINE(float32, float)
DEFINE(float64, double)
