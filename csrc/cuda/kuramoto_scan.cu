// Coupled oscillators over time.      theta_{t+1} = wrap(theta_t + step_t),      g_i F_i = cos theta_i (P sin theta)_i - sin theta_i (P cos theta)_i
//
//   lattice   step = free + g F,                        free = dt (u + omega), g = dt kappa
//   mesh      step = clip(free + tanh(g F), -pi, pi),   the same free, g = kappa
//
// phases (B, L + 1, pitch); free_t stands in phases[:, t + 1] when the forward pass begins, theta_0 in phases[:, 0]. P_ij = g_i W_ij comes
// transposed: pull[j][i]. A block takes ROUGHLY threads' worth of rows, or one row, a thread an oscillator (or every THREADS-th, where
// there are more). What they tell each other stands twice in shared memory, for this step and for the next one: one barrier a step, backwards
// two. What limits it is those and the reads of P, which come from the cache: the steps follow one another.
#include "numbers.h"

namespace {

constexpr int THREADS = 256, ROUGHLY = 64;
constexpr double PI = 3.141592653589793238463, TWO_PI = 2 * PI;

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
  bool mesh;
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
            const Complex<T> sums = multiply(pull, sin_before + k - i, cos_before + k - i, i, H, pitch);
            const T pulled = cos_before[k] * sums.re - sin_before[k] * sums.im;
            T step = *now + (mesh ? hyperbolic_tangent(pulled) : pulled);
            if (mesh) step = step > T(PI) ? T(PI) : step < T(-PI) ? T(-PI) : step;
            T next = now[-pitch] + step;
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

// adjoints, like phases, hold the gradient of the phases and become that of all that follows from them. c is the gradient of g F, m = g c:
//   a_t += a_{t+1} - m (cos * W cos + sin * W sin) + sin * W^T(sin m) + cos * W^T(cos m)
// lattice: c = a_{t+1}. mesh: c = (1 - tanh^2) a_{t+1}, and both become 0 where the step was clipped; c takes the place of free_t (B, L, pitch).
// of_gain collects c F.
template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  Layout layout;
  T* adjoints;
  const T* phases;
  const T* RESTRICT pull;
  const T* RESTRICT push;
  const T* RESTRICT gain;
  T* of_gain;
  T* free;  // null: the lattice
  int64_t L, pitch;
  static constexpr int SIN = 0, COS = 1, SIN_M = 2, COS_M = 3, KINDS = 4;

  DEVICE void operator()(const Block& block) const {
    T* const memory = block.memory<T>();
    T* const total = memory + 2 * KINDS * layout.rows * layout.H;
    const int64_t H = layout.H;
    for (int64_t t = L; t >= 0; t--) {
      T* const slots = memory + layout.slot(t, 0, KINDS);
      auto of = [&](int kind) { return slots + kind * layout.rows * H; };
      const T* const before = memory + layout.slot(t + 1, 0, KINDS);  // of step t + 1
      auto later = [&](int kind) { return before + kind * layout.rows * H; };
      block.each([&](int thread) {
        over_oscillators(block, layout, thread, [&](int64_t row, int64_t i, int64_t k) {
          if (t == L) {
            total[k] = T(0);
            return;
          }
          const Complex<T> w = wave(phases[(row * (L + 1) + t) * pitch + i]);
          of(SIN)[k] = w.im, of(COS)[k] = w.re;
          if (t + 1 < L) {  // a_{t+1} waits for what the others' m of step t + 1 add
            const Complex<T> pushed = multiply(push, later(SIN_M) + k - i, later(COS_M) + k - i, i, H, pitch);
            adjoints[(row * (L + 1) + t + 1) * pitch + i] += later(SIN)[k] * pushed.re + later(COS)[k] * pushed.im;
          }
        });
      });
      if (t == L) continue;
      block.each([&](int thread) {
        over_oscillators(block, layout, thread, [&](int64_t row, int64_t i, int64_t k) {
          T* const a = adjoints + (row * (L + 1) + t) * pitch + i;
          const T s = of(SIN)[k], co = of(COS)[k], g = gain[i], after = a[pitch];
          const Complex<T> pulled = multiply(pull, of(SIN) + k - i, of(COS) + k - i, i, H, pitch);
          const T force = co * pulled.re - s * pulled.im;
          T c = after;
          if (free) {
            T* const place = free + (row * L + t) * pitch + i;
            const T bent = hyperbolic_tangent(g * force), step = *place + bent;
            a[pitch] = step > T(PI) || step < T(-PI) ? T(0) : after;
            c = *place = (T(1) - bent * bent) * a[pitch];
          }
          of(SIN_M)[k] = s * g * c, of(COS_M)[k] = co * g * c;
          *a += after - g * c * (co * pulled.im + s * pulled.re);
          total[k] += c * force;
        });
      });
    }
    block.each([&](int thread) {
      over_oscillators(block, layout, thread, [&](int64_t row, int64_t i, int64_t k) {
        of_gain[row * pitch + i] = total[k];
        if (!L) return;
        const T* const slots = memory + layout.slot(0, 0, KINDS);
        const int64_t apart = layout.rows * H;
        const Complex<T> pushed = multiply(push, slots + SIN_M * apart + k - i, slots + COS_M * apart + k - i, i, H, pitch);
        adjoints[row * (L + 1) * pitch + i] += slots[SIN * apart + k] * pushed.re + slots[COS * apart + k] * pushed.im;
      });
    });
  }
};

}  // namespace

// Forward, pull[j][i] = P_ij; backward, pull[j][i] = W_ij, push[i][k] = W_ik, gain g (pitch), of_gain (B, pitch); free is null in the lattice.
// Behind H nothing is written.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t kuramoto_scan_##NAME(                                                                                                    \
      T* phases, const T* pull, int64_t B, int64_t L, int64_t H, int64_t pitch, int64_t mesh, int64_t stream) {                           \
    const Layout layout(B, H);                                                                                                            \
    const int64_t bytes = 2 * Forward<T>::KINDS * layout.rows * H * sizeof(T);                                                            \
    return launch(Forward<T>{layout, phases, pull, L, pitch, mesh != 0}, layout.blocks(), layout.threads(), bytes, stream);               \
  }                                                                                                                                       \
  EXPORT int64_t kuramoto_scan_backward_##NAME(                                                                                           \
      T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_gain, T* free, int64_t B, int64_t L, int64_t H,    \
      int64_t pitch, int64_t stream) {                                                                                                    \
    const Layout layout(B, H);                                                                                                            \
    const int64_t bytes = (2 * Backward<T>::KINDS + 1) * layout.rows * H * sizeof(T);                                                     \
    return launch(                                                                                                                        \
        Backward<T>{layout, adjoints, phases, pull, push, gain, of_gain, free, L, pitch}, layout.blocks(), layout.threads(), bytes,       \
        stream);                                                                                                                          \
  }

DEFINE(float32, float)
DEFINE(float64, double)
