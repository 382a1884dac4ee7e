// One token through a whole model: an interpreter of the programs that lab/ops/program.py writes.
//
// A program is a list of instructions, each [opcode, words, operands ...] in int64: addresses, sizes, and doubles by their bits. A value
// has one row for each sequence of the batch: an address and a pitch (0: all rows share it). Weights are read where the model has them,
// row by row, so a step costs about what it takes to read them once; all rows of the batch use what was read. States of several numbers a
// channel are stored for GROUP channels side by side, whatever the width of the vectors.
#include <cmath>
#include <limits>

#include "activations.h"
#include "program.h"

namespace {

// ---- the instructions: operands in the order in which lab/ops/program.py writes them; those of matrices stand in linear.cpp and experts.cpp

// x = table[token] (+ places[position])
void embed(Operands o, Call& call) {
  const Rows x = o.rows();
  const float* table = o.array();
  const int64_t vocabulary = o.number(), width = o.number();
  const float* places = o.array();
  const int64_t longest = o.number();
  for (int64_t b = 0; b < call.B; b++) {
    const int64_t token = call.tokens[b], place = call.start[b] + call.t;
    if (token < 0 || token >= vocabulary || (places && place >= longest)) {
      call.wrong = true;
      return;
    }
    const float *row = table + token * width, *at = places ? places + place * width : nullptr;
    over(width, [&](int64_t i, auto lanes) { store(x[b] + i, at ? load(row + i, lanes) + load(at + i, lanes) : load(row + i, lanes), lanes); });
  }
}

// y = table[place - first]
void place(Operands o, Call& call) {
  const Rows y = o.rows();
  const float* table = o.array();
  const int64_t count = o.number(), width = o.number(), first = o.number();
  for (int64_t b = 0; b < call.B; b++) {
    const int64_t at = call.start[b] + call.t - first;
    if (at < 0 || at >= count) {
      call.wrong = true;
      return;
    }
    std::memcpy(y[b], table + at * width, width * sizeof *table);
  }
}

// y = weight x / rms(x); centred: of x - mean(x). weight and bias may be null.
void norm(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows();
  const int64_t width = o.number();
  const float *weight = o.array(), *bias = o.array(), eps = o.real();
  const bool centred = o.number();
  for (int64_t b = 0; b < call.B; b++) {
    V total{};
    if (centred) over(width, [&](int64_t i, auto lanes) { total += load(x[b] + i, lanes); });
    const float mean = sum<float>(total) / width;
    V squares{};
    over(width, [&](int64_t i, auto lanes) {
      const V d = load(x[b] + i, lanes) - mean;
      squares += lanes == W ? d * d : load(reinterpret_cast<const float*>(&d), lanes) * d;
    });
    const float scale = 1 / std::sqrt(sum<float>(squares) / width + eps);
    over(width, [&](int64_t i, auto lanes) {
      V d = (load(x[b] + i, lanes) - mean) * scale;
      if (weight) d *= load(weight + i, lanes);
      if (bias) d += load(bias + i, lanes);
      store(y[b] + i, d, lanes);
    });
  }
}

template <class Function> void map(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows();
  const int64_t width = o.number();
  for (int64_t b = 0; b < call.B; b++) over(width, [&](int64_t i, auto lanes) { store(y[b] + i, Function::of(load(x[b] + i, lanes)), lanes); });
}

void add(Operands o, Call& call) {
  const Rows y = o.rows(), a = o.rows(), c = o.rows();
  const int64_t width = o.number();
  for (int64_t b = 0; b < call.B; b++)
    over(width, [&](int64_t i, auto lanes) { store(y[b] + i, load(a[b] + i, lanes) + load(c[b] + i, lanes), lanes); });
}

void multiply(Operands o, Call& call) {
  const Rows y = o.rows(), a = o.rows(), c = o.rows();
  const int64_t width = o.number();
  for (int64_t b = 0; b < call.B; b++)
    over(width, [&](int64_t i, auto lanes) { store(y[b] + i, load(a[b] + i, lanes) * load(c[b] + i, lanes), lanes); });
}

// y = bias + sum_k w_k x_{t - (K - 1 - k) dilation}; the state is a ring of the last T inputs, the oldest at t mod T.
void conv(Operands o, Call& call) {
  const Rows y = o.rows(), x = o.rows(), state = o.rows();
  const float *w = o.array(), *bias = o.array();
  const int64_t width = o.number(), K = o.number(), dilation = o.number(), T = (K - 1) * dilation;
  for (int64_t b = 0; b < call.B; b++)
    over(width, [&](int64_t i, auto lanes) {
      const V in = load(x[b] + i, lanes);
      V total = load(w + (K - 1) * width + i, lanes) * in;
      if (bias) total += load(bias + i, lanes);
      for (int64_t k = 0; k + 1 < K; k++) total += load(w + k * width + i, lanes) * load(state[b] + (call.t + k * dilation) % T * width + i, lanes);
      if (T) store(state[b] + call.t % T * width + i, in, lanes);
      store(y[b] + i, total, lanes);
    });
}

// h = 2^{dt A} h + (dt u) B,   y = C . h + D u;   A, h: (groups, N, GROUP), A times log2(e)
void scan(Operands o, Call& call) {
  const Rows y = o.rows(), u = o.rows(), dt = o.rows(), B = o.rows(), C = o.rows(), h = o.rows();
  const float *A = o.array(), *D = o.array();
  const int64_t width = o.number(), N = o.number();
  for (int64_t b = 0; b < call.B; b++)
    over(width, [&](int64_t i, auto lanes) {
      const V d = load(dt[b] + i, lanes), x = load(u[b] + i, lanes), dx = d * x;
      const int64_t at = i / GROUP * N * GROUP + i % GROUP;
      float* state = h[b] + at;
      V total = load(D + i, lanes) * x;
      for (int64_t n = 0; n < N; n++) {
        const V next = exp2_decay(d * load(A + at + n * GROUP)) * load(state + n * GROUP) + dx * B[b][n];
        store(state + n * GROUP, next);
        total += next * C[b][n];
      }
      store(y[b] + i, total, lanes);
    });
}

// h = a h + u,   y = Re(C . h) + D u;   a, C, h complex: (groups, N, 2, GROUP)
void state_space(Operands o, Call& call) {
  const Rows y = o.rows(), u = o.rows(), h = o.rows();
  const float *a = o.array(), *C = o.array(), *D = o.array();
  const int64_t width = o.number(), N = o.number();
  for (int64_t b = 0; b < call.B; b++)
    over(width, [&](int64_t i, auto lanes) {
      const V x = load(u[b] + i, lanes);
      const int64_t at = i / GROUP * N * 2 * GROUP + i % GROUP;
      V total = load(D + i, lanes) * x, other{};
      for (int64_t n = 0; n < N; n++) {
        const int64_t j = at + n * 2 * GROUP;
        const V re = load(h[b] + j), im = load(h[b] + j + GROUP), a_re = load(a + j), a_im = load(a + j + GROUP);
        const V next = a_re * re - a_im * im + x, next_im = a_re * im + a_im * re;
        store(h[b] + j, next);
        store(h[b] + j + GROUP, next_im);
        total += load(C + j) * next;
        other -= load(C + j + GROUP) * next_im;
      }
      store(y[b] + i, total + other, lanes);
    });
}

// h = h + d h - sum_j right_j dot(left_j, h) + b u,   y = dot(C, h) + D u,   dot(a, h) = 2 Re sum_n a_n h_n; complex arrays as above, but
// those of h, d, right, left, b and C in double: a long time step puts eigenvalues next to -1 (lab/layers/dplr.py).
void dplr(Operands o, Call& call) {
  using Wide = Vector<double>;
  const Rows y = o.rows(), u = o.rows(), states = o.rows();
  const double* arrays[5];
  for (const double*& array : arrays) array = reinterpret_cast<const double*>(o.array());
  const auto [d, right, left, b, C] = arrays;
  const float* D = o.array();
  const int64_t width = o.number(), N = o.number(), rank = o.number(), all = (width + GROUP - 1) / GROUP * N * 2 * GROUP;
  for (int64_t row = 0; row < call.B; row++)
    for (int64_t i = 0; i < width; i += WIDTH<double>) {
      const int64_t at = i / GROUP * N * 2 * GROUP + i % GROUP, end = at + N * 2 * GROUP, lanes = std::min(WIDTH<double>, width - i);
      double* h = reinterpret_cast<double*>(states[row]);
      Wide along[4] = {}, x{}, total{};
      for (int64_t lane = 0; lane < lanes; lane++) x[lane] = u[row][i + lane];
      for (int64_t r = 0; r < rank; r++)
        for (int64_t j = at; j < end; j += 2 * GROUP)
          along[r] += load(left + r * all + j) * load(h + j) - load(left + r * all + j + GROUP) * load(h + j + GROUP);
      for (int64_t j = at; j < end; j += 2 * GROUP) {
        const Wide re = load(h + j), im = load(h + j + GROUP), d_re = load(d + j), d_im = load(d + j + GROUP);
        Wide next = re + d_re * re - d_im * im + load(b + j) * x, next_im = im + d_re * im + d_im * re + load(b + j + GROUP) * x;
        for (int64_t r = 0; r < rank; r++) {
          next -= load(right + r * all + j) * (2. * along[r]);
          next_im -= load(right + r * all + j + GROUP) * (2. * along[r]);
        }
        store(h + j, next);
        store(h + j + GROUP, next_im);
        total += load(C + j) * next - load(C + j + GROUP) * next_im;
      }
      for (int64_t lane = 0; lane < lanes; lane++) y[row][i + lane] = float(2 * total[lane]) + D[i + lane] * u[row][i + lane];
    }
}

// h = a h + x, complex: all real parts, then all imaginary ones
void rotate(Operands o, Call& call) {
  const Rows h = o.rows(), x = o.rows();
  const float* a = o.array();
  const int64_t P = o.number();
  for (int64_t b = 0; b < call.B; b++)
    over(P, [&](int64_t i, auto lanes) {
      const V re = load(h[b] + i, lanes), im = load(h[b] + P + i, lanes), a_re = load(a + i, lanes), a_im = load(a + P + i, lanes);
      store(h[b] + i, a_re * re - a_im * im + load(x[b] + i, lanes), lanes);
      store(h[b] + P + i, a_re * im + a_im * re + load(x[b] + P + i, lanes), lanes);
    });
}

// softmax(scale q . k + more_q . more_k) v over the cache and this token, for the heads of one row; `more` columns may be 0.
// keys (H, S / GROUP, d + more, GROUP), values (H, S, d)
struct Attention {
  Rows y, q, k, v, more_q, more_k, keys, values, scores;
  int64_t H, d, more, S;
  float scale;

