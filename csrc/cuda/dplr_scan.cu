// A recurrence whose matrix is diagonal plus low rank.      h_t = h_{t-1} + d h_{t-1} - sum_j right_j s_j + b u_t,   y_t = 2 Re(C . h_t)
//                                                           s_j = 2 Re(left_j . h_{t-1})
//
// u, y (B, L, D), h0, last (B, D, N, 2), d, b, C (D, N, 2), right, left (R, D, N, 2), ends (B): how many tokens of a row are real. Complex
// numbers are stored re im. A block walks some adjacent channels of one row through time; a thread has STATES states of a channel and what
// belongs to them in registers, columns behind the first one in shared memory. In each step it adds up its channel's s over the groups of
// states, moves its states on and leaves its share of the next s in the other half of `dots`: one barrier. Inputs and outputs pass through
// shared memory, CHUNK steps at a time. The backward pass walks forwards first and keeps the state at the beginning of each chunk, in
// memory of the caller's; then, from the last chunk on, it recomputes the states inside one into shared memory and walks back over it.
//
// What limits it are the steps, one after the other, each with a barrier and a sum of N / STATES numbers in every thread: time is not cut,
// and few rows and channels leave a GPU idle. Backward it is also the shared memory, about 80 KB for 128 threads at rank 1.
#include "numbers.h"

