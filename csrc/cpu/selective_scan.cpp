// Mamba's selective scan (arXiv:2312.00752).      h_t = e^{dt_t A} h_{t-1} + (dt_t u_t) B_t,   y_t = C_t . h_t + D u_t
//
// u, dt, y (Bt, L, E), A (E, N), B, C (Bt, L, N), D (E), h0, last (Bt, E, N). A task walks one row and one tile of WIDTH channels through
// time with the N states of a tile in registers; (Bt, L, E, N) never exists. The forward pass keeps the state at the beginning of each
// chunk of CHUNK steps, the backward pass recomputes the states inside a chunk from it.
//
// The caller brings A times log2(e), so that e^{dt A} is 2^{dt A}.
#include <algorithm>
#include <new>

#include "simd.h"

namespace {

constexpr int64_t CHUNK = 16;

// (E, N) to the vectors of one tile: tile[n] holds state n of channels e .. e + lanes - 1.
template <class T> void gather(const T* p, Vector<T>* tile, int64_t N, int64_t lanes) {
  for (int64_t n = 0; n < N; n++) {
    tile[n] = Vector<T>{};
    for (int64_t i = 0; i < lanes; i++) tile[n][i] = p[i * N + n];
  }
}
template <class T> void scatter(T* p, const Vector<T>* tile, int64_t N, int64_t lanes) {
  for (int64_t n = 0; n < N; n++)
    for (int64_t i = 0; i < lanes; i++) p[i * N + n] = tile[n][i];
}

template <class T> struct Buffer {  // aligned, of vectors
  Vector<T>* data;
  static constexpr std::align_val_t BORDER{sizeof(Vector<T>)};
  explicit Buffer(int64_t n) : data(static_cast<Vector<T>*>(::operator new(n * sizeof(Vector<T>), BORDER))) {}
  ~Buffer() { ::operator delete(data, BORDER); }
  Buffer(const Buffer&) = delete;
  Vector<T>* operator+(int64_t i) const { return data + i; }
};

// NS states of one tile through all of time, added to what y holds unless these are the first ones. Inlined it takes 1.6 times as long.
template <class T, int NS, class Lanes>
__attribute__((noinline)) void forward(
    const T* u, const T* dt, const Vector<T>* A, const T* B, const T* C, const T* D, Vector<T>* state, T* y, T* starts, bool first, int64_t L,
    int64_t E, int64_t N, Lanes lanes) {
  Vector<T> h[NS], a[NS];
  for (int n = 0; n < NS; n++) h[n] = state[n], a[n] = A[n];
  const Vector<T> skip = load(D, lanes);
  for (int64_t t = 0; t < L; t++) {
    if (starts && t % CHUNK == 0)
      for (int n = 0; n < NS; n++) store(starts + (t / CHUNK * N + n) * WIDTH<T>, h[n]);
    const Vector<T> d = load(dt + t * E, lanes), x = load(u + t * E, lanes), dx = d * x;
    Vector<T> out = first ? skip * x : load(y + t * E, lanes);
    const T *b = B + t * N, *c = C + t * N;
#pragma GCC unroll 16
    for (int n = 0; n < NS; n++) {
      h[n] = exp2_decay(d * a[n]) * h[n] + dx * b[n];
      out += h[n] * c[n];
    }
    store(y + t * E, out, lanes);
  }
  for (int n = 0; n < NS; n++) state[n] = h[n];
}

template <class T>
void forward_all(
    const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* h0, T* y, T* last, T* starts, int64_t Bt, int64_t L,
    int64_t E, int64_t N, int64_t threads) {
  constexpr int64_t W = WIDTH<T>;
  const int64_t tiles = (E + W - 1) / W, chunks = (L + CHUNK - 1) / CHUNK;
  const int team = team_for(threads, Bt * tiles);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t task = 0; task < Bt * tiles; task++) {
    const FlushTiny flush;
    const int64_t row = task / tiles, e = task % tiles * W, lanes = std::min(W, E - e), at = row * L * E + e;
    Buffer<T> a(N), h(N);
    gather(A + e * N, a.data, N, lanes);
    if (h0)
      gather(h0 + (row * E + e) * N, h.data, N, lanes);
    else
      std::fill(h + 0, h + N, Vector<T>{});
    T* kept = starts ? starts + task * chunks * N * W : nullptr;
    auto states = [&](auto NS, int64_t n) {
      with_lanes<T>(lanes, [&](auto lanes) {
        forward<T, NS>(
            u + at, dt + at, a + n, B + row * L * N + n, C + row * L * N + n, D + e, h + n, y + at, kept ? kept + n * W : nullptr, n == 0, L, E, N,
            lanes);
      });
    };
    int64_t n = 0;
    for (; n + 16 <= N; n += 16) states(std::integral_constant<int, 16>{}, n);
    for (; n + 4 <= N; n += 4) states(std::integral_constant<int, 4>{}, n);
    for (; n < N; n++) states(std::integral_constant<int, 1>{}, n);
    scatter(last + (row * E + e) * N, h.data, N, lanes);
  }
}

