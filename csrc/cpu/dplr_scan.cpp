// A recurrence whose matrix is diagonal plus low rank.      h_t = h_{t-1} + d h_{t-1} - sum_j right_j s_j + b u_t,   y_t = 2 Re(C . h_t)
//                                                           s_j = 2 Re(left_j . h_{t-1})
//
// u, y (B, L, D), h0, last (B, D, N, 2), d, b, C (D, N, 2), right, left (R, D, N, 2), ends (B): how many tokens of a row are real. Complex
// numbers are stored re im. A task walks one row and one tile of WIDTH channels through time; their states are vectors [n][re, im] in the
// cache. The backward pass keeps the state at the beginning of each chunk of CHUNK steps and recomputes those inside a chunk from it.
#include <algorithm>
#include <new>

#include "simd.h"

namespace {

constexpr int64_t CHUNK = 32;

template <class T> struct Vectors {  // aligned
  Vector<T>* data;
  static constexpr std::align_val_t BORDER{sizeof(Vector<T>)};
  explicit Vectors(int64_t n) : data(static_cast<Vector<T>*>(::operator new(n * sizeof(Vector<T>), BORDER))) {
    std::fill(data, data + n, Vector<T>{});
  }
  ~Vectors() { ::operator delete(data, BORDER); }
  Vectors(const Vectors&) = delete;
  operator Vector<T>*() const { return data; }
};

// (channels, S) to the vectors of one tile, and back: tile[i] holds number i of the channels side by side.
template <class T> void gather(const T* p, Vector<T>* tile, int64_t S, int64_t lanes) {
  for (int64_t i = 0; i < S; i++)
    for (int64_t lane = 0; lane < lanes; lane++) tile[i][lane] = p[lane * S + i];
}
template <class T> void scatter(T* p, const Vector<T>* tile, int64_t S, int64_t lanes) {
  for (int64_t i = 0; i < S; i++)
    for (int64_t lane = 0; lane < lanes; lane++) p[lane * S + i] = tile[i][lane];
}

template <class T> struct System {  // the matrices of a tile, S = 2 N vectors each
  int64_t S, R;
  Vectors<T> d, b, C, right, left;
  System(const T* d_, const T* right_, const T* left_, const T* b_, const T* C_, int64_t at, int64_t lanes, int64_t D, int64_t N, int64_t R)
      : S(2 * N), R(R), d(S), b(S), C(S), right(R * S), left(R * S) {
    gather(d_ + at * S, d.data, S, lanes), gather(b_ + at * S, b.data, S, lanes), gather(C_ + at * S, C.data, S, lanes);
    for (int64_t j = 0; j < R; j++) {
      gather(right_ + (j * D + at) * S, right + j * S, S, lanes), gather(left_ + (j * D + at) * S, left + j * S, S, lanes);
    }
  }
  void dots(const Vector<T>* h, Vector<T>* s) const {
    for (int64_t j = 0; j < R; j++) {
      Vector<T> re{}, im{};
      for (int64_t i = 0; i < S; i += 2) re += left[j * S + i] * h[i], im += left[j * S + i + 1] * h[i + 1];
      s[j] = T(2) * (re - im);
    }
  }
};

// From h to `next`, which may be h itself; s: the dots of h, afterwards those of next. Returns y.
template <class T> INLINE Vector<T> step(const System<T>& A, const Vector<T>* h, Vector<T>* next, Vector<T> u, Vector<T>* s) {
  Vector<T> y_re{}, y_im{}, s_re{}, s_im{};
  const Vector<T> s0 = s[0];
  const Vector<T> *d = A.d, *b = A.b, *C = A.C, *right = A.right, *left = A.left;
  for (int64_t i = 0; i < A.S; i += 2) {
    const Vector<T> re = h[i], im = h[i + 1];
    Vector<T> more_re = d[i] * re - d[i + 1] * im + b[i] * u, more_im = d[i] * im + d[i + 1] * re + b[i + 1] * u;
    more_re -= right[i] * s0, more_im -= right[i + 1] * s0;
    for (int64_t j = 1; j < A.R; j++) more_re -= right[j * A.S + i] * s[j], more_im -= right[j * A.S + i + 1] * s[j];
    const Vector<T> to_re = re + more_re, to_im = im + more_im;
    next[i] = to_re, next[i + 1] = to_im;
    y_re += C[i] * to_re, y_im += C[i + 1] * to_im;
    s_re += left[i] * to_re, s_im += left[i + 1] * to_im;
  }
  if (A.R == 1)
    s[0] = T(2) * (s_re - s_im);
  else
    A.dots(next, s);
  return T(2) * (y_re - y_im);
}

template <class T>
void forward(const System<T>& A, const T* u, const T* h0, T* y, T* last, int64_t end, int64_t L, int64_t D, int64_t lanes) {
  const FlushTiny flush;
  Vectors<T> h(A.S), s(A.R);
  gather(h0, h.data, A.S, lanes);
  A.dots(h, s);
  for (int64_t t = 0; t < end; t++) store(y + t * D, step<T>(A, h, h, load(u + t * D, lanes), s), lanes);
  for (int64_t t = end; t < L; t++) store(y + t * D, Vector<T>{}, lanes);
  scatter(last, h.data, A.S, lanes);
}

template <class T> struct Gradients {  // of the matrices of a tile, in one row
  Vectors<T> d, right, left, b, C;
  Gradients(int64_t S, int64_t R) : d(S), right(R * S), left(R * S), b(S), C(S) {}
};

// One step back: g, the gradient of the state after the step, becomes that of h, the state before it, whose dots are s.
template <class T>
INLINE Vector<T> step_back(
    const System<T>& A, Gradients<T>& to, Vector<T>* g, const Vector<T>* h, const Vector<T>* after, const Vector<T>* s, Vector<T>* q,
    Vector<T> u, Vector<T> gy) {
  const int64_t S = A.S;
  const Vector<T> twice = T(2) * gy;
  Vector<T> gu_re{}, gu_im{}, q_re{}, q_im{};
  const Vector<T> *d = A.d, *b = A.b, *C = A.C, *right = A.right, *left = A.left;
  Vector<T> *to_d = to.d, *to_b = to.b, *to_C = to.C, *to_right = to.right, *to_left = to.left;
  for (int64_t i = 0; i < S; i += 2) {
    const Vector<T> re = g[i] + twice * C[i], im = g[i + 1] - twice * C[i + 1];
    g[i] = re, g[i + 1] = im;
    to_C[i] += twice * after[i], to_C[i + 1] -= twice * after[i + 1];
    to_b[i] += u * re, to_b[i + 1] += u * im;
    gu_re += b[i] * re, gu_im += b[i + 1] * im;
    q_re += right[i] * re, q_im += right[i + 1] * im;
  }
  q[0] = T(-2) * (q_re + q_im);  // twice the gradient of s
  for (int64_t j = 1; j < A.R; j++) {
    Vector<T> sum{};
    for (int64_t i = 0; i < S; i++) sum += right[j * S + i] * g[i];
    q[j] = T(-2) * sum;
  }
  for (int64_t i = 0; i < S; i += 2) {
    const Vector<T> g_re = g[i], g_im = g[i + 1], h_re = h[i], h_im = h[i + 1];
    to_d[i] += g_re * h_re + g_im * h_im, to_d[i + 1] += g_im * h_re - g_re * h_im;
    Vector<T> more_re = d[i] * g_re + d[i + 1] * g_im, more_im = d[i] * g_im - d[i + 1] * g_re;
    for (int64_t j = 0; j < A.R; j++) {
      const int64_t at = j * S + i;
      to_right[at] -= s[j] * g_re, to_right[at + 1] -= s[j] * g_im;
      to_left[at] += q[j] * h_re, to_left[at + 1] -= q[j] * h_im;
      more_re += q[j] * left[at], more_im -= q[j] * left[at + 1];
    }
    g[i] = g_re + more_re, g[i + 1] = g_im + more_im;
  }
  return gu_re + gu_im;
}

template <class T>
void backward(
    const System<T>& A, Gradients<T>& to, const T* gy, const T* glast, const T* u, const T* h0, T* gu, T* gh0, int64_t end, int64_t L,
    int64_t D, int64_t lanes) {
  const FlushTiny flush;
  const int64_t S = A.S, R = A.R, chunks = (end + CHUNK - 1) / CHUNK;
  Vectors<T> starts((chunks + 1) * S), states((CHUNK + 1) * S), dots((CHUNK + 1) * R), g(S), q(R);
  gather(h0, starts.data, S, lanes);
  for (int64_t chunk = 0; chunk + 1 < chunks; chunk++) {
    const Vector<T>* h = starts + chunk * S;
    Vector<T>* next = starts + (chunk + 1) * S;
    A.dots(h, dots);
    for (int64_t t = chunk * CHUNK; t < (chunk + 1) * CHUNK; t++, h = next) step<T>(A, h, next, load(u + t * D, lanes), dots);
  }
  gather(glast, g.data, S, lanes);
  for (int64_t t = end; t < L; t++) store(gu + t * D, Vector<T>{}, lanes);
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t first = chunk * CHUNK, steps = std::min(CHUNK, end - first);
    std::copy(starts + chunk * S, starts + (chunk + 1) * S, states.data);
    A.dots(states, dots);
    for (int64_t t = 0; t < steps; t++) {
      std::copy(dots + t * R, dots + (t + 1) * R, dots + (t + 1) * R);
      step<T>(A, states + t * S, states + (t + 1) * S, load(u + (first + t) * D, lanes), dots + (t + 1) * R);
    }
    for (int64_t t = steps - 1; t >= 0; t--) {
      const int64_t at = (first + t) * D;
      const Vector<T> back = step_back<T>(
          A, to, g, states + t * S, states + (t + 1) * S, dots + t * R, q, load(u + at, lanes), load(gy + at, lanes));
      store(gu + at, back, lanes);
    }
  }
  scatter(gh0, g.data, S, lanes);
}

