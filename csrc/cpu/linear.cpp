// A matrix times a few vectors, for cpu/decode.cpp: rows of float as they are, or packed.
#include <cmath>

#include "activations.h"
#include "program.h"

namespace {

// R rows of a matrix times NB vectors; every row is a stream of its own.
template <int R, int NB> INLINE void dot(const float* w, int64_t K, const Rows& x, int64_t b, float (&y)[R][NB]) {
  V total[R][NB] = {};
  over(K, [&](int64_t k, auto lanes) {
    V in[NB];
    for (int j = 0; j < NB; j++) in[j] = load(x[b + j] + k, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const V row = load(w + r * K + k, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < NB; j++) total[r][j] += row * in[j];
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int j = 0; j < NB; j++) y[r][j] = sum<float>(total[r][j]);
}

template <int R> void multiply_rows(const float* w, const float* bias, int64_t K, const Rows& x, const Rows& y, int64_t B, int64_t n) {
  auto some = [&](auto NB, int64_t b) {
    float out[R][NB];
    dot<R, NB>(w + n * K, K, x, b, out);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < NB; j++) y[b + j][n + r] = out[r][j] + (bias ? bias[n + r] : 0.f);
  };
  int64_t b = 0;
  if constexpr (R > 4) {
    for (; b < B; b++) some(std::integral_constant<int, 1>{}, b);
  } else {
    for (; b + 4 <= B; b += 4) some(std::integral_constant<int, 4>{}, b);
    for (; b < B; b++) some(std::integral_constant<int, 1>{}, b);
  }
}

}  // namespace

// y = weight x + bias; weight (N, K), bias may be null
void linear(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows();
  const float *weight = o.array(), *bias = o.array();
  const int64_t N = o.number(), K = o.number(), B = call.B;
  in_parts(N, 8, B * N * K, call.threads, [&](int64_t n, int64_t end) {
    const FlushTiny flush;
    if (B < 4)
      for (; n + 8 <= end; n += 8) multiply_rows<8>(weight, bias, K, x, y, B, n);
    for (; n + 4 <= end; n += 4) multiply_rows<4>(weight, bias, K, x, y, B, n);
    for (; n < end; n++) multiply_rows<1>(weight, bias, K, x, y, B, n);
  });
}

// ---- packed weights: three bytes each, where the step waits for memory
//
// A row is whole numbers of 24 bits times a scale, its largest weight being LARGEST: off by 2^-24 of that, about what float32 itself loses
// in a sum. TILE outputs lie side by side, their inputs in pairs: the upper 16 bits for one input, for the next, then the lower 8 of both.

constexpr int64_t TILE = 2 * W, PAIR = 3 * VECTOR_BYTES;
constexpr float LARGEST = 8388600;  // below 2^23 by more than a rounding of the scale
constexpr float OUTLIER = 32;  // times the mean of a row: above that its small weights would lose too much
typedef int16_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));

// The lower (HALF 0) or upper half of a and b of every 16 bytes, interleaved: one instruction at any width.
template <int HALF, class X, int... I> INLINE X interleaved(X a, X b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), part = 16 * n / sizeof(X);
  return __builtin_shufflevector(a, b, (I % 2 * n + I / part * part + HALF * part / 2 + I % part / 2)...);
}
template <int HALF> INLINE Words words(Bytes low) { return (Words)interleaved<HALF>(Bytes{}, low, std::make_integer_sequence<int, VECTOR_BYTES>{}); }
template <int HALF> INLINE V numbers(Words low, Words high) {
  return __builtin_convertvector((VectorOf<float>::bits)interleaved<HALF>(low, high, std::make_integer_sequence<int, VECTOR_BYTES / 2>{}), V);
}

// Where output i of a tile stands among the words of an input, so that numbers<0> are the first W outputs and numbers<1> the others.
INLINE int64_t word_of(int64_t i) { return i % W / 4 * 8 + i / W * 4 + i % 4; }