// What the tiles of a chunk share: for each step N vectors that add up for B, and for C; and of one tile, what reaches its inputs.
template <class T> struct Sums {
  const int64_t N;
  Buffer<T> of_BC, of_x, of_dt;
  explicit Sums(int64_t N) : N(N), of_BC(CHUNK * 2 * N), of_x(CHUNK), of_dt(CHUNK) {}
  Vector<T>* of_B(int64_t t) const { return of_BC + t * 2 * N; }
  Vector<T>* of_C(int64_t t) const { return of_BC + t * 2 * N + N; }
};

// NS states of a tile, from state n0 on, through the `steps` steps of a chunk: forwards again from `start`, then back. `carried` is the
// gradient of the state behind the chunk, times its decay. of_x collects sum_n g_n B_n and of_dt sum_n of what reaches dt through the decay.
// Few states at a time, so that all of this stays in the innermost cache.
template <class T, int NS, class Lanes>
__attribute__((noinline)) void backward(
    const T* u, const T* dt, const Vector<T>* A, const T* B, const T* C, const T* gy, const T* start, const Sums<T>& sums, int64_t n0,
    Vector<T>* carried, Vector<T>* of_A, int64_t steps, int64_t E, int64_t N, Lanes lanes) {
  Vector<T> h[CHUNK + 1][NS], decay[CHUNK][NS], a[NS];
  for (int n = 0; n < NS; n++) h[0][n] = load(start + n * WIDTH<T>), a[n] = A[n];
  for (int64_t t = 0; t < steps; t++) {
    const Vector<T> d = load(dt + t * E, lanes), dx = d * load(u + t * E, lanes);
    const T* b = B + t * N;
#pragma GCC unroll 4
    for (int n = 0; n < NS; n++) {
      const Vector<T> q = exp2_decay(d * a[n]);
      decay[t][n] = q;
      h[t + 1][n] = q * h[t][n] + dx * b[n];
    }
  }
  Vector<T> g[NS], total[NS];
  for (int n = 0; n < NS; n++) g[n] = carried[n], total[n] = of_A[n];
  for (int64_t t = steps - 1; t >= 0; t--) {
    const Vector<T> d = load(dt + t * E, lanes), dx = d * load(u + t * E, lanes), out = load(gy + t * E, lanes);
    const T *b = B + t * N, *c = C + t * N;
    Vector<T>*of_B = sums.of_B(t) + n0, *of_C = sums.of_C(t) + n0;
    Vector<T> x = n0 ? *(sums.of_x + t) : Vector<T>{}, through = n0 ? *(sums.of_dt + t) : Vector<T>{};
#pragma GCC unroll 4
    for (int n = 0; n < NS; n++) {
      Vector<T> q = g[n] + out * c[n];  // the gradient of h_t
      of_C[n] += out * h[t + 1][n];
      of_B[n] += q * dx;
      x += q * b[n];
      q *= decay[t][n];
      g[n] = q;
      q *= h[t][n];
      through += q * a[n];
      total[n] += q * d;
    }
    *(sums.of_x + t) = x;
    *(sums.of_dt + t) = through;
  }
  for (int n = 0; n < NS; n++) carried[n] = g[n], of_A[n] = total[n];
}

