// Sums in an order that does not depend on the GPU.
//
// sum_over_time: over the steps of every channel, out_d = sum_t term(outer, t, d). A block takes CHANNELS adjacent channels, which it reads side
// by side, and SLICES of time, which are added up in shared memory. What limits it is the memory that the terms read.
#pragma once

#include "grid.h"

namespace {

// What the threads of a block, a power of 2, hold in sums[thread]: altogether in sums[0].
template <class S> DEVICE void add_up(const Block& block, S* sums) {
  for (int half = block.threads() / 2; half; half /= 2)
    block.each([&](int thread) {
      if (thread < half) sums[thread] = sums[thread] + sums[thread + half];
    });
}

template <class S, class Term> struct SumOverTime {
  static constexpr int CHANNELS = 32, SLICES = 8, THREADS = CHANNELS * SLICES;
  Term term;
  S* out;  // (outer, channels)
  int64_t L, channels;

  DEVICE void operator()(const Block& block) const {
    const int64_t tiles = parts(channels, CHANNELS), outer = block.index / tiles, d0 = block.index % tiles * CHANNELS;
    S* const sums = block.memory<S>();
    block.each([&](int thread) {
      const int64_t d = d0 + thread % CHANNELS;
      S sum{};
      if (d < channels)
        for (int64_t t = thread / CHANNELS; t < L; t += SLICES) sum = sum + term(outer, t, d);
      sums[thread] = sum;
    });
    block.each([&](int thread) {
      if (thread >= CHANNELS || d0 + thread >= channels) return;
      S sum = sums[thread];
      for (int slice = 1; slice < SLICES; slice++) sum = sum + sums[slice * CHANNELS + thread];
      out[outer * channels + d0 + thread] = sum;
    });
  }
};

template <class S, class Term> int64_t sum_over_time(Term term, S* out, int64_t outer, int64_t L, int64_t channels, int64_t stream) {
  using Kernel = SumOverTime<S, Term>;
  return launch(
      Kernel{term, out, L, channels}, outer * parts(channels, Kernel::CHANNELS), Kernel::THREADS, Kernel::THREADS * int64_t(sizeof(S)), stream);
}

}  // namespace
