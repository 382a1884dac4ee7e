// Cauchy sums at the roots of unity, over both of each pair of conjugates, for R numerators at once.
//
//   Q[h, r, k] = sum_n v / (i s - c w) + conj(v) / (i s - c conj(w)),   s = sin(pi k / L), c = cos(pi k / L), k = 0 .. L / 2
//              = sum_n (i s a - c b) / (e + i f),   a = 2 Re v,  b = 2 Re(v conj(w)),  e = (c |w|)^2 - s^2,  f = -2 s c Re w
//
// w (H, N), v (H, R, N), Q (H, R, K = L / 2 + 1) complex, stored re im; Re w < 0. Forward a thread is a point k of one h, and the block fetches
// POLES poles at a time into shared memory; backward a block is one pole, its threads share the points. NUMERATORS pass together and share the
// division, which limits both. e is taken as a product, exact where |w| is near s / c: there the sum has its peak.
#include "numbers.h"
#include "sums.h"

namespace {

constexpr int THREADS = 128, POLES = 32, NUMERATORS = 4;

template <class T> struct Point { T s, c; };
template <class T> ANYWHERE Point<T> point(int64_t k, int64_t L) {
  const Complex<double> turned = half_turns(double(k) / double(L));
  return {T(turned.im), 2 * k == L ? T(0) : T(turned.re)};
}

// 1 / (e + i f) = E - i F
template <class T> struct Reciprocal {
  T E, F;
  ANYWHERE Reciprocal(Point<T> at, T size, T re) {
    const T near = at.c * size, e = (near - at.s) * (near + at.s), f = at.s * at.c * (-2 * re), inverse = T(1) / (e * e + f * f);
    E = e * inverse, F = f * inverse;
  }
};

template <class T> ANYWHERE T length(Complex<T> w) { return T(hypot(double(w.re), double(w.im))); }
template <class T> ANYWHERE T in_step(Complex<T> v, Complex<T> w) { return T(2 * (double(v.re) * w.re + double(v.im) * w.im)); }

template <class T> struct Sizes {
  int64_t H, N, R, L;
  ANYWHERE int64_t K() const { return L / 2 + 1; }
};

template <class T> struct Forward {
  static constexpr int THREADS = ::THREADS;
  const Complex<T>* RESTRICT w;
  const Complex<T>* RESTRICT v;
  Complex<T>* RESTRICT Q;
  Sizes<T> sizes;

  struct Memory { T size[POLES], re[POLES], a[NUMERATORS][POLES], b[NUMERATORS][POLES]; };
  struct Sums { T aE[NUMERATORS], aF[NUMERATORS], bE[NUMERATORS], bF[NUMERATORS]; };

  DEVICE void operator()(const Block& block) const {
    const int64_t N = sizes.N, R = sizes.R, K = sizes.K(), tiles = parts(K, THREADS), groups = parts(R, NUMERATORS);
    const int64_t k0 = block.index % tiles * THREADS, r0 = block.index / tiles % groups * NUMERATORS, h = block.index / tiles / groups;
    Memory& memory = *block.memory<Memory>();
    Local<Sums> sums(block);
    block.each([&](int thread) { sums[thread] = Sums{}; });
    for (int64_t n0 = 0; n0 < N; n0 += POLES) {
      const int count = int(smaller<int64_t>(POLES, N - n0));
      block.each([&](int thread) {  // the block has as many threads as there are numerators of POLES
        const int r = thread / POLES, n = thread % POLES;
        if (n >= count) return;
        const Complex<T> pole = w[h * N + n0 + n], numerator = r0 + r < R ? v[(h * R + r0 + r) * N + n0 + n] : Complex<T>{};
        memory.a[r][n] = 2 * numerator.re, memory.b[r][n] = in_step(numerator, pole);
        if (!r) memory.size[n] = length(pole), memory.re[n] = pole.re;
      });
      block.each([&](int thread) {
        if (k0 + thread >= K) return;
        const Point<T> at = point<T>(k0 + thread, sizes.L);
        Sums& sum = sums[thread];
        for (int n = 0; n < count; n++) {
          const Reciprocal<T> z(at, memory.size[n], memory.re[n]);
          UNROLL for (int r = 0; r < NUMERATORS; r++) {
            const T a = memory.a[r][n], b = memory.b[r][n];
            sum.aE[r] += z.E * a, sum.aF[r] += z.F * a, sum.bE[r] += z.E * b, sum.bF[r] += z.F * b;
          }
        }
      });
    }
    block.each([&](int thread) {
      if (k0 + thread >= K) return;
      const Point<T> at = point<T>(k0 + thread, sizes.L);
      const Sums& sum = sums[thread];
      UNROLL for (int r = 0; r < NUMERATORS; r++)
        if (r0 + r < R)
          Q[(h * R + r0 + r) * K + k0 + thread] = {at.s * sum.aF[r] - at.c * sum.bE[r], at.s * sum.aE[r] + at.c * sum.bF[r]};
    });
  }
};

static_assert(THREADS == POLES * NUMERATORS, "a thread fetches a numerator of a pole");

template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  const Complex<T>* RESTRICT w;
  const Complex<T>* RESTRICT v;
  const Complex<T>* RESTRICT g;
  Complex<T>* RESTRICT gw;
  Complex<T>* RESTRICT gv;
  Sizes<T> sizes;

