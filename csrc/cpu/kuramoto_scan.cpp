// Coupled oscillators over time.      theta_{t+1} = wrap(theta_t + step_t),      g_i F_i = cos theta_i (P sin theta)_i - sin theta_i (P cos theta)_i
//
//   lattice   step = free + g F,                        free = dt (u + omega), g = dt kappa
//   mesh      step = clip(free + tanh(g F), -pi, pi),   the same free, g = kappa
//
// phases (B, L + 1, pitch); free_t stands in phases[:, t + 1] when the forward pass begins, theta_0 in phases[:, 0]. P_ij = g_i W_ij comes
// transposed: pull[j][i]. Every row has `pitch` numbers, H rounded up to whole vectors, with zeros behind.
// A step of one row is a chain of dependent operations, so R rows are walked side by side: 4, or 1 where there is no other.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t ROWS = 4;
constexpr double PI = 3.141592653589793238463, TWO_PI = 2 * PI;

// Numbers of the rows of one task, each `pitch` of them.
template <class T, int64_t R> struct Rows {
  std::vector<T> data;
  int64_t pitch;
  explicit Rows(int64_t pitch) : data(R * pitch), pitch(pitch) {}
  T* operator[](int64_t r) { return data.data() + r * pitch; }
};

// y[r] = M x[r] for R rows, one vector of y from lane i: M comes by columns.
template <class T, int64_t R> INLINE void multiply(const T* columns, Rows<T, R>& x, int64_t H, int64_t pitch, int64_t i, Vector<T>* y) {
  for (int64_t r = 0; r < R; r++) y[r] = Vector<T>{};
  for (int64_t j = 0; j < H; j++) {
    const Vector<T> column = load(columns + j * pitch + i);
    for (int64_t r = 0; r < R; r++) y[r] += column * x[r][j];
  }
}

// To a few units of the largest value's last place; small results do not keep all their digits.
template <class T> INLINE Vector<T> tanh(Vector<T> x) {
  const Vector<T> e = exp2_decay((x < T(0) ? x : -x) * T(2.88539008177792681472)), y = (T(1) - e) / (T(1) + e);
  return x < T(0) ? -y : y;
}

template <class T, int64_t R, bool MESH> void forward(T* phases, const T* pull, int64_t rows, int64_t L, int64_t H, int64_t pitch) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t row = (L + 1) * pitch;
  Rows<T, R> sin(pitch), cos(pitch);
  for (int64_t t = 0; t < L; t++) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < H; i += W) {
        const Wave<T> w = wave(load(phases + r * row + t * pitch + i));
        store(sin[r] + i, w.sin);
        store(cos[r] + i, w.cos);
      }
    for (int64_t i = 0; i < H; i += W) {
      Vector<T> of_sin[R], of_cos[R];
      multiply<T, R>(pull, sin, H, pitch, i, of_sin);
      multiply<T, R>(pull, cos, H, pitch, i, of_cos);
      for (int64_t r = 0; r < rows; r++) {
        T* now = phases + r * row + t * pitch + i;
        const Vector<T> pulled = load(cos[r] + i) * of_sin[r] - load(sin[r] + i) * of_cos[r];
        Vector<T> step = load(now + pitch) + (MESH ? tanh<T>(pulled) : pulled);
        if (MESH) step = step > T(PI) ? splat(T(PI)) : step < T(-PI) ? splat(T(-PI)) : step;
        Vector<T> next = load(now) + step;
        next -= floored<T>(next * T(1 / TWO_PI)) * T(TWO_PI);
        store(now + pitch, next);
      }
    }
  }
}