namespace {

constexpr int THREADS = 128, CHUNK = 16, WIDEST = 32;
constexpr int64_t ENOUGH = 96 << 10;  // bytes of shared memory that every GPU has; more only where one channel needs more
template <class T> constexpr int STATES = 16 / sizeof(T);

template <class T> ANYWHERE Complex<T> operator*(T a, Complex<T> b) { return {a * b.re, a * b.im}; }
template <class T> ANYWHERE T product(Complex<T> a, Complex<T> b) { return a.re * b.re - a.im * b.im; }  // the real part

template <class T> struct Sizes {
  int64_t B, L, D, N, R;
  ANYWHERE int64_t groups() const { return larger<int64_t>(1, parts(N, STATES<T>)); }
};

// Where a block's shared memory has what, in numbers, of one step or column side by side what the threads or the channels have.
template <class T> struct Layout {
  int channels, threads;
  int64_t u, out, dots, columns, gy, h, s, of_columns, end;
  Layout(const Sizes<T>& sizes, bool back, int channels) : channels(channels), threads(int(channels * sizes.groups())) {
    const int64_t of_low_rank = (sizes.R - 1) * 4 * STATES<T> * threads;
    u = 0;
    out = u + CHUNK * channels;               // [step][thread]: a thread's share of y, or of gu
    dots = out + CHUNK * threads;             // [2][column][thread]: of s, or of the gradient of s
    columns = dots + 2 * sizes.R * threads;   // [column - 1][right, left][state][re, im][thread]
    gy = columns + of_low_rank;               // from here on backward alone
    h = gy + CHUNK * channels;                // [step][state][re, im][thread], before the step
    s = h + CHUNK * 2 * STATES<T> * threads;  // [step][column][channel]
    of_columns = s + CHUNK * sizes.R * channels;
    end = back ? of_columns + of_low_rank : gy;
  }
  int64_t bytes() const { return end * int64_t(sizeof(T)); }
};
template <class T> Layout<T> layout_of(const Sizes<T>& sizes, bool back) {
  int channels = int(larger<int64_t>(1, smaller<int64_t>(WIDEST, THREADS / sizes.groups())));
  while (channels > 1 && Layout<T>(sizes, back, channels).bytes() > ENOUGH) channels--;
  return Layout<T>(sizes, back, channels);
}

template <class T> struct States { Complex<T> at[STATES<T>]; };
template <class T> struct Matrices { States<T> d, b, C, right, left; };  // of a thread's states; the first column

// A thread's numbers [state][re, im][thread] in memory.
template <class T> DEVICE States<T> fetched(const T* memory, int threads, int thread) {
  States<T> states;
  UNROLL for (int n = 0; n < STATES<T>; n++)
    states.at[n] = {memory[2 * n * threads + thread], memory[(2 * n + 1) * threads + thread]};
  return states;
}
template <class T> DEVICE void put(T* memory, int threads, int thread, const States<T>& states) {
  UNROLL for (int n = 0; n < STATES<T>; n++)
    memory[2 * n * threads + thread] = states.at[n].re, memory[(2 * n + 1) * threads + thread] = states.at[n].im;
}

template <class T> struct System {
  const T* RESTRICT u;
  const T* RESTRICT h0;
  const T* RESTRICT d;
  const T* RESTRICT right;
  const T* RESTRICT left;
  const T* RESTRICT b;
  const T* RESTRICT C;
  const T* RESTRICT ends;
  Sizes<T> sizes;
  Layout<T> layout;

  static constexpr int S = STATES<T>;
  enum Side { RIGHT, LEFT };

  struct Place { int64_t row, first, end; };  // of a block: its row, its first channel, the row's real tokens
  DEVICE Place place(const Block& block) const {
    const int64_t tiles = parts(sizes.D, layout.channels), row = block.index / tiles;
    return {row, block.index % tiles * layout.channels, int64_t(ends[row])};
  }
  DEVICE int64_t channel(const Place& at, int thread) const { return at.first + thread % layout.channels; }

  // The thread's states in (.., D, N, 2), from channel number `channel` on: zeros, which stay zeros, where there are none.
  DEVICE States<T> read(const T* p, int64_t channel, int64_t d, int thread) const {
    States<T> states;
    UNROLL for (int n = 0; n < S; n++) {
      const int64_t k = thread / layout.channels * S + n, i = 2 * (channel * sizes.N + k);
      const bool there = d < sizes.D && k < sizes.N;
      states.at[n] = {there ? p[i] : T(0), there ? p[i + 1] : T(0)};
    }
    return states;
  }
  DEVICE void write(T* p, int64_t channel, int64_t d, int thread, const States<T>& states) const {
    UNROLL for (int n = 0; n < S; n++) {
      const int64_t k = thread / layout.channels * S + n, i = 2 * (channel * sizes.N + k);
      if (d < sizes.D && k < sizes.N) p[i] = states.at[n].re, p[i + 1] = states.at[n].im;
    }
  }
  DEVICE Matrices<T> fetch_matrices(const Block& block, const Place& at, int thread) const {
    const int64_t c = channel(at, thread);
    for (int64_t j = 1; j < sizes.R; j++) {
      put(column(block, layout.columns, j, RIGHT), layout.threads, thread, read(right, j * sizes.D + c, c, thread));
      put(column(block, layout.columns, j, LEFT), layout.threads, thread, read(left, j * sizes.D + c, c, thread));
    }
    return {read(d, c, c, thread), read(b, c, c, thread), read(C, c, c, thread), read(right, c, c, thread), read(left, c, c, thread)};
  }
  DEVICE T* column(const Block& block, int64_t columns, int64_t j, Side side) const {
    return block.memory<T>() + columns + ((j - 1) * 2 + side) * 2 * S * layout.threads;
  }
  DEVICE States<T> column_of(const Block& block, const Matrices<T>& A, int64_t j, Side side, int thread) const {
    if (!j) return side == RIGHT ? A.right : A.left;
    return fetched(column(block, layout.columns, j, side), layout.threads, thread);
  }

  // The steps t0 .. of (B, L, D) to memory, and back as sums over the groups; gone are the steps behind the real ones.
  DEVICE void fetch(const T* p, T* memory, const Place& at, int64_t t0, int thread) const {
    for (int i = thread; i < CHUNK * layout.channels; i += layout.threads) {
      const int64_t t = t0 + i / layout.channels, c = channel(at, i);
      memory[i] = t < at.end && c < sizes.D ? p[(at.row * sizes.L + t) * sizes.D + c] : T(0);
    }
  }
  DEVICE void write_sums(const Block& block, T* p, T factor, const Place& at, int64_t t0, int thread) const {
    for (int i = thread; i < CHUNK * layout.channels; i += layout.threads) {
      const int64_t t = t0 + i / layout.channels, c = channel(at, i);
      if (t >= at.end || c >= sizes.D) continue;
      p[(at.row * sizes.L + t) * sizes.D + c] =
          factor * over_groups(block.memory<T>() + layout.out + i / layout.channels * layout.threads, i % layout.channels);
    }
  }
  DEVICE void write_padding(T* p, const Place& at, int thread) const {
    for (int64_t t = at.end + thread / layout.channels; t < sizes.L; t += sizes.groups())
      if (channel(at, thread) < sizes.D) p[(at.row * sizes.L + t) * sizes.D + channel(at, thread)] = T(0);
  }
  DEVICE T over_groups(const T* shares, int c) const {
    T sum = 0;
    for (int i = c; i < layout.threads; i += layout.channels) sum += shares[i];
    return sum;
  }
  DEVICE T* dots(const Block& block, int64_t t, int64_t j) const {
    return block.memory<T>() + layout.dots + (t % 2 * sizes.R + j) * layout.threads;
  }

  // Leaves the thread's share of s for step t.
  DEVICE void share(const Block& block, const Matrices<T>& A, const States<T>& h, int64_t t, int thread) const {
    for (int64_t j = 0; j < sizes.R; j++) {
      const States<T> left = column_of(block, A, j, LEFT, thread);
      T sum = 0;
      UNROLL for (int n = 0; n < S; n++) sum += product(left.at[n], h.at[n]);
      dots(block, t, j)[thread] = sum;
    }
  }
  // Step t. `kept` [column][channel] receives s, unless it is null.
  DEVICE void step(const Block& block, const Matrices<T>& A, States<T>& h, int64_t t, T* kept, int thread) const {
    const int c = thread % layout.channels;
    const T now = block.memory<T>()[layout.u + t % CHUNK * layout.channels + c];
    States<T> more;
    UNROLL for (int n = 0; n < S; n++) more.at[n] = A.d.at[n] * h.at[n] + now * A.b.at[n];
    for (int64_t j = 0; j < sizes.R; j++) {
      const T s = 2 * over_groups(dots(block, t, j), c);
      const States<T> right = column_of(block, A, j, RIGHT, thread);
      UNROLL for (int n = 0; n < S; n++) more.at[n] = more.at[n] - s * right.at[n];
      if (kept && thread < layout.channels) kept[j * layout.channels + c] = s;
    }
    UNROLL for (int n = 0; n < S; n++) h.at[n] = h.at[n] + more.at[n];
    share(block, A, h, t + 1, thread);
  }
};

template <class T> struct Forward {
  static constexpr int THREADS = ::THREADS;
  System<T> in;
  T *y, *last;

  DEVICE void operator()(const Block& block) const {
    const auto at = in.place(block);
    T* const memory = block.memory<T>();
    Local<Matrices<T>> matrices(block);
    Local<States<T>> states(block);
    block.each([&](int thread) {
      const int64_t c = in.channel(at, thread);
      matrices[thread] = in.fetch_matrices(block, at, thread);
      states[thread] = in.read(in.h0, at.row * in.sizes.D + c, c, thread);
      in.share(block, matrices[thread], states[thread], 0, thread);
      in.write_padding(y, at, thread);
    });
    for (int64_t t0 = 0; t0 < at.end; t0 += CHUNK) {
      block.each([&](int thread) { in.fetch(in.u, memory + in.layout.u, at, t0, thread); });
      for (int64_t t = t0; t < smaller(t0 + CHUNK, at.end); t++)
        block.each([&](int thread) {
          const Matrices<T>& A = matrices[thread];
          States<T>& h = states[thread];
          in.step(block, A, h, t, nullptr, thread);
          T sum = 0;
          UNROLL for (int n = 0; n < STATES<T>; n++) sum += product(A.C.at[n], h.at[n]);
          memory[in.layout.out + (t - t0) * in.layout.threads + thread] = sum;
        });
      block.each([&](int thread) { in.write_sums(block, y, T(2), at, t0, thread); });
    }
    block.each([&](int thread) {
      const int64_t c = in.channel(at, thread);
      in.write(last, at.row * in.sizes.D + c, c, thread, states[thread]);
    });
  }
};

// g, the gradient of the state behind a step, becomes that of the state before it in two parts. `open` adds what y gives and leaves the
// thread's share of q_j, twice the gradient of s_j; behind the barrier `close` needs their sums, and the next step opens at once.
template <class T> struct Backward {
  static constexpr int THREADS = ::THREADS;
  System<T> in;
  const T* RESTRICT gy;
  const T* RESTRICT glast;
  T *starts, *gu, *gh0, *gd, *gright, *gleft, *gb, *gC;
  static constexpr int S = STATES<T>;

  DEVICE void operator()(const Block& block) const {
    const auto at = in.place(block);
    const int64_t D = in.sizes.D, chunks = parts(at.end, CHUNK);
    const int threads = in.layout.threads;
    T* const memory = block.memory<T>();
    Local<Matrices<T>> matrices(block), gradients(block);
    Local<States<T>> states(block), carried(block);  // h, g
    block.each([&](int thread) {
      const int64_t c = in.channel(at, thread);
      matrices[thread] = in.fetch_matrices(block, at, thread);
      gradients[thread] = Matrices<T>{};
      for (int64_t j = 1; j < in.sizes.R; j++) {
        put(in.column(block, in.layout.of_columns, j, System<T>::RIGHT), threads, thread, States<T>{});
        put(in.column(block, in.layout.of_columns, j, System<T>::LEFT), threads, thread, States<T>{});
      }
      states[thread] = in.read(in.h0, at.row * D + c, c, thread);
      carried[thread] = in.read(glast, at.row * D + c, c, thread);
      in.share(block, matrices[thread], states[thread], 0, thread);
      in.write_padding(gu, at, thread);
    });
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t t0 = chunk * CHUNK;
      block.each([&](int thread) {
        in.fetch(in.u, memory + in.layout.u, at, t0, thread);
        in.write(starts, start(at, chunk, thread), in.channel(at, thread), thread, states[thread]);
      });
      if (chunk + 1 < chunks)
        for (int64_t t = t0; t < t0 + CHUNK; t++)
          block.each([&](int thread) { in.step(block, matrices[thread], states[thread], t, nullptr, thread); });
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
      const int64_t t0 = chunk * CHUNK, t1 = smaller(t0 + CHUNK, at.end);
      block.each([&](int thread) {
        in.fetch(in.u, memory + in.layout.u, at, t0, thread);
        in.fetch(gy, memory + in.layout.gy, at, t0, thread);
        states[thread] = in.read(starts, start(at, chunk, thread), in.channel(at, thread), thread);
        in.share(block, matrices[thread], states[thread], t0, thread);
      });
      for (int64_t t = t0; t < t1; t++)
        block.each([&](int thread) {
          put(memory + in.layout.h + (t - t0) * 2 * S * threads, threads, thread, states[thread]);
          in.step(block, matrices[thread], states[thread], t, s(block, t), thread);
        });
      for (int64_t t = t1 - 1; t >= t0 - 1; t--)
        block.each([&](int thread) {
          if (t + 1 < t1) close(block, matrices[thread], gradients[thread], states[thread], carried[thread], t + 1, thread);
          if (t >= t0) open(block, matrices[thread], gradients[thread], states[thread], carried[thread], t, thread);
        });
      block.each([&](int thread) { in.write_sums(block, gu, T(1), at, t0, thread); });
    }
    block.each([&](int thread) { write(block, at, gradients[thread], carried[thread], thread); });
  }

