// The forward pass of the selective scan; selective_scan.h says what it computes and how.
#include "selective_scan.h"

namespace {

template <class T> struct Forward {
  static constexpr int THREADS = CHANNELS * SLAB<T> / STATES;
  Inputs<T> in;
  Slab slab;
  const T* h0;  // or null
  T *y, *last, *starts;  // starts (Bt, E, chunks, N), or null

  struct Memory : Shared<T> { T out[CHUNK][SLAB<T> / STATES][CHANNELS]; };

  DEVICE void operator()(const Block& block) const {
    const int64_t L = in.L, E = in.E, N = in.N, tiles = parts(E, CHANNELS), chunks = parts(L, CHUNK);
    const int64_t row = block.index / tiles, e0 = block.index % tiles * CHANNELS;
    Memory& memory = *block.memory<Memory>();
    Local<States<T>> state(block), decay(block);
    block.each([&](int thread) {
      const Share mine(slab, E - e0, thread);
      UNROLL for (int n = 0; n < STATES; n++) {
        const bool there = n < mine.states;
        decay[thread].at[n] = there ? in.A[(e0 + mine.c) * N + slab.n0 + mine.n + n] : T(0);
        state[thread].at[n] = there && h0 ? h0[(row * E + e0 + mine.c) * N + slab.n0 + mine.n + n] : T(0);
      }
    });
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t t0 = chunk * CHUNK;
      block.each([&](int thread) { in.fetch(block, memory, slab, row, t0, e0, thread); });
      block.each([&](int thread) {
        const Share mine(slab, E - e0, thread);
        States<T>&h = state[thread], &a = decay[thread];
        if (starts)
          UNROLL for (int n = 0; n < STATES; n++)
            if (n < mine.states) starts[((row * E + e0 + mine.c) * chunks + chunk) * N + slab.n0 + mine.n + n] = h.at[n];
        UNROLL for (int t = 0; t < CHUNK; t++) {
          const T d = memory.dt[t][mine.c], dx = d * memory.u[t][mine.c];
          T out = 0;
          UNROLL for (int n = 0; n < STATES; n++) {
            h.at[n] = power_of_2(d * a.at[n]) * h.at[n] + dx * memory.B[t][mine.n + n];
            out += h.at[n] * memory.C[t][mine.n + n];
          }
          memory.out[t][mine.n / STATES][mine.c] = out;
        }
      });
      block.each([&](int thread) {
        for (int i = thread; i < CHUNK * CHANNELS; i += block.threads()) {
          const int t = i / CHANNELS, c = i % CHANNELS;
          const int64_t at = (row * L + t0 + t) * E + e0 + c;
          if (t0 + t >= L || e0 + c >= E) continue;
          T sum = slab.n0 ? y[at] : in.D[e0 + c] * memory.u[t][c];
          for (int group = 0; group < slab.groups(); group++) sum += memory.out[t][group][c];
          y[at] = sum;
        }
      });
    }
    block.each([&](int thread) {
      const Share mine(slab, E - e0, thread);
      UNROLL for (int n = 0; n < STATES; n++)
        if (n < mine.states) last[(row * E + e0 + mine.c) * N + slab.n0 + mine.n + n] = state[thread].at[n];
    });
  }
};

template <class T>
int64_t forward(const Inputs<T>& in, const T* h0, T* y, T* last, T* starts, int64_t Bt, int64_t stream) {
  return over_slabs<T>(in.N, [=](const Slab& slab) {
    const Forward<T> kernel{in, slab, h0, y, last, starts};
    return launch(kernel, Bt * parts(in.E, CHANNELS), slab.threads(), sizeof(typename Forward<T>::Memory), stream);
  });
}

}  // namespace

// starts: null without gradients, else (Bt, E, chunks, N). N > 0.
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t selective_scan_##NAME(                                                                                                   \
      const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* h0, T* y, T* last, T* starts, int64_t Bt,         \
      int64_t L, int64_t E, int64_t N, int64_t stream) {                                                                                  \
    return forward<T>({u, dt, A, B, C, D, L, E, N}, h0, y, last, starts, Bt, stream);                                                     \
  }

DEFINE(float32, float)
DEFINE(float64, double)