// adjoints, like phases, hold the gradient of the phases and become that of all that follows from them. c is the gradient of g F, m = g c:
//   a_t += a_{t+1} - m (cos * W cos + sin * W sin) + sin * W^T(sin m) + cos * W^T(cos m)
// lattice: c = a_{t+1}. mesh: c = (1 - tanh^2) a_{t+1}, and both become 0 where the step was clipped; c takes the place of free_t (B, L, pitch).
// of_gain collects c F.
template <class T, int64_t R, bool MESH>
void backward(
    T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_gain, T* free, int64_t rows, int64_t L, int64_t H,
    int64_t pitch) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t row = (L + 1) * pitch;
  Rows<T, R> sin(pitch), cos(pitch), sin_m(pitch), cos_m(pitch), total(pitch);
  for (int64_t t = L - 1; t >= 0; t--) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < H; i += W) {
        const Wave<T> w = wave(load(phases + r * row + t * pitch + i));
        store(sin[r] + i, w.sin);
        store(cos[r] + i, w.cos);
      }
    for (int64_t i = 0; i < H; i += W) {
      Vector<T> of_sin[R], of_cos[R];
      multiply<T, R>(pull, sin, H, pitch, i, of_sin);
      multiply<T, R>(pull, cos, H, pitch, i, of_cos);
      for (int64_t r = 0; r < rows; r++) {
        T* now = adjoints + r * row + t * pitch + i;
        const Vector<T> s = load(sin[r] + i), co = load(cos[r] + i), g = load(gain + i), later = load(now + pitch);
        const Vector<T> force = co * of_sin[r] - s * of_cos[r];
        Vector<T> c = later;
        if (MESH) {
          T* place = free + (r * L + t) * pitch + i;
          const Vector<T> bent = tanh<T>(g * force), step = load(place) + bent;
          const Vector<T> passed = step > T(PI) ? Vector<T>{} : step < T(-PI) ? Vector<T>{} : later;
          c = (T(1) - bent * bent) * passed;
          store(place, c);
          store(now + pitch, passed);
        }
        const Vector<T> m = g * c;
        store(sin_m[r] + i, s * m);
        store(cos_m[r] + i, co * m);
        store(now, load(now) + later - m * (co * of_cos[r] + s * of_sin[r]));
        store(total[r] + i, load(total[r] + i) + c * force);
      }
    }
    for (int64_t i = 0; i < H; i += W) {
      Vector<T> back_sin[R], back_cos[R];
      multiply<T, R>(push, sin_m, H, pitch, i, back_sin);
      multiply<T, R>(push, cos_m, H, pitch, i, back_cos);
      for (int64_t r = 0; r < rows; r++) {
        T* now = adjoints + r * row + t * pitch + i;
        store(now, load(now) + load(sin[r] + i) * back_sin[r] + load(cos[r] + i) * back_cos[r]);
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) std::copy_n(total[r], pitch, of_gain + r * pitch);
}

// f(rows side by side, mesh or not, first row, rows): the first two as constants.
template <class F> void over_rows(int64_t B, bool mesh, int64_t threads, F f) {
  auto walk = [&](auto number, int64_t b, int64_t rows) {
    mesh ? f(number, std::true_type{}, b, rows) : f(number, std::false_type{}, b, rows);
  };
  const int team = team_for(threads, (B + ROWS - 1) / ROWS);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t b = 0; b < B; b += ROWS)
    if (B - b == 1)
      walk(std::integral_constant<int64_t, 1>{}, b, 1);
    else
      walk(std::integral_constant<int64_t, ROWS>{}, b, std::min(ROWS, B - b));
}

}  // namespace

// Forward, pull[j][i] = P_ij; backward, pull[j][i] = W_ij, push[i][k] = W_ik, gain g (pitch), of_gain (B, pitch); free is null in the lattice.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void kuramoto_scan_##NAME(T* phases, const T* pull, int64_t B, int64_t L, int64_t H, int64_t pitch, int64_t mesh, int64_t threads) { \
    over_rows(B, mesh, threads, [=](auto R, auto MESH, int64_t b, int64_t rows) {                                                           \
      forward<T, R.value, MESH.value>(phases + b * (L + 1) * pitch, pull, rows, L, H, pitch);                                               \
    });                                                                                                                                   \
  }                                                                                                                                       \
  EXPORT void kuramoto_scan_backward_##NAME(                                                                                              \
      T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_gain, T* free, int64_t B, int64_t L, int64_t H,     \
      int64_t pitch, int64_t threads) {                                                                                                   \
    over_rows(B, free, threads, [=](auto R, auto MESH, int64_t b, int64_t rows) {                                                           \
      const int64_t at = b * (L + 1) * pitch;                                                                                                 \
      backward<T, R.value, MESH.value>(                                                                                                     \
          adjoints + at, phases + at, pull, push, gain, of_gain + b * pitch, free + (MESH.value ? b * L * pitch : 0), rows, L, H, pitch); \
    });                                                                                                                                   \
  }

DEFINE(float32, float)
DEFINE(float64, double)
