// h_t = a_t h_{t-1} + x_t, per channel, real or complex.      x, h (B, L, D), h0 (B, D) or null; a (B, L, D), or (D) for all steps
//
// A thread walks one channel of one row; adjacent threads read adjacent channels, BATCH steps at a time so that as many reads are under
// way. What limits it is memory. Where there are few rows and channels, time is cut into spans and walked in three passes:
//     Ends   the spans side by side, each from zero: its last state, and the product of its decays
//     Carry  from span to span, the true last states
//     Walk   the spans again, from the true state behind the one before
// The results are also the workspace: the last two places of a span hold what `Ends` found, and `Walk` leaves the last one as `Carry` wrote
// it, because the next span reads it. D counts real numbers at the border (as on the CPU), numbers of type S inside.
#include "numbers.h"
#include "sums.h"

namespace {

constexpr int THREADS = 128, BATCH = 8;
constexpr int64_t ENOUGH = 1 << 16, SHORTEST = 32;  // threads that fill a GPU; steps of a span

// The recurrence as steps r = 0 .. L - 1 of one channel: forwards in time, or, for the gradient g_t = gh_t + conj(a_{t+1}) g_{t+1}, backwards.
template <class S, bool PER_STEP, bool BACK> struct Steps {
  const S* RESTRICT a;
  const S* RESTRICT x;  // h, or gh
  S* RESTRICT out;
  int64_t L, D, length;  // of a span

  DEVICE int64_t time(int64_t r) const { return BACK ? L - 1 - r : r; }
  DEVICE int64_t place(int64_t b, int64_t r, int64_t d) const { return (b * L + time(r)) * D + d; }
  DEVICE S decay(int64_t b, int64_t r, int64_t d) const {
    if (!PER_STEP) return BACK ? conjugate(a[d]) : a[d];
    if (!BACK) return a[place(b, r, d)];
    return r ? conjugate(a[place(b, r - 1, d)]) : S{};
  }
  // f(r, its place, the state after it) for the steps r0 .. r1 - 1
  template <class F> DEVICE S walk(int64_t b, int64_t d, int64_t r0, int64_t r1, S state, F f) const {
    for (int64_t r = r0; r < r1; r += BATCH) {
      S decays[BATCH], inputs[BATCH];
      UNROLL for (int i = 0; i < BATCH; i++)
        if (r + i < r1) decays[i] = decay(b, r + i, d), inputs[i] = x[place(b, r + i, d)];
      UNROLL for (int i = 0; i < BATCH; i++)
        if (r + i < r1) {
          state = decays[i] * state + inputs[i];
          f(r + i, place(b, r + i, d), state, decays[i]);
        }
    }
    return state;
  }
};

// The thread's span, row and channel: channels of a row side by side, then the spans, then the rows.
struct Place { int64_t b, span, d; };
DEVICE bool find(const Block& block, int thread, int64_t spans, int64_t D, Place& at) {
  const int64_t tiles = parts(D, THREADS), rest = block.index / tiles;
  at = {rest / spans, rest % spans, block.index % tiles * THREADS + thread};
  return at.d < D;
}

template <class S, bool PER_STEP, bool BACK> struct Ends {
  static constexpr int THREADS = ::THREADS;
  Steps<S, PER_STEP, BACK> steps;
  int64_t spans;  // all but the last one

  DEVICE void operator()(const Block& block) const {
    block.each([&](int thread) {
      Place at;
      if (!find(block, thread, spans, steps.D, at)) return;
      const int64_t r0 = at.span * steps.length, r1 = r0 + steps.length;
      S product = One<S>::value();
      const S end = steps.walk(at.b, at.d, r0, r1, S{}, [&](int64_t, int64_t, S, S decay) { product = product * decay; });
      steps.out[steps.place(at.b, r1 - 2, at.d)] = product;
      steps.out[steps.place(at.b, r1 - 1, at.d)] = end;
    });
  }
};

template <class S, bool PER_STEP, bool BACK> struct Carry {
  static constexpr int THREADS = ::THREADS;
  Steps<S, PER_STEP, BACK> steps;
  const S* start;  // h0, or null
  int64_t spans;   // all but the last one

  DEVICE void operator()(const Block& block) const {
    block.each([&](int thread) {
      Place at;
      if (!find(block, thread, 1, steps.D, at)) return;
      S state = start ? start[at.b * steps.D + at.d] : S{};
      for (int64_t span = 0; span < spans; span++) {
        const int64_t r1 = (span + 1) * steps.length;
        S& end = steps.out[steps.place(at.b, r1 - 1, at.d)];
        end = state = steps.out[steps.place(at.b, r1 - 2, at.d)] * state + end;
      }
    });
  }
};

// Backward it also writes the gradient of a per-step decay, g_t conj(h_{t-1}), and that of h0, conj(a_0) g_0.
template <class S, bool PER_STEP, bool BACK> struct Walk {
  static constexpr int THREADS = ::THREADS;
  Steps<S, PER_STEP, BACK> steps;
  const S* RESTRICT h0;  // or null
  const S* RESTRICT h;
  S* RESTRICT ga;
  S* RESTRICT gh0;  // or null
  int64_t spans;

  DEVICE S before(int64_t place, int64_t t, int64_t row) const { return t ? h[place - steps.D] : h0 ? h0[row] : S{}; }

  DEVICE void operator()(const Block& block) const {
    block.each([&](int thread) {
      Place at;
      if (!find(block, thread, spans, steps.D, at)) return;
      const bool last = at.span == spans - 1;
      const int64_t r0 = at.span * steps.length, r1 = last ? steps.L : r0 + steps.length, row = at.b * steps.D + at.d;
      const S start = at.span ? steps.out[steps.place(at.b, r0 - 1, at.d)] : !BACK && h0 ? h0[row] : S{};
      const S end = steps.walk(at.b, at.d, r0, r1, start, [&](int64_t r, int64_t place, S state, S) {
        if (last || r + 1 < r1) steps.out[place] = state;
        if (BACK && PER_STEP) ga[place] = state * conjugate(before(place, steps.time(r), row));
      });
      if (BACK && gh0 && last) gh0[row] = steps.L ? conjugate(steps.a[PER_STEP ? at.b * steps.L * steps.D + at.d : at.d]) * end : S{};
    });
  }
};

// Of a constant decay's gradient.
template <class S> struct OfDecay {
  const S* RESTRICT g;
  const S* RESTRICT h;
  const S* RESTRICT h0;  // or null
  int64_t L, D;
  DEVICE S operator()(int64_t b, int64_t t, int64_t d) const {
    const int64_t at = (b * L + t) * D + d;
    return g[at] * conjugate(t ? h[at - D] : h0 ? h0[b * D + d] : S{});
  }
};

template <class S, bool PER_STEP, bool BACK>
int64_t all(const S* a, const S* x, const S* h0, const S* h, S* out, S* ga, S* gh0, int64_t B, int64_t L, int64_t D, int64_t stream) {
  int64_t spans = larger<int64_t>(1, smaller(parts(ENOUGH, larger<int64_t>(1, B * D)), L / SHORTEST));
  const int64_t length = parts(L, spans), tiles = parts(D, THREADS);
  if (L) spans = parts(L, length);
  const Steps<S, PER_STEP, BACK> steps{a, x, out, L, D, length};
  if (spans > 1) {
    int64_t failed = launch(Ends<S, PER_STEP, BACK>{steps, spans - 1}, B * (spans - 1) * tiles, THREADS, 0, stream);
    if (!failed) failed = launch(Carry<S, PER_STEP, BACK>{steps, BACK ? nullptr : h0, spans - 1}, B * tiles, THREADS, 0, stream);
    if (failed) return failed;
  }
  return launch(Walk<S, PER_STEP, BACK>{steps, h0, h, ga, gh0, spans}, B * spans * tiles, THREADS, 0, stream);
}

template <class S>
int64_t forward(const S* a, const S* x, const S* h0, S* h, int64_t per_step, int64_t B, int64_t L, int64_t D, int64_t stream) {
  return (per_step ? all<S, true, false> : all<S, false, false>)(a, x, h0, nullptr, h, nullptr, nullptr, B, L, D, stream);
}

template <class S>
int64_t backward(
    const S* a, const S* h, const S* h0, const S* gh, S* gx, S* ga, S* gh0, int64_t per_step, int64_t B, int64_t L, int64_t D, int64_t stream) {
  const int64_t failed = (per_step ? all<S, true, true> : all<S, false, true>)(a, gh, h0, h, gx, ga, gh0, B, L, D, stream);
  return failed || per_step ? failed : sum_over_time(OfDecay<S>{gx, h, h0, L, D}, ga, B, L, D, stream);
}

template <class S, class T> const S* in(const T* p) { return reinterpret_cast<const S*>(p); }
template <class S, class T> S* to(T* p) { return reinterpret_cast<S*>(p); }

}  // namespace