template <class T> INLINE T unpacked(const char* at) {
  T v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

template <int NB>
INLINE void multiply_tile(const char* tile, const float* scale, const float* bias, int64_t K, const Rows& x, const Rows& y, int64_t b, int64_t n, int64_t N) {
  V total[NB][4] = {};
  for (int64_t k = 0; k < K; k += 2, tile += PAIR) {
    __builtin_prefetch(tile + 4096), __builtin_prefetch(tile + 4096 + 64), __builtin_prefetch(tile + 4096 + 128);
    const Words first = unpacked<Words>(tile), second = unpacked<Words>(tile + VECTOR_BYTES);
    const Bytes low = unpacked<Bytes>(tile + 2 * VECTOR_BYTES);
    const Words low_first = words<0>(low), low_second = words<1>(low);
    const V w[4] = {numbers<0>(low_first, first), numbers<1>(low_first, first), numbers<0>(low_second, second), numbers<1>(low_second, second)};
#pragma GCC unroll 4
    for (int j = 0; j < NB; j++) {
      const float in = x[b + j][k], next = k + 1 < K ? x[b + j][k + 1] : 0.f;
      total[j][0] += w[0] * in, total[j][1] += w[1] * in, total[j][2] += w[2] * next, total[j][3] += w[3] * next;
    }
  }
  for (int j = 0; j < NB; j++)
    for (int half = 0; half < 2; half++) {
      const int64_t at = n + half * W, lanes = N - at;
      V out = (total[j][half] + total[j][half + 2]) * load(scale + at, lanes);
      if (bias) out += load(bias + at, lanes);
      store(y[b + j] + at, out, lanes);
    }
}

// As linear, of what decode_pack_float32 wrote.
void linear_packed(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows();
  const char* packed = reinterpret_cast<const char*>(o.array());
  const float *scale = o.array(), *bias = o.array();
  const int64_t N = o.number(), K = o.number(), tile = (K + 1) / 2 * PAIR;
  in_parts(N, TILE, call.B * N * K, call.threads, [&](int64_t n, int64_t end) {
    const FlushTiny flush;
    for (; n < end; n += TILE) {
      int64_t b = 0;
      for (; b + 4 <= call.B; b += 4) multiply_tile<4>(packed + n / TILE * tile, scale, bias, K, x, y, b, n, N);
      for (; b < call.B; b++) multiply_tile<1>(packed + n / TILE * tile, scale, bias, K, x, y, b, n, N);
    }
  });
}

// The bytes of a packed matrix (N, K).
EXPORT int64_t decode_packed_bytes(int64_t N, int64_t K) { return (N + TILE - 1) / TILE * ((K + 1) / 2) * PAIR; }

// Packs w (N, K), with a scale (N) for each row. 1: a row has outliers, and the matrix should stay as it is.
EXPORT int64_t decode_pack_float32(const float* w, char* packed, float* scale, int64_t N, int64_t K) {
  for (int64_t n = 0; n < N; n++) {
    const float* row = w + n * K;
    V largest{}, total{};
    over(K, [&](int64_t k, auto lanes) {
      const V size = absolute(load(row + k, lanes));
      largest = size > largest ? size : largest;
      total += size;
    });
    float top = 0;
    for (int64_t lane = 0; lane < W; lane++) top = std::max(top, largest[lane]);
    const float mean = sum<float>(total) / K;
    if (!(top <= OUTLIER * mean) || !(top < 1e30f) || (top > 0 && top < 1e-28f)) return 1;  // NaN as well
    scale[n] = top / LARGEST / 256;  // the lowest byte of a number is 0 as the kernel reads it
  }
  const int64_t bytes = (K + 1) / 2 * PAIR;
  std::memset(packed, 0, decode_packed_bytes(N, K));
  for (int64_t n = 0; n < N; n++) {
    const int64_t word = word_of(n % TILE);
    char* high = packed + n / TILE * bytes + 2 * word;
    char* low = packed + n / TILE * bytes + 2 * VECTOR_BYTES + word / 8 * 16 + word % 8;
    const float per_step = scale[n] > 0 ? 1 / (scale[n] * 256) : 0.f;
    over(K, [&](int64_t k, auto lanes) {
      const V steps = load(w + n * K + k, lanes) * per_step;
      const auto numbers = __builtin_convertvector(steps + (steps < 0.f ? splat(-0.5f) : splat(0.5f)), VectorOf<float>::bits);
      for (int64_t i = 0; i < lanes; i++) {
        const int64_t pair = (k + i) / 2 * PAIR, other = (k + i) % 2;
        const int16_t upper = int16_t(numbers[i] >> 8);
        std::memcpy(high + pair + other * VECTOR_BYTES, &upper, 2);
        low[pair + other * 8] = char(numbers[i]);
      }
    });
  }
  return 0;
}
