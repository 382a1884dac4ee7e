// A mixture of experts for one token, for cpu/decode.cpp: only the experts that the token goes to are read.
#include <cmath>

#include "activations.h"
#include "program.h"

namespace {

constexpr int TILE = 8;  // vectors of adjacent columns

// out[j] = sum_i a[i] w[i][j], (+= with ADD, times scale); w (n, N) is read once, in strips of TILE vectors
template <bool ADD> void combine(float* out, const float* a, const float* w, int64_t n, int64_t N, float scale, int64_t threads) {
  in_parts(N, TILE * W, n * N, threads, [&](int64_t j, int64_t end) {
    const FlushTiny flush;
    for (; j + TILE * W <= end; j += TILE * W) {
      V total[TILE] = {};
      for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int t = 0; t < TILE; t++) total[t] += load(w + i * N + j + t * W) * a[i];
      for (int t = 0; t < TILE; t++) store(out + j + t * W, ADD ? load(out + j + t * W) + scale * total[t] : total[t]);
    }
    over(end - j, [&](int64_t k, auto lanes) {
      V total{};
      for (int64_t i = 0; i < n; i++) total += load(w + i * N + j + k, lanes) * a[i];
      store(out + j + k, ADD ? load(out + j + k, lanes) + scale * total : total, lanes);
    });
  });
}

template <class Function> void map(float* x, int64_t width) {
  over(width, [&](int64_t i, auto lanes) { store(x + i, Function::of(load(x + i, lanes)), lanes); });
}

}  // namespace

// y = sum of w_e act(x up_e) down_e over the k largest logits; w is their softmax, of k = 1 that over all. up (E, D, F), down (E, F, D);
// chosen and hidden are scratch, of E and F numbers
void experts(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows(), logits = o.rows(), chosen = o.rows(), hidden = o.rows();
  const float *up = o.array(), *down = o.array();
  const int64_t E = o.number(), D = o.number(), F = o.number(), k = o.number(), activation = o.number();
  for (int64_t b = 0; b < call.B; b++) {
    const float *l = logits[b], top = *std::max_element(l, l + E);
    float* weight = chosen[b];
    std::fill(weight, weight + E, -1.f);
    float total = 0;
    for (int64_t i = 0; i < k; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; e++)
        if (weight[e] < 0 && (best < 0 || l[e] > l[best])) best = e;
      total += weight[best] = std::exp(l[best] - top);
    }
    if (k == 1) {
      total = 0;
      for (int64_t e = 0; e < E; e++) total += std::exp(l[e] - top);
    }
    std::fill(y[b], y[b] + D, 0.f);
    for (int64_t e = 0; e < E; e++) {
      if (weight[e] < 0) continue;
      combine<false>(hidden[b], x[b], up + e * D * F, D, F, 1, call.threads);
      switch (activation) {
        case 0: map<Silu>(hidden[b], F); break;
        case 1: map<Gelu>(hidden[b], F); break;
        default: map<Relu>(hidden[b], F);
      }
      combine<true>(y[b], hidden[b], down + e * F * D, F, D, weight[e] / total, call.threads);
    }
  }
}