// A constant decay's gradient comes out per row, ga (B, D); the caller adds the rows up.
#define DEFINE(NAME, T, S)                                                                                                                \
  EXPORT int64_t linear_recurrence_##NAME(                                                                                                \
      const T* a, const T* x, const T* h0, T* h, int64_t per_step, int64_t B, int64_t L, int64_t D, int64_t stream) {                     \
    return forward<S>(in<S>(a), in<S>(x), in<S>(h0), to<S>(h), per_step, B, L, D * sizeof(T) / sizeof(S), stream);                        \
  }                                                                                                                                       \
  EXPORT int64_t linear_recurrence_backward_##NAME(                                                                                       \
      const T* a, const T* h, const T* h0, const T* gh, T* gx, T* ga, T* gh0, int64_t per_step, int64_t B, int64_t L, int64_t D,          \
      int64_t stream) {                                                                                                                   \
    return backward<S>(                                                                                                                   \
        in<S>(a), in<S>(h), in<S>(h0), in<S>(gh), to<S>(gx), to<S>(ga), to<S>(gh0), per_step, B, L, D * sizeof(T) / sizeof(S), stream);   \
  }

DEFINE(float32, float, float)
DEFINE(float64, double, double)
DEFINE(complex64, float, Complex<float>)
DEFINE(complex128, double, Complex<double>)
