// Coupled oscillators over time.      theta_{t+1} = wrap(theta_t + free_t + cos theta_t * (P sin theta_t) - sin theta_t * (P cos theta_t))
//
// phases (B, L + 1, pitch); free_t = dt (u_t + omega) stands in phases[:, t + 1] when the forward pass begins, theta_0 in phases[:, 0].
// P_ij = dt kappa_i W_ij comes transposed: pull[j][i]. A block takes ROUGHLY threads' worth of rows, or one row, a thread an
// oscillator (or every THREADS-th, where there are more). What they tell each other stands twice in shared memory, for this step and for the next one: one barrier
// a step. What limits it is that barrier and the reads of P, which come from the cache: the steps follow one another.
#include "numbers.h"

namespace {

constexpr int THREADS = 256, ROUGHLY = 64;
constexpr double TWO_PI = 6.283185307179586476925;

// How rows of H oscillators lie in a block, and in its shared memory: `kinds` numbers of each oscillator, for two steps.
struct Layout {
  int64_t B, H, rows;
  Layout(int64_t B, int64_t H) : B(B), H(H), rows(larger<int64_t>(1, ROUGHLY / larger<int64_t>(1, H))) {}
  int64_t blocks() const { return parts(B, rows); }
  int threads() const { return int(smaller<int64_t>(THREADS, rows * larger<int64_t>(1, H))); }
  DEVICE int64_t slot(int64_t step, int64_t kind, int64_t kinds) const { return ((step & 1) * kinds + kind) * rows * H; }
};

// f(row, i, k) for the oscillators of a thread; k counts them all in the block.
template <class F> DEVICE void over_oscillators(const Block& block, const Layout& layout, int thread, F f) {
  for (int64_t k = thread; k < layout.rows * layout.H; k += block.threads()) {
    const int64_t row = block.index * layout.rows + k / layout.H;
    if (row < layout.B) f(row, k % layout.H, k);
  }
}

// Of a matrix by columns, (M x)_i for two vectors x.
template <class T> DEVICE Complex<T> multiply(const T* RESTRICT columns, const T* x, const T* y, int64_t i, int64_t H, int64_t pitch) {
  Complex<T> sums{};
  for (int64_t j = 0; j < H; j++) {
    const T column = columns[j * pitch + i];
    sums.re += column * x[j], sums.im += column * y[j];
  }
  return sums;
}

template <class T> struct Forward {
  static constexpr int THREADS = ::THREADS;
  Layout layout;
  T* phases;
  const T* RESTRICT pull;
  int64_t L, pitch;
  static constexpr int SIN = 0, COS = 1, KINDS = 2;

  DEVICE void operator()(const Block& block) const {
    T* const memory = block.memory<T>();
    const int64_t H = layout.H;
    for (int64_t t = 0; t <= L; t++) {
      T *sin = memory + layout.slot(t, SIN, KINDS), *cos = memory + layout.slot(t, COS, KINDS);
      const T *sin_before = memory + layout.slot(t + 1, SIN, KINDS), *cos_before = memory + layout.slot(t + 1, COS, KINDS);
      block.each([&](int thread) {
        over_oscillators(block, layout, thread, [&](int64_t row, int64_t i, int64_t k) {
          T* const now = phases + (row * (L + 1) + t) * pitch + i;
          if (t) {
            const Complex<T> pulled = multiply(pull, sin_before + k - i, cos_before + k - i, i, H, pitch);
            T next = now[-pitch] + *now + cos_before[k] * pulled.re - sin_before[k] * pulled.im;
            next -= rounded_down(next * T(1 / TWO_PI)) * T(TWO_PI);
            *now = next;
          }
          const Complex<T> w = wave(*now);
          sin[k] = w.im, cos[k] = w.re;
        });
      });
    }
  }
};

// adjoints, like phases, hold the gradient of the phases and become that of all that follows from them; with gain = dt kappa:
//   a_t += keep_t a_{t+1} + sin_t * P^T(sin_t a_{t+1}) + cos_t * P^T(cos_t a_{t+1}),   keep = 1 - gain (cos * W cos + sin * W sin)
// of_kappa collects a_{t+1} * (cos * W sin - sin * W cos), the gradient of gain.
template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  Layout layout;
  T* adjoints;
  const T* RESTRICT phases;
  const T* RESTRICT pull;
  const T* RESTRICT push;
  const T* RESTRICT gain;
  T* of_kappa;
  int64_t L, pitch;
  static constexpr int SIN = 0, COS = 1, LATER_SIN = 2, LATER_COS = 3, KINDS = 4;  // the last two times a_{t+1}