template <class T> struct Call {  // what both passes take
  const T *u, *h0, *d, *right, *left, *b, *C, *ends;
  int64_t B, L, D, N, R, threads;

  template <class F> void tasks(F f) const {  // f(system, row, tokens: where its tile begins in u, state: in h0, lanes)
    const int64_t tiles = (D + WIDTH<T> - 1) / WIDTH<T>;
    const int team = team_for(threads, B * tiles);
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t task = 0; task < B * tiles; task++) {
      const int64_t row = task / tiles, at = task % tiles * WIDTH<T>, lanes = std::min(WIDTH<T>, D - at);
      f(System<T>(d, right, left, b, C, at, lanes, D, N, R), row, row * L * D + at, (row * D + at) * 2 * N, at, lanes);
    }
  }
};

template <class T> void forward(const Call<T>& call, T* y, T* last) {
  call.tasks([&](const System<T>& A, int64_t row, int64_t tokens, int64_t state, int64_t, int64_t lanes) {
    forward<T>(A, call.u + tokens, call.h0 + state, y + tokens, last + state, int64_t(call.ends[row]), call.L, call.D, lanes);
  });
}

template <class T>
void backward(const Call<T>& call, const T* gy, const T* glast, T* gu, T* gh0, T* gd, T* gright, T* gleft, T* gb, T* gC) {
  call.tasks([&](const System<T>& A, int64_t row, int64_t tokens, int64_t state, int64_t at, int64_t lanes) {
    Gradients<T> to(A.S, A.R);
    backward<T>(
        A, to, gy + tokens, glast + state, call.u + tokens, call.h0 + state, gu + tokens, gh0 + state, int64_t(call.ends[row]), call.L,
        call.D, lanes);
    scatter(gd + state, to.d.data, A.S, lanes), scatter(gb + state, to.b.data, A.S, lanes), scatter(gC + state, to.C.data, A.S, lanes);
    for (int64_t j = 0; j < A.R; j++) {
      const int64_t low = ((row * A.R + j) * call.D + at) * A.S;
      scatter(gright + low, to.right + j * A.S, A.S, lanes), scatter(gleft + low, to.left + j * A.S, A.S, lanes);
    }
  });
}

}  // namespace