  struct Sums {  // the gradients of a, b of each numerator, of |w|^2 and of Re w
    T a[NUMERATORS], b[NUMERATORS], square, re;
    DEVICE Sums operator+(const Sums& other) const {
      Sums sum = *this;
      UNROLL for (int r = 0; r < NUMERATORS; r++) sum.a[r] += other.a[r], sum.b[r] += other.b[r];
      sum.square += other.square, sum.re += other.re;
      return sum;
    }
  };

  DEVICE void operator()(const Block& block) const {
    const int64_t N = sizes.N, R = sizes.R, h = block.index / N, n = block.index % N;
    Sums* const sums = block.memory<Sums>();
    Local<Complex<T>> of_w(block);  // of thread 0
    block.each([&](int thread) { of_w[thread] = {}; });
    for (int64_t r0 = 0; r0 < R; r0 += NUMERATORS) {
      block.each([&](int thread) { sums[thread] = share(h, n, r0, thread); });
      add_up(block, sums);
      block.each([&](int thread) {
        if (thread) return;
        const Complex<T> pole = w[h * N + n];
        Complex<T>& total = of_w[0];
        total.re += 2 * sums[0].square * pole.re - 2 * sums[0].re, total.im += 2 * sums[0].square * pole.im;
        for (int r = 0; r < NUMERATORS && r0 + r < R; r++) {
          const int64_t at = (h * R + r0 + r) * N + n;
          const T a = sums[0].a[r], b = sums[0].b[r];
          total.re += 2 * b * v[at].re, total.im += 2 * b * v[at].im;
          gv[at] = {2 * (a + b * pole.re), 2 * b * pole.im};
        }
      });
    }
    block.each([&](int thread) {
      if (!thread) gw[h * N + n] = of_w[0];
    });
  }

  // A thread's points. With S = sum_r conj(g) (i s a - c b) the loss moves by Re(S dZ), and dZ = -Z^2 (de + i df).
  DEVICE Sums share(int64_t h, int64_t n, int64_t r0, int thread) const {
    const int64_t N = sizes.N, R = sizes.R, K = sizes.K();
    const Complex<T> pole = w[h * N + n];
    const T size = length(pole);
    T a[NUMERATORS], b[NUMERATORS];
    UNROLL for (int r = 0; r < NUMERATORS; r++) {
      const Complex<T> numerator = r0 + r < R ? v[(h * R + r0 + r) * N + n] : Complex<T>{};
      a[r] = 2 * numerator.re, b[r] = in_step(numerator, pole);
    }
    Sums sum{};
    for (int64_t k = thread; k < K; k += THREADS) {
      const Point<T> at = point<T>(k, sizes.L);
      const Reciprocal<T> z(at, size, pole.re);
      const T sE = at.s * z.E, sF = at.s * z.F, cE = at.c * z.E, cF = at.c * z.F;
      Complex<T> ag{}, bg{};
      UNROLL for (int r = 0; r < NUMERATORS; r++) {
        const Complex<T> now = r0 + r < R ? g[(h * R + r0 + r) * K + k] : Complex<T>{};
        sum.a[r] += now.re * sF + now.im * sE, sum.b[r] += now.im * cF - now.re * cE;
        ag.re += now.re * a[r], ag.im += now.im * a[r], bg.re += now.re * b[r], bg.im += now.im * b[r];
      }
      const T S_re = at.s * ag.im - at.c * bg.re, S_im = at.s * ag.re + at.c * bg.im;
      const T Z_re = z.E * z.E - z.F * z.F, Z_im = T(-2) * z.E * z.F;
      sum.square += at.c * at.c * (S_im * Z_im - S_re * Z_re);
      sum.re += at.s * at.c * (S_re * Z_im + S_im * Z_re);
    }
    return sum;
  }
};

template <class T> const Complex<T>* in(const T* p) { return reinterpret_cast<const Complex<T>*>(p); }
template <class T> Complex<T>* to(T* p) { return reinterpret_cast<Complex<T>*>(p); }

template <class T> int64_t forward(const T* w, const T* v, T* Q, const Sizes<T>& sizes, int64_t stream) {
  const int64_t blocks = sizes.H * parts(sizes.K(), THREADS) * parts(sizes.R, NUMERATORS);
  return launch(Forward<T>{in(w), in(v), to(Q), sizes}, blocks, THREADS, sizeof(typename Forward<T>::Memory), stream);
}

template <class T> int64_t backward(const T* w, const T* v, const T* g, T* gw, T* gv, const Sizes<T>& sizes, int64_t stream) {
  const int64_t bytes = THREADS * sizeof(typename Backward<T>::Sums);
  return launch(Backward<T>{in(w), in(v), in(g), to(gw), to(gv), sizes}, sizes.H * sizes.N, THREADS, bytes, stream);
}

}  // namespace

#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t cauchy_kernel_##NAME(const T* w, const T* v, T* Q, int64_t H, int64_t N, int64_t R, int64_t L, int64_t stream) {         \
    return forward<T>(w, v, Q, {H, N, R, L}, stream);                                                                                     \
  }                                                                                                                                       \
  EXPORT int64_t cauchy_kernel_backward_##NAME(                                                                                           \
      const T* w, const T* v, const T* g, T* gw, T* gv, int64_t H, int64_t N, int64_t R, int64_t L, int64_t stream) {                     \
    return backward<T>(w, v, g, gw, gv, {H, N, R, L}, stream);                                                                            \
  }

DEFINE(float32, float)
DEFINE(float64, double)
