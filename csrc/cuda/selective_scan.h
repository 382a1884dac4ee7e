// Mamba's selective scan (arXiv:2312.00752).      h_t = e^{dt_t A} h_{t-1} + (dt_t u_t) B_t,   y_t = C_t . h_t + D u_t
//
// u, dt, y (Bt, L, E), A (E, N), B, C (Bt, L, N), D (E), h0, last (Bt, E, N). A block walks CHANNELS adjacent channels of one row through time,
// a thread a channel's STATES states in registers; (Bt, L, E, N) never exists. It takes CHUNK steps at a time: all threads fetch them into
// shared memory, each does its states, all add up over the states (backward also over the channels, for B and C). The forward pass keeps the
// state at the beginning of each chunk, the backward pass recomputes the states inside it. More than SLAB states take more launches, one after
// the other, which add to what the first one wrote.
//
// What limits it is the exponential (a quarter of the multiply-adds' rate at best), and few rows and channels: time is not cut.
// The caller brings A times log2(e), so that e^{dt A} is 2^{dt A}.
#pragma once

#include "numbers.h"

namespace {

constexpr int CHANNELS = 32, CHUNK = 16, STATES = 4;
template <class T> constexpr int SLAB = 64 / sizeof(T);  // 16 or 8: more would not fit into the shared memory of the backward pass

// The states n0 .. n0 + count - 1 of all channels, and the threads' shares of a block: thread = group of states * CHANNELS + channel.
struct Slab {
  int64_t n0;
  int count;
  ANYWHERE int groups() const { return (count + STATES - 1) / STATES; }
  ANYWHERE int threads() const { return groups() * CHANNELS; }
};

template <class T> struct Shared {  // of a chunk: (CHUNK, CHANNELS), and (CHUNK, SLAB) with zeros behind the slab's states
  T u[CHUNK][CHANNELS], dt[CHUNK][CHANNELS], B[CHUNK][SLAB<T>], C[CHUNK][SLAB<T>];
};

template <class T> struct Inputs {
  const T* RESTRICT u;
  const T* RESTRICT dt;
  const T* RESTRICT A;
  const T* RESTRICT B;
  const T* RESTRICT C;
  const T* RESTRICT D;
  int64_t L, E, N;

  // The steps t0 .. t0 + CHUNK - 1 of channels e0 .. of a row; zeros where there are none, which change no state.
  DEVICE void fetch(const Block& block, Shared<T>& to, const Slab& slab, int64_t row, int64_t t0, int64_t e0, int thread) const {
    for (int i = thread; i < CHUNK * CHANNELS; i += block.threads()) {
      const int64_t t = t0 + i / CHANNELS, e = e0 + i % CHANNELS, at = (row * L + t) * E + e;
      const bool there = t < L && e < E;
      to.u[i / CHANNELS][i % CHANNELS] = there ? u[at] : T(0);
      to.dt[i / CHANNELS][i % CHANNELS] = there ? dt[at] : T(0);
    }
    for (int i = thread; i < CHUNK * SLAB<T>; i += block.threads()) {
      const int64_t t = t0 + i / SLAB<T>, n = i % SLAB<T>, at = (row * L + t) * N + slab.n0 + n;
      const bool there = t < L && n < slab.count;
      to.B[i / SLAB<T>][n] = there ? B[at] : T(0);
      to.C[i / SLAB<T>][n] = there ? C[at] : T(0);
    }
  }
};

template <class T> struct States { T at[STATES]; };

// The thread's channel, first state of the slab, and what is there of both.
struct Share {
  int c, n, states;
  DEVICE Share(const Slab& slab, int64_t channels_left, int thread) : c(thread % CHANNELS), n(thread / CHANNELS * STATES) {
    states = c < channels_left ? smaller(STATES, slab.count - n) : 0;
  }
};

// f(slab) for the slabs of N states, until one fails.
template <class T, class F> int64_t over_slabs(int64_t N, F f) {
  for (int64_t n0 = 0; n0 < N; n0 += SLAB<T>)
    if (const int64_t failed = f(Slab{n0, int(smaller<int64_t>(SLAB<T>, N - n0))})) return failed;
  return 0;
}

}  // namespace