  void head(int64_t b, int64_t h, int64_t place) const {
    const int64_t e = d + more, blocks = place / GROUP + 1, whole = blocks * GROUP;
    float *K = keys[b] + h * S * e, *values_here = values[b] + h * S * d, *p = scores[b] + h * S;
    float* slot = K + place / GROUP * e * GROUP + place % GROUP;
    for (int64_t i = 0; i < d; i++) slot[i * GROUP] = k[b][h * d + i], values_here[place * d + i] = v[b][h * d + i];
    for (int64_t i = 0; i < more; i++) slot[(d + i) * GROUP] = more_k[b][h * more + i];

    V largest = splat(-std::numeric_limits<float>::infinity());
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t j = 0; j < GROUP; j += W) {
        const float* column = K + block * e * GROUP + j;
        V score{}, other{};
        int64_t i = 0;
        for (; i + 2 <= d; i += 2) {
          score += load(column + i * GROUP) * q[b][h * d + i];
          other += load(column + (i + 1) * GROUP) * q[b][h * d + i + 1];
        }
        if (i < d) score += load(column + i * GROUP) * q[b][h * d + i];
        score = (score + other) * scale;
        for (int64_t m = 0; m < more; m++) score += load(column + (d + m) * GROUP) * more_q[b][h * more + m];
        const int64_t first = block * GROUP + j;
        if (first + W > place + 1)  // behind this token
          for (int64_t lane = std::max<int64_t>(place + 1 - first, 0); lane < W; lane++) score[lane] = -std::numeric_limits<float>::infinity();
        store(p + first, score);
        largest = score > largest ? score : largest;
      }
    float top = largest[0];
    for (int64_t lane = 1; lane < W; lane++) top = std::max(top, largest[lane]);
    V total{};
    for (int64_t s = 0; s < whole; s += W) {
      V weight = exp2_decay((load(p + s) - top) * LOG2_E);
      if (s + W > place + 1)
        for (int64_t lane = std::max<int64_t>(place + 1 - s, 0); lane < W; lane++) weight[lane] = 0;
      total += weight;
      store(p + s, weight);
    }
    const float share = 1 / sum<float>(total);
    over(d, [&](int64_t i, auto lanes) {
      V part[4] = {};
      int64_t s = 0;
      for (; s + 4 <= place + 1; s += 4)
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; r++) part[r] += load(values_here + (s + r) * d + i, lanes) * p[s + r];
      for (; s <= place; s++) part[0] += load(values_here + s * d + i, lanes) * p[s];
      store(y[b] + h * d + i, (part[0] + part[1] + part[2] + part[3]) * share, lanes);
    });
  }
};