  DEVICE void operator()(const Block& block) const {
    T* const memory = block.memory<T>();
    T* const total = memory + 2 * KINDS * layout.rows * layout.H;
    const int64_t H = layout.H;
    for (int64_t t = L; t >= 0; t--) {  // finishes a_t, and puts down what step t - 1 needs of it
      block.each([&](int thread) {
        over_oscillators(block, layout, thread, [&](int64_t row, int64_t i, int64_t k) {
          const T* const slots = memory + layout.slot(t, 0, KINDS) + k - i;  // of this step
          auto of = [&](int kind) { return slots + kind * layout.rows * H; };
          const int64_t place = (row * (L + 1) + t) * pitch + i;
          T a = adjoints[place], sum = t < L ? total[k] : T(0);
          if (t < L) {
            const T s = of(SIN)[i], c = of(COS)[i], later = adjoints[place + pitch];
            const Complex<T> pulled = multiply(pull, of(SIN), of(COS), i, H, pitch);
            const Complex<T> pushed = multiply(push, of(LATER_SIN), of(LATER_COS), i, H, pitch);
            a += (T(1) - gain[i] * (c * pulled.im + s * pulled.re)) * later + s * pushed.re + c * pushed.im;
            adjoints[place] = a;
            sum += later * (c * pulled.re - s * pulled.im);
          }
          total[k] = sum;
          if (t) {
            const Complex<T> w = wave(phases[place - pitch]);
            T* const next = memory + layout.slot(t - 1, 0, KINDS) + k;
            const int64_t apart = layout.rows * H;
            next[SIN * apart] = w.im, next[COS * apart] = w.re, next[LATER_SIN * apart] = w.im * a, next[LATER_COS * apart] = w.re * a;
          } else {
            of_kappa[row * pitch + i] = sum;
          }
        });
      });
    }
  }
};

}  // namespace

// Forward, pull[j][i] = P_ij; backward, pull[j][i] = W_ij, push[i][k] = P_ik, gain (pitch), of_kappa (B, pitch). Behind H nothing is written.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t kuramoto_scan_##NAME(T* phases, const T* pull, int64_t B, int64_t L, int64_t H, int64_t pitch, int64_t stream) {         \
    const Layout layout(B, H);                                                                                                            \
    const int64_t bytes = 2 * Forward<T>::KINDS * layout.rows * H * sizeof(T);                                                            \
    return launch(Forward<T>{layout, phases, pull, L, pitch}, layout.blocks(), layout.threads(), bytes, stream);                          \
  }                                                                                                                                       \
  EXPORT int64_t kuramoto_scan_backward_##NAME(                                                                                           \
      T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_kappa, int64_t B, int64_t L, int64_t H,            \
      int64_t pitch, int64_t stream) {                                                                                                    \
    const Layout layout(B, H);                                                                                                            \
    const int64_t bytes = (2 * Backward<T>::KINDS + 1) * layout.rows * H * sizeof(T);                                                     \
    return launch(                                                                                                                        \
        Backward<T>{layout, adjoints, phases, pull, push, gain, of_kappa, L, pitch}, layout.blocks(), layout.threads(), bytes, stream);   \
  }

DEFINE(float32, float)
DEFINE(float64, double)
