// The backward pass of the selective scan; selective_scan.h says how a block walks.
//
// What limits it besides is the shared memory: 88 KB for 128 threads, most of it for the sums over the channels.
#include "selective_scan.h"

namespace {

// With q_t = dLoss/dh_t = gy_t C_t + g_t, g_t = decay_{t+1} q_{t+1} carried: gC_t = sum gy_t h_t, gB_t = sum q_t dt_t u_t over the channels;
// x_t = sum q_t B_t and through_t = sum decay_t q_t h_{t-1} A over the states reach u_t and dt_t. A block is a row and one of `splits` parts
// of its tiles, which it walks one after the other; the parts' gB and gC are added up by the caller.
template <class T> struct Backward {
  static constexpr int THREADS = CHANNELS * SLAB<T> / STATES;
  Inputs<T> in;
  Slab slab;
  const T* RESTRICT starts;
  const T* RESTRICT gy;
  const T* RESTRICT glast;
  T *gu, *gdt, *gA, *gB, *gC, *gD, *gh0;
  int64_t Bt, splits;

  struct Memory : Shared<T> {
    T gy[CHUNK][CHANNELS];
    T x[CHUNK][SLAB<T> / STATES][CHANNELS], through[CHUNK][SLAB<T> / STATES][CHANNELS];
    // Of each step and state all channels: h, which becomes what reaches C; and what reaches B.
    T h[CHUNK * SLAB<T>][CHANNELS], of_B[CHUNK * SLAB<T>][CHANNELS];
  };

  DEVICE void operator()(const Block& block) const {
    const int64_t tiles = parts(in.E, CHANNELS), row = block.index / splits, part = block.index % splits;
    const int64_t first = tiles * part / splits, end = tiles * (part + 1) / splits;
    if (first == end)  // more parts than tiles
      block.each([&](int thread) {
        for (int64_t i = thread; i < in.L * slab.count; i += block.threads()) {
          const int64_t at = ((part * Bt + row) * in.L + i / slab.count) * in.N + slab.n0 + i % slab.count;
          gB[at] = gC[at] = T(0);
        }
      });
    for (int64_t tile = first; tile < end; tile++) walk(block, row, part, tile * CHANNELS, tile == first);
  }

  DEVICE void walk(const Block& block, int64_t row, int64_t part, int64_t e0, bool first) const {
    const int64_t L = in.L, E = in.E, N = in.N, chunks = parts(L, CHUNK);
    Memory& memory = *block.memory<Memory>();
    Local<States<T>> decay(block), carried(block), of_A(block), start(block);
    Local<T> of_D(block);
    block.each([&](int thread) {
      const Share mine(slab, E - e0, thread);
      of_D[thread] = 0;
      UNROLL for (int n = 0; n < STATES; n++) {
        const bool there = n < mine.states;
        decay[thread].at[n] = there ? in.A[(e0 + mine.c) * N + slab.n0 + mine.n + n] : T(0);
        carried[thread].at[n] = there ? glast[(row * E + e0 + mine.c) * N + slab.n0 + mine.n + n] : T(0);
        of_A[thread].at[n] = 0;
      }
    });
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
      const int64_t t0 = chunk * CHUNK;
      block.each([&](int thread) {
        in.fetch(block, memory, slab, row, t0, e0, thread);
        for (int i = thread; i < CHUNK * CHANNELS; i += block.threads()) {
          const int64_t t = t0 + i / CHANNELS, e = e0 + i % CHANNELS;
          memory.gy[i / CHANNELS][i % CHANNELS] = t < L && e < E ? gy[(row * L + t) * E + e] : T(0);
        }
      });
      block.each([&](int thread) { states(memory, row, t0, chunk, chunks, e0, thread, decay[thread], carried[thread], of_A[thread]); });
      block.each([&](int thread) {
        of_D[thread] = write_inputs(block, memory, row, t0, e0, thread, of_D[thread]);
        add_channels(block, memory, row, part, t0, thread, first);
      });
    }
    block.each([&](int thread) {
      const Share mine(slab, E - e0, thread);
      const int64_t at = (row * E + e0 + mine.c) * N + slab.n0 + mine.n;
      UNROLL for (int n = 0; n < STATES; n++) {
        if (n >= mine.states) continue;
        gA[at + n] = of_A[thread].at[n];
        if (gh0) gh0[at + n] = carried[thread].at[n];
      }
      block.memory<T>()[thread] = of_D[thread];
    });
    block.each([&](int thread) {  // a channel's share of D lies with all groups
      if (slab.n0 || thread >= CHANNELS || e0 + thread >= E) return;
      T sum = 0;
      for (int group = 0; group < slab.groups(); group++) sum += block.memory<T>()[group * CHANNELS + thread];
      gD[row * E + e0 + thread] = sum;
    });
  }