void attend(Operands o, Call& call) {
  Attention a;
  a.y = o.rows(), a.q = o.rows(), a.k = o.rows(), a.v = o.rows(), a.more_q = o.rows(), a.more_k = o.rows();
  a.keys = o.rows(), a.values = o.rows(), a.scores = o.rows();
  a.H = o.number(), a.d = o.number(), a.more = o.number(), a.S = o.number(), a.scale = o.real();
  int64_t work = 0;
  for (int64_t b = 0; b < call.B; b++) {
    const int64_t place = call.start[b] + call.t;
    work += a.H * place * (2 * a.d + a.more);
    if (place >= a.S) {
      call.wrong = true;
      return;
    }
  }
  in_parts(call.B * a.H, 1, work, call.threads, [&](int64_t i, int64_t end) {
    const FlushTiny flush;
    for (; i < end; i++) a.head(i / a.H, i % a.H, call.start[i / a.H] + call.t);
  });
}

// Coupled oscillators: cos and sin of theta as columns (H, 2) of the keys and, times alpha, of the queries; then theta moves on:
// theta + dt u + free + cos * (P sin) - sin * (P cos), wrapped. pull[j][i] = P_ij with rows of `pitch` numbers.
void oscillate(Operands o, Call& call) {
  const Rows of_q = o.rows(), of_k = o.rows(), theta = o.rows(), u = o.rows(), sin = o.rows(), cos = o.rows();
  const float *alpha = o.array(), *free = o.array(), *pull = o.array();
  const int64_t H = o.number(), pitch = o.number();
  const float dt = o.real();
  for (int64_t b = 0; b < call.B; b++) {
    over(H, [&](int64_t i, auto lanes) {
      const Wave<float> now = wave(load(theta[b] + i, lanes));
      store(sin[b] + i, now.sin, lanes);
      store(cos[b] + i, now.cos, lanes);
    });
    for (int64_t i = 0; i < H; i++) {
      of_q[b][2 * i] = alpha[i] * (of_k[b][2 * i] = cos[b][i]);
      of_q[b][2 * i + 1] = alpha[i] * (of_k[b][2 * i + 1] = sin[b][i]);
    }
    over(H, [&](int64_t i, auto lanes) {
      V of_sin{}, of_cos{};
      for (int64_t j = 0; j < H; j++) {
        const V column = load(pull + j * pitch + i, lanes);
        of_sin += column * sin[b][j];
        of_cos += column * cos[b][j];
      }
      V next = load(theta[b] + i, lanes) + load(free + i, lanes) + load(cos[b] + i, lanes) * of_sin - load(sin[b] + i, lanes) * of_cos;
      if (u.base) next += dt * load(u[b] + i, lanes);
      next -= floored<float>(next * 0.159154943f) * 6.28318531f;
      store(theta[b] + i, next, lanes);
    });
  }
}