// Of each row come gd, gright, gleft, gb and gC; the caller adds them up. starts is null: a task keeps the states of its own tile.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void dplr_scan_##NAME(                                                                                                           \
      const T* u, const T* h0, const T* d, const T* right, const T* left, const T* b, const T* C, const T* ends, T* y, T* last, int64_t B, \
      int64_t L, int64_t D, int64_t N, int64_t R, int64_t threads) {                                                                      \
    forward<T>({u, h0, d, right, left, b, C, ends, B, L, D, N, R, threads}, y, last);                                                     \
  }                                                                                                                                       \
  EXPORT void dplr_scan_backward_##NAME(                                                                                                  \
      const T* gy, const T* glast, const T* u, const T* h0, const T* d, const T* right, const T* left, const T* b, const T* C,            \
      const T* ends, T* starts, T* gu, T* gh0, T* gd, T* gright, T* gleft, T* gb, T* gC, int64_t B, int64_t L, int64_t D, int64_t N,      \
      int64_t R, int64_t threads) {                                                                                                       \
    backward<T>({u, h0, d, right, left, b, C, ends, B, L, D, N, R, threads}, gy, glast, gu, gh0, gd, gright, gleft, gb, gC);              \
  }

DEFINE(float32, float)
DEFINE(float64, double)