  DEVICE int64_t start(const typename System<T>::Place& at, int64_t chunk, int thread) const {  // the number of a state in `starts`
    return (at.row * in.sizes.D + in.channel(at, thread)) * parts(in.sizes.L, CHUNK) + chunk;
  }
  DEVICE T* s(const Block& block, int64_t t) const {
    return block.memory<T>() + in.layout.s + t % CHUNK * in.sizes.R * in.layout.channels;
  }

  // h: the state behind step t
  DEVICE void open(
      const Block& block, const Matrices<T>& A, Matrices<T>& to, const States<T>& h, States<T>& g, int64_t t, int thread) const {
    T* const memory = block.memory<T>();
    const int64_t step = t % CHUNK, token = step * in.layout.channels + thread % in.layout.channels;
    const T u = memory[in.layout.u + token], twice = 2 * memory[in.layout.gy + token];
    T of_u = 0;
    UNROLL for (int n = 0; n < S; n++) {
      g.at[n] = g.at[n] + twice * conjugate(A.C.at[n]);
      to.C.at[n] = to.C.at[n] + twice * conjugate(h.at[n]);
      to.b.at[n] = to.b.at[n] + u * g.at[n];
      of_u += product(conjugate(A.b.at[n]), g.at[n]);
    }
    memory[in.layout.out + step * in.layout.threads + thread] = of_u;
    for (int64_t j = 0; j < in.sizes.R; j++) {
      const States<T> right = in.column_of(block, A, j, System<T>::RIGHT, thread);
      T sum = 0;
      UNROLL for (int n = 0; n < S; n++) sum += product(conjugate(right.at[n]), g.at[n]);
      in.dots(block, t, j)[thread] = sum;
    }
  }