using Instruction = void (*)(Operands, Call&);
constexpr Instruction INSTRUCTIONS[] = {  // in the order of lab/ops/program.py
    embed, norm, linear, map<Sigmoid>, map<Silu>, map<Gelu>, map<Softplus>, map<Relu>, add, multiply, conv, scan, state_space, rotate, attend, oscillate,
    linear_packed, dplr, map<Tanh>, place, experts};

// The first of the largest, and NaN is larger than any number: as torch's argmax.
int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; i++)
    if (x[i] > x[best] || (std::isnan(x[i]) && !std::isnan(x[best]))) best = i;
  return best;
}

}  // namespace

EXPORT int64_t decode_instructions() { return sizeof INSTRUCTIONS / sizeof *INSTRUCTIONS; }

// Feeds tokens (B), `steps` times; each next token is the most probable one, and they go to chosen (steps, B), unless that is null. clock:
// how many tokens the program has seen, then the position of each row before them. 0, or 1 for a token or position out of its table.
EXPORT int64_t decode_float32(
    const int64_t* code, int64_t words, int64_t* clock, const int64_t* tokens, int64_t* chosen, const float* logits, int64_t pitch,
    int64_t vocabulary, int64_t B, int64_t steps, int64_t threads) {
  const FlushTiny flush;
  Call call{B, tokens, clock + 1, clock[0], threads, false};
  for (int64_t step = 0; step < steps; step++) {
    for (const int64_t* at = code; at < code + words; at += at[1]) {
      INSTRUCTIONS[at[0]](Operands{at + 2}, call);
      if (call.wrong) return 1;
    }
    clock[0] = ++call.t;
    if (!chosen) continue;
    for (int64_t b = 0; b < B; b++) chosen[step * B + b] = argmax(logits + b * pitch, vocabulary);
    call.tokens = chosen + step * B;
  }
  return 0;
}
