// Coupled oscillators over time.      theta_{t+1} = wrap(theta_t + free_t + cos theta_t * (P sin theta_t) - sin theta_t * (P cos theta_t))
//
// phases (B, L + 1, pitch); free_t = dt (u_t + omega) stands in phases[:, t + 1] when the forward pass begins, theta_0 in phases[:, 0].
// P_ij = dt kappa_i W_ij comes transposed: pull[j][i]. Every row has `pitch` numbers, H rounded up to whole vectors, with zeros behind.
// A step of one row is a chain of dependent operations, so ROWS rows are walked side by side.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t ROWS = 4;
constexpr double TWO_PI = 6.283185307179586476925;

// The rows of one task, each `pitch` numbers.
template <class T> struct Rows {
  std::vector<T> data;
  int64_t pitch;
  explicit Rows(int64_t pitch) : data(ROWS * pitch), pitch(pitch) {}
  T* operator[](int64_t r) { return data.data() + r * pitch; }
};

// y[r] = M x[r] for ROWS rows, one vector of y from lane i: M comes by columns.
template <class T> INLINE void multiply(const T* columns, Rows<T>& x, int64_t H, int64_t pitch, int64_t i, Vector<T>* y) {
  for (int64_t r = 0; r < ROWS; r++) y[r] = Vector<T>{};
  for (int64_t j = 0; j < H; j++) {
    const Vector<T> column = load(columns + j * pitch + i);
    for (int64_t r = 0; r < ROWS; r++) y[r] += column * x[r][j];
  }
}

template <class T> void forward(T* phases, const T* pull, int64_t rows, int64_t L, int64_t H, int64_t pitch) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t row = (L + 1) * pitch;
  Rows<T> sin(pitch), cos(pitch);
  for (int64_t t = 0; t < L; t++) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < H; i += W) {
        const Wave<T> w = wave(load(phases + r * row + t * pitch + i));
        store(sin[r] + i, w.sin);
        store(cos[r] + i, w.cos);
      }
    for (int64_t i = 0; i < H; i += W) {
      Vector<T> of_sin[ROWS], of_cos[ROWS];
      multiply(pull, sin, H, pitch, i, of_sin);
      multiply(pull, cos, H, pitch, i, of_cos);
      for (int64_t r = 0; r < rows; r++) {
        T* now = phases + r * row + t * pitch + i;
        Vector<T> next = load(now) + load(now + pitch) + load(cos[r] + i) * of_sin[r] - load(sin[r] + i) * of_cos[r];
        next -= floored<T>(next * T(1 / TWO_PI)) * T(TWO_PI);
        store(now + pitch, next);
      }
    }
  }
}

// adjoints, like phases, hold the gradient of the phases and become that of all that follows from them; with gain = dt kappa:
//   a_t += keep_t a_{t+1} + sin_t * P^T(sin_t a_{t+1}) + cos_t * P^T(cos_t a_{t+1}),   keep = 1 - gain (cos * W cos + sin * W sin)
// of_kappa collects a_{t+1} * (cos * W sin - sin * W cos), the gradient of gain.
template <class T>
void backward(
    T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_kappa, int64_t rows, int64_t L, int64_t H, int64_t pitch) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t row = (L + 1) * pitch;
  Rows<T> sin(pitch), cos(pitch), later_sin(pitch), later_cos(pitch), total(pitch);
  for (int64_t t = L - 1; t >= 0; t--) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < H; i += W) {
        const Wave<T> w = wave(load(phases + r * row + t * pitch + i));
        const Vector<T> later = load(adjoints + r * row + (t + 1) * pitch + i);
        store(sin[r] + i, w.sin);
        store(cos[r] + i, w.cos);
        store(later_sin[r] + i, w.sin * later);
        store(later_cos[r] + i, w.cos * later);
      }
    for (int64_t i = 0; i < H; i += W) {
      Vector<T> of_sin[ROWS], of_cos[ROWS], back_sin[ROWS], back_cos[ROWS];
      multiply(pull, sin, H, pitch, i, of_sin);
      multiply(pull, cos, H, pitch, i, of_cos);
      multiply(push, later_sin, H, pitch, i, back_sin);
      multiply(push, later_cos, H, pitch, i, back_cos);
      for (int64_t r = 0; r < rows; r++) {
        T* now = adjoints + r * row + t * pitch + i;
        const Vector<T> s = load(sin[r] + i), c = load(cos[r] + i), later = load(now + pitch);
        const Vector<T> keep = T(1) - load(gain + i) * (c * of_cos[r] + s * of_sin[r]);
        store(now, load(now) + keep * later + s * back_sin[r] + c * back_cos[r]);
        store(total[r] + i, load(total[r] + i) + later * (c * of_sin[r] - s * of_cos[r]));
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) std::copy_n(total[r], pitch, of_kappa + r * pitch);
}

template <class F> void over_rows(int64_t B, int64_t threads, F f) {
  const int team = team_for(threads, (B + ROWS - 1) / ROWS);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t b = 0; b < B; b += ROWS) f(b, std::min(ROWS, B - b));
}

}  // namespace

// Forward, pull[j][i] = P_ij; backward, pull[j][i] = W_ij, push[i][k] = P_ik, gain
// (pitch), of_kappa (B, pitch).
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void kuramoto_scan_##NAME(T* phases, const T* pull, int64_t B, int64_t L, int64_t H, int64_t pitch, int64_t threads) {           \
    over_rows(B, threads, [=](int64_t b, int64_t rows) { forward(phases + b * (L + 1) * pitch, pull, rows, L, H, pitch); });                  \
  }                                                                                                                                       \
  EXPORT void kuramoto_scan_backward_##NAME(                                                                                              \
      T* adjoints, const T* phases, const T* pull, const T* push, const T* gain, T* of_kappa, int64_t B, int64_t L, int64_t H,            \
      int64_t pitch, int64_t threads) {                                                                                                   \
    over_rows(B, threads, [=](int64_t b, int64_t rows) {                                                                                  \
      const int64_t at = b * (L + 1) * pitch;                                                                                                 \
      backward(adjoints + at, phases + at, pull, push, gain, of_kappa + b * pitch, rows, L, H, pitch);                                              \
    });                                                                                                                                   \
  }

DEFINE(float32, float)
DEFINE(float64, double)