  // h becomes the state before step t
  DEVICE void close(const Block& block, const Matrices<T>& A, Matrices<T>& to, States<T>& h, States<T>& g, int64_t t, int thread) const {
    const int c = thread % in.layout.channels, threads = in.layout.threads;
    States<T> more;
    h = fetched(block.memory<T>() + in.layout.h + t % CHUNK * 2 * S * threads, threads, thread);
    UNROLL for (int n = 0; n < S; n++) {
      to.d.at[n] = to.d.at[n] + g.at[n] * conjugate(h.at[n]);
      more.at[n] = conjugate(A.d.at[n]) * g.at[n];
    }
    for (int64_t j = 0; j < in.sizes.R; j++) {
      const T before = s(block, t)[j * in.layout.channels + c], q = -2 * in.over_groups(in.dots(block, t, j), c);
      const States<T> left = in.column_of(block, A, j, System<T>::LEFT, thread);
      UNROLL for (int n = 0; n < S; n++) more.at[n] = more.at[n] + q * conjugate(left.at[n]);
      if (!j) {
        low_rank(to.right, to.left, g, h, before, q);
        continue;
      }
      T* const columns[] = {
          in.column(block, in.layout.of_columns, j, System<T>::RIGHT), in.column(block, in.layout.of_columns, j, System<T>::LEFT)};
      States<T> to_right = fetched(columns[0], threads, thread), to_left = fetched(columns[1], threads, thread);
      low_rank(to_right, to_left, g, h, before, q);
      put(columns[0], threads, thread, to_right), put(columns[1], threads, thread, to_left);
    }
    UNROLL for (int n = 0; n < S; n++) g.at[n] = g.at[n] + more.at[n];
  }
  DEVICE static void low_rank(States<T>& right, States<T>& left, const States<T>& g, const States<T>& h, T s, T q) {
    UNROLL for (int n = 0; n < S; n++) right.at[n] = right.at[n] - s * g.at[n], left.at[n] = left.at[n] + q * conjugate(h.at[n]);
  }

