// The exponential's relatives, in float and by vectors: sigmoid, SiLU, GELU, softplus, tanh. Errors near 2e-7.
#pragma once

#include "simd.h"

constexpr float LOG2_E = 1.44269504f;

INLINE Vector<float> absolute(Vector<float> x) { return x < 0.f ? -x : x; }

struct Sigmoid {
  INLINE Vector<float> of(Vector<float> x) {
    const Vector<float> t = exp2_decay(absolute(x) * -LOG2_E);
    return (x < 0.f ? t : splat(1.f)) / (1.f + t);
  }
};

struct Silu {
  INLINE Vector<float> of(Vector<float> x) { return x * Sigmoid::of(x); }
};

// log(1 + e^x) = max(x, 0) + log1p(t), t = e^-|x|; log1p(t) = 2 artanh(s), s = t / (2 + t) <= 1/3: small results keep their digits.
struct Softplus {
  INLINE Vector<float> of(Vector<float> x) {
    const Vector<float> t = exp2_decay(absolute(x) * -LOG2_E), s = t / (2.f + t), q = s * s;
    Vector<float> p = splat(1.f / 13);
    p = p * q + 1.f / 11;
    p = p * q + 1.f / 9;
    p = p * q + 1.f / 7;
    p = p * q + 1.f / 5;
    p = p * q + 1.f / 3;
    p = p * q + 1.f;
    return (x < 0.f ? Vector<float>{} : x) + 2.f * s * p;
  }
};

struct Relu {
  INLINE Vector<float> of(Vector<float> x) { return x > 0.f ? x : Vector<float>{}; }
};

// x Phi(x), the exact form. Phi of a negative number is erfc / 2 = t p(t) e^(-z^2) / 2 (Abramowitz and Stegun, 7.1.26).
struct Gelu {
  INLINE Vector<float> of(Vector<float> x) {
    const Vector<float> z = absolute(x) * 0.707106781f, t = 1.f / (1.f + 0.3275911f * z);
    Vector<float> p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vector<float> tail = 0.5f * p * t * exp2_decay(z * z * -LOG2_E);
    return x * (x < 0.f ? tail : 1.f - tail);
  }
};

// Small numbers by Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ..))), whose first five terms are good for 6e-8 up to 1; the
// others from t = e^-2|x|, where 1 - t keeps its digits.
struct Tanh {
  INLINE Vector<float> of(Vector<float> x) {
    const Vector<float> q = x * x, small = x * ((q + 105.f) * q + 945.f) / ((15.f * q + 420.f) * q + 945.f);
    const Vector<float> t = exp2_decay(absolute(x) * (-2 * LOG2_E)), large = (1.f - t) / (1.f + t);
    return q < 1.f ? small : (x < 0.f ? -large : large);
  }
};
