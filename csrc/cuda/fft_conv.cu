// A causal convolution as long as the sequence.      y_t = sum_{s <= t} K_s u_{t - s} + D u_t
//
// u, y (B, L, channels), K (channels, taps), D (channels). Real polynomials are multiplied modulo x^n - i, n >= L: the product is lo + i hi, and
// lo is the causal convolution (as in cpu/fft_conv.cpp); transform.h has the transform. A block takes as many adjacent channels as fit, reads
// them side by side, and goes through rows one after the other, the transform of K in registers. Backwards in time, t' = L - 1 - t, the
// gradients are causal convolutions too: gu' = K * gy' and gK' = sum_b u * gy'; gD = gK_0.
//
// What limits it is the shared memory: a sequence must fit, 8192 numbers in float, 4096 in double. The longest ones take a channel a block and
// read a number of each line of memory at a time, which leaves it to the cache to bring a line once.
#include "transform.h"

namespace {

constexpr int THREADS = 512;
template <class T> constexpr int64_t LONGEST = 32768 / sizeof(T);
constexpr int64_t BLOCKS = 256;  // that fill a GPU

template <class T> struct Layout {
  Transform<T> transform;
  int64_t B, L, channels, taps;
  int64_t side_by_side;  // channels of a block
  Layout(int64_t B, int64_t L, int64_t channels, int64_t taps)
      : transform(L), B(B), L(L), channels(channels), taps(taps), side_by_side(larger<int64_t>(1, smaller<int64_t>(32, LONGEST<T> / transform.n))) {}
  int64_t groups() const { return parts(channels, side_by_side); }
  int threads() const { return int(transform.threads() * side_by_side); }
  int64_t bytes() const { return transform.room() * side_by_side * int64_t(sizeof(Complex<T>)); }

  // (L, channels) of a row to the channels of a block, from d0 on, zeros behind; reversed: time L - 1 comes first.
  DEVICE void read(const Block& block, const T* from, Complex<T>* values, int64_t row, int64_t d0, bool reversed) const {
    block.each([&](int thread) {
      for (int64_t i = thread; i < transform.n * side_by_side; i += block.threads()) {
        const int64_t t = i / side_by_side, c = i % side_by_side, time = reversed ? L - 1 - t : t;
        const T value = t < L && d0 + c < channels ? from[(row * L + time) * channels + d0 + c] : T(0);
        values[c * transform.room() + transform.slot(t)] = {value, T(0)};
      }
    });
  }
};

template <class T> struct Convolve {
  static constexpr int THREADS = ::THREADS;
  Layout<T> layout;
  const T* RESTRICT u;
  const T* RESTRICT K;
  const T* RESTRICT D;
  T* RESTRICT y;
  bool reversed;   // backwards in time
  int64_t splits;  // blocks that share the rows of a group of channels

  DEVICE void operator()(const Block& block) const {
    const Transform<T>& transform = layout.transform;
    const int64_t side_by_side = layout.side_by_side, d0 = block.index / splits * side_by_side, channels = layout.channels, L = layout.L;
    Complex<T>* const values = block.memory<Complex<T>>();
    Local<Leaf<T>> factor(block);
    block.each([&](int thread) {  // K / n, where D is a part of K_0
      for (int64_t i = thread; i < transform.n * side_by_side; i += block.threads()) {
        const int64_t c = i / transform.n, t = i % transform.n, d = d0 + c;
        T value = t < layout.taps && d < channels ? K[d * layout.taps + t] : T(0);
        if (!t && d < channels) value += D[d];
        values[c * transform.room() + transform.slot(t)] = {value / T(transform.n), T(0)};
      }
    });
    transform.fall(block, values);
    block.each([&](int thread) { factor[thread] = transform.take(values, thread); });
    for (int64_t row = block.index % splits; row < layout.B; row += splits) {
      layout.read(block, u, values, row, d0, reversed);
      transform.fall(block, values);
      block.each([&](int thread) {
        Leaf<T> leaf = transform.take(values, thread);
        UNROLL for (int i = 0; i < POINTS; i++) leaf.at[i] = leaf.at[i] * factor[thread].at[i];
        transform.put(leaf, values, thread);
      });
      transform.rise(block, values);
      block.each([&](int thread) {
        for (int64_t i = thread; i < L * side_by_side; i += block.threads()) {
          const int64_t t = i / side_by_side, c = i % side_by_side, time = reversed ? L - 1 - t : t;
          if (d0 + c < channels) y[(row * L + time) * channels + d0 + c] = values[c * transform.room() + transform.slot(t)].re;
        }
      });
    }
  }
};

template <class T> struct OfKernel {
  static constexpr int THREADS = ::THREADS;
  Layout<T> layout;
  const T* RESTRICT u;
  const T* RESTRICT gy;
  T* RESTRICT gK;
  T* RESTRICT gD;

  DEVICE void operator()(const Block& block) const {
    const Transform<T>& transform = layout.transform;
    const int64_t d0 = block.index * layout.side_by_side, taps = layout.taps;
    Complex<T>* const values = block.memory<Complex<T>>();
    Local<Leaf<T>> of_u(block), total(block);
    block.each([&](int thread) { total[thread] = Leaf<T>{}; });
    for (int64_t row = 0; row < layout.B; row++) {
      layout.read(block, u, values, row, d0, false);
      transform.fall(block, values);
      block.each([&](int thread) { of_u[thread] = transform.take(values, thread); });
      layout.read(block, gy, values, row, d0, true);
      transform.fall(block, values);
      block.each([&](int thread) {
        const Leaf<T> of_gy = transform.take(values, thread);
        UNROLL for (int i = 0; i < POINTS; i++) total[thread].at[i] = total[thread].at[i] + of_u[thread].at[i] * of_gy.at[i];
      });
    }
    block.each([&](int thread) { transform.put(total[thread], values, thread); });
    transform.rise(block, values);
    block.each([&](int thread) {
      auto at = [&](int64_t c, int64_t t) { return values[c * transform.room() + transform.slot(layout.L - 1 - t)].re / T(transform.n); };
      for (int64_t i = thread; i < taps * layout.side_by_side; i += block.threads())
        if (d0 + i / taps < layout.channels) gK[(d0 + i / taps) * taps + i % taps] = at(i / taps, i % taps);
      for (int64_t c = thread; c < layout.side_by_side && d0 + c < layout.channels; c += block.threads()) gD[d0 + c] = layout.L ? at(c, 0) : T(0);
    });
  }
};

template <class T>
int64_t convolve(const Layout<T>& layout, const T* u, const T* K, const T* D, T* y, bool reversed, int64_t stream) {
  if (layout.B * layout.L * layout.channels == 0) return 0;
  const int64_t splits = larger<int64_t>(1, smaller(layout.B, BLOCKS / layout.groups()));
  return launch(Convolve<T>{layout, u, K, D, y, reversed, splits}, layout.groups() * splits, layout.threads(), layout.bytes(), stream);
}

template <class T>
int64_t backward(const Layout<T>& layout, const T* u, const T* K, const T* D, const T* gy, T* gu, T* gK, T* gD, int64_t stream) {
  const int64_t failed = convolve(layout, gy, K, D, gu, true, stream);
  return failed ? failed : launch(OfKernel<T>{layout, u, gy, gK, gD}, layout.groups(), layout.threads(), layout.bytes(), stream);
}

}  // namespace

// taps <= L <= LONGEST
#define DEFINE(NAME, T)                                                                                                                   \
  EXPORT int64_t fft_conv_##NAME(                                                                                                         \
      const T* u, const T* K, const T* D, T* y, int64_t B, int64_t L, int64_t channels, int64_t taps, int64_t stream) {                   \
    return convolve(Layout<T>(B, L, channels, taps), u, K, D, y, false, stream);                                                          \
  }                                                                                                                                       \
  EXPORT int64_t fft_conv_backward_##NAME(                                                                                                \
      const T* u, const T* K, const T* D, const T* gy, T* gu, T* gK, T* gD, int64_t B, int64_t L, int64_t channels, int64_t taps,         \
      int64_t stream) {                                                                                                                   \
    return backward(Layout<T>(B, L, channels, taps), u, K, D, gy, gu, gK, gD, stream);                                                    \
  }

DEFINE(float32, float)
DEFINE(float64, double)