  DEVICE void write(const Block& block, const typename System<T>::Place& at, const Matrices<T>& of, const States<T>& g, int thread) const {
    const int64_t c = in.channel(at, thread), D = in.sizes.D, R = in.sizes.R, here = at.row * D + c;
    in.write(gh0, here, c, thread, g);
    in.write(gd, here, c, thread, of.d), in.write(gb, here, c, thread, of.b), in.write(gC, here, c, thread, of.C);
    in.write(gright, at.row * R * D + c, c, thread, of.right), in.write(gleft, at.row * R * D + c, c, thread, of.left);
    for (int64_t j = 1; j < R; j++) {
      T *const right = in.column(block, in.layout.of_columns, j, System<T>::RIGHT);
      T *const left = in.column(block, in.layout.of_columns, j, System<T>::LEFT);
      in.write(gright, (at.row * R + j) * D + c, c, thread, fetched(right, in.layout.threads, thread));
      in.write(gleft, (at.row * R + j) * D + c, c, thread, fetched(left, in.layout.threads, thread));
    }
  }
};

template <class T> int64_t forward(const System<T>& in, T* y, T* last, int64_t stream) {
  const int64_t blocks = in.sizes.B * parts(in.sizes.D, in.layout.channels);
  return launch(Forward<T>{in, y, last}, blocks, in.layout.threads, in.layout.bytes(), stream);
}
template <class T> int64_t backward(const Backward<T>& kernel, int64_t stream) {
  const System<T>& in = kernel.in;
  const int64_t blocks = in.sizes.B * parts(in.sizes.D, in.layout.channels);
  return launch(kernel, blocks, in.layout.threads, in.layout.bytes(), stream);
}

}  // namespace

// N / STATES <= THREADS and R <= 4, or a launch is refused. Of each row come gd, gright, gleft, gb and gC; the caller adds them up. starts:
// memory for the backward pass, (B, D, chunks, N, 2).
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t dplr_scan_##NAME(                                                                                                        \
      const T* u, const T* h0, const T* d, const T* right, const T* left, const T* b, const T* C, const T* ends, T* y, T* last, int64_t B,\
      int64_t L, int64_t D, int64_t N, int64_t R, int64_t stream) {                                                                       \
    const Sizes<T> sizes{B, L, D, N, R};                                                                                                  \
    return forward<T>({u, h0, d, right, left, b, C, ends, sizes, layout_of(sizes, false)}, y, last, stream);                              \
  }                                                                                                                                       \
  EXPORT int64_t dplr_scan_backward_##NAME(                                                                                               \
      const T* gy, const T* glast, const T* u, const T* h0, const T* d, const T* right, const T* left, const T* b, const T* C,            \
      const T* ends, T* starts, T* gu, T* gh0, T* gd, T* gright, T* gleft, T* gb, T* gC, int64_t B, int64_t L, int64_t D, int64_t N,      \
      int64_t R, int64_t stream) {                                                                                                        \
    const Sizes<T> sizes{B, L, D, N, R};                                                                                                  \
    const System<T> in{u, h0, d, right, left, b, C, ends, sizes, layout_of(sizes, true)};                                                 \
    return backward(Backward<T>{in, gy, glast, starts, gu, gh0, gd, gright, gleft, gb, gC}, stream);                                      \
  }

DEFINE(float32, float)
DEFINE(float64, double)