// A task is a row and one of `splits` parts of its tiles: chunks from the last to the first, all tiles of the part in each, so that the
// sums over channels that B and C need are taken once per chunk. The parts do not depend on the number of threads: sums are bit-equal.
template <class T>
void backward_all(
    const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* starts, const T* gy, const T* glast, T* gu, T* gdt, T* gA,
    T* gB, T* gC, T* gD, T* gh0, int64_t splits, int64_t Bt, int64_t L, int64_t E, int64_t N, int64_t threads) {
  constexpr int64_t W = WIDTH<T>;
  constexpr T LN2 = T(0.69314718055994530942);
  const int64_t tiles = (E + W - 1) / W, chunks = (L + CHUNK - 1) / CHUNK;
  const int team = team_for(threads, Bt * splits);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t task = 0; task < Bt * splits; task++) {
    const FlushTiny flush;
    const int64_t row = task / splits, part = task % splits, first = tiles * part / splits, end = tiles * (part + 1) / splits;
    const int64_t count = (end - first) * N;
    Sums<T> sums(N);
    Buffer<T> a(count), carried(count), of_A(count), of_D(end - first);
    for (int64_t k = first; k < end; k++) {
      const int64_t e = k * W, lanes = std::min(W, E - e), i = (k - first) * N;
      gather(A + e * N, a + i, N, lanes);
      gather(glast + (row * E + e) * N, carried + i, N, lanes);
    }
    std::fill(of_A + 0, of_A + count, Vector<T>{});
    std::fill(of_D + 0, of_D + (end - first), Vector<T>{});
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
      const int64_t t0 = chunk * CHUNK, steps = std::min(CHUNK, L - t0);
      for (int64_t t = 0; t < CHUNK; t++) std::fill(sums.of_B(t), sums.of_B(t) + 2 * N, Vector<T>{});  // and of_C
      const T *b = B + (row * L + t0) * N, *c = C + (row * L + t0) * N;
      for (int64_t k = first; k < end; k++) {
        const int64_t e = k * W, lanes = std::min(W, E - e), at = (row * L + t0) * E + e, i = (k - first) * N;
        const T* start = starts + ((row * tiles + k) * chunks + chunk) * N * W;
        auto states = [&](auto NS, int64_t n) {
          with_lanes<T>(lanes, [&](auto lanes) {
            backward<T, NS>(
                u + at, dt + at, a + i + n, b + n, c + n, gy + at, start + n * W, sums, n, carried + i + n, of_A + i + n, steps, E, N, lanes);
          });
        };
        int64_t n = 0;
        for (; n + 4 <= N; n += 4) states(std::integral_constant<int, 4>{}, n);
        for (; n < N; n++) states(std::integral_constant<int, 1>{}, n);
        const Vector<T> skip = load(D + e, lanes);
        for (int64_t t = 0; t < steps; t++) {
          const Vector<T> d = load(dt + at + t * E, lanes), x = load(u + at + t * E, lanes), out = load(gy + at + t * E, lanes);
          store(gu + at + t * E, *(sums.of_x + t) * d + skip * out, lanes);
          store(gdt + at + t * E, *(sums.of_x + t) * x + *(sums.of_dt + t) * LN2, lanes);
          *(of_D + (k - first)) += out * x;
        }
      }
      T *sum_B = gB + ((part * Bt + row) * L + t0) * N, *sum_C = gC + ((part * Bt + row) * L + t0) * N;
      for (int64_t t = 0; t < steps; t++)
        for (int64_t n = 0; n < N; n++) sum_B[t * N + n] = sum<T>(sums.of_B(t)[n]), sum_C[t * N + n] = sum<T>(sums.of_C(t)[n]);
    }
    for (int64_t k = first; k < end; k++) {
      const int64_t e = k * W, lanes = std::min(W, E - e), i = (k - first) * N;
      scatter(gA + (row * E + e) * N, of_A + i, N, lanes);
      store(gD + row * E + e, *(of_D + (k - first)), lanes);
      if (gh0) scatter(gh0 + (row * E + e) * N, carried + i, N, lanes);
    }
  }
}

}  // namespace

// starts: null without gradients, else (Bt, tiles, chunks, N, WIDTH), at any address. N > 0. Per row come gA (Bt, E, N) and gD (Bt, E), per row and
// part gB and gC (splits, Bt, L, N); the caller adds them up. gA is the gradient of A itself, not of A log2(e).
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT void selective_scan_##NAME(                                                                                                      \
      const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* h0, T* y, T* last, T* starts, int64_t Bt,         \
      int64_t L, int64_t E, int64_t N, int64_t threads) {                                                                                 \
    forward_all<T>(u, dt, A, B, C, D, h0, y, last, starts, Bt, L, E, N, threads);                                                         \
  }                                                                                                                                       \
  EXPORT void selective_scan_backward_##NAME(                                                                                             \
      const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* starts, const T* gy, const T* glast, T* gu,       \
      T* gdt, T* gA, T* gB, T* gC, T* gD, T* gh0, int64_t splits, int64_t Bt, int64_t L, int64_t E, int64_t N, int64_t threads) {         \
    backward_all<T>(u, dt, A, B, C, D, starts, gy, glast, gu, gdt, gA, gB, gC, gD, gh0, splits, Bt, L, E, N, threads);                    \
  }

DEFINE(float32, float)
DEFINE(float64, double)