  // The thread's states through the chunk, forwards again and back.
  DEVICE void states(
      Memory& memory, int64_t row, int64_t t0, int64_t chunk, int64_t chunks, int64_t e0, int thread, const States<T>& a, States<T>& g,
      States<T>& of_A) const {
    const Share mine(slab, in.E - e0, thread);
    const int c = mine.c;
    States<T> start, h;
    UNROLL for (int n = 0; n < STATES; n++)
      start.at[n] = n < mine.states ? starts[((row * in.E + e0 + c) * chunks + chunk) * in.N + slab.n0 + mine.n + n] : T(0);
    h = start;
    UNROLL for (int t = 0; t < CHUNK; t++) {
      const T d = memory.dt[t][c], dx = d * memory.u[t][c];
      UNROLL for (int n = 0; n < STATES; n++) {
        h.at[n] = power_of_2(d * a.at[n]) * h.at[n] + dx * memory.B[t][mine.n + n];
        memory.h[t * SLAB<T> + mine.n + n][c] = h.at[n];
      }
    }
    UNROLL for (int t = CHUNK - 1; t >= 0; t--) {  // h holds the state of step t
      const T d = memory.dt[t][c], dx = d * memory.u[t][c], out = memory.gy[t][c];
      T x = 0, through = 0;
      UNROLL for (int n = 0; n < STATES; n++) {
        const int slot = t * SLAB<T> + mine.n + n;
        const T before = t ? memory.h[slot - SLAB<T>][c] : start.at[n];
        const T q = g.at[n] + out * memory.C[t][mine.n + n];
        memory.h[slot][c] = out * h.at[n];
        memory.of_B[slot][c] = q * dx;
        x += q * memory.B[t][mine.n + n];
        g.at[n] = power_of_2(d * a.at[n]) * q;
        const T reach = g.at[n] * before;
        through += reach * a.at[n];
        of_A.at[n] += reach * d;
        h.at[n] = before;
      }
      memory.x[t][mine.n / STATES][c] = x;
      memory.through[t][mine.n / STATES][c] = through;
    }
  }

  // gu and gdt; returns of_D with the thread's steps added. A step is always the same thread's, and so is a channel.
  DEVICE T write_inputs(const Block& block, const Memory& memory, int64_t row, int64_t t0, int64_t e0, int thread, T of_D) const {
    constexpr T LN2 = T(0.69314718055994530942);
    for (int i = thread; i < CHUNK * CHANNELS; i += block.threads()) {
      const int t = i / CHANNELS, c = i % CHANNELS;
      const int64_t at = (row * in.L + t0 + t) * in.E + e0 + c;
      if (t0 + t >= in.L || e0 + c >= in.E) continue;
      T x = 0, through = 0;
      for (int group = 0; group < slab.groups(); group++) x += memory.x[t][group][c], through += memory.through[t][group][c];
      const T u = memory.u[t][c], out = memory.gy[t][c], of_u = x * memory.dt[t][c], of_dt = x * u + through * LN2;
      gu[at] = slab.n0 ? gu[at] + of_u : of_u + in.D[e0 + c] * out;
      gdt[at] = slab.n0 ? gdt[at] + of_dt : of_dt;
      of_D += out * u;
    }
    return of_D;
  }

  // gB and gC of the chunk. Each thread begins at another channel: then no two of a warp want the same bank of the memory.
  DEVICE void add_channels(const Block& block, const Memory& memory, int64_t row, int64_t part, int64_t t0, int thread, bool first) const {
    for (int i = thread; i < CHUNK * SLAB<T>; i += block.threads()) {
      const int t = i / SLAB<T>, n = i % SLAB<T>;
      if (t0 + t >= in.L || n >= slab.count) continue;
      T sum_B = 0, sum_C = 0;
      for (int k = 0; k < CHANNELS; k++) {
        const int c = (k + i) % CHANNELS;
        sum_B += memory.of_B[i][c], sum_C += memory.h[i][c];
      }
      const int64_t at = ((part * Bt + row) * in.L + t0 + t) * in.N + slab.n0 + n;
      gB[at] = first ? sum_B : gB[at] + sum_B;
      gC[at] = first ? sum_C : gC[at] + sum_C;
    }
  }
};

template <class T>
int64_t backward(
    const Inputs<T>& in, const T* starts, const T* gy, const T* glast, T* gu, T* gdt, T* gA, T* gB, T* gC, T* gD, T* gh0, int64_t splits,
    int64_t Bt, int64_t stream) {
  return over_slabs<T>(in.N, [=](const Slab& slab) {
    const Backward<T> kernel{in, slab, starts, gy, glast, gu, gdt, gA, gB, gC, gD, gh0, Bt, splits};
    return launch(kernel, Bt * splits, slab.threads(), sizeof(typename Backward<T>::Memory), stream);
  });
}

}  // namespace

// Per row come gA (Bt, E, N) and gD (Bt, E), per row and part gB and gC (splits, Bt, L, N); the caller adds them up. gA is the gradient of A
// itself, not of A log2(e).
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t selective_scan_backward_##NAME(                                                                                          \
      const T* u, const T* dt, const T* A, const T* B, const T* C, const T* D, const T* starts, const T* gy, const T* glast, T* gu,       \
      T* gdt, T* gA, T* gB, T* gC, T* gD, T* gh0, int64_t splits, int64_t Bt, int64_t L, int64_t E, int64_t N, int64_t stream) {          \
    return backward<T>({u, dt, A, B, C, D, L, E, N}, starts, gy, glast, gu, gdt, gA, gB, gC, gD, gh0, splits, Bt, stream);                \
  }

DEFINE(float32, float)
DEFINE(float64, double)
