// GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415) is u * Phi(u), Phi the standard normal's distribution function, and
// GPT-2's is its approximation by tanh:
//   tanh:  gelu(u) = u / 2 * (1 + tanh(z)) = u * s,   z = sqrt(2 / pi) * (u + 0.044715 u^3),   s = 1 / (1 + exp(-2 z))
//          gelu'(u) = s + u * s * (1 - s) * 2 dz/du
//   erf:   gelu(u) = u / 2 * (1 + erf(u / sqrt(2))) = u * Phi(u),   gelu'(u) = Phi(u) + u * exp(-u^2 / 2) / sqrt(2 pi)
#pragma once

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {

struct TanhGelu {
  static constexpr float K = 0.7978845608028654f, A = 0.044715f;  // sqrt(2 / pi)

  GPT2_INLINE vf value(vf u) { return u / (1.0f + vexp(-2.0f * K * u * (1.0f + A * u * u))); }

  GPT2_INLINE vf derivative(vf u) {
    // Clamped, so that e is finite: far below zero s is a denormal's neighbour and 1 - s = e * s still 1.
    vf square = u * u, e = vexp(vmin(-2.0f * K * u * (1.0f + A * square), splat(80.0f)));
    vf s = 1.0f / (1.0f + e);
    return s + u * s * (e * s) * (2.0f * K) * (1.0f + 3.0f * A * square);
  }
};

struct ErfGelu {
  // Phi(u), and e = exp(-u^2 / 2). Phi(-a) = e * t * p(t) with t = 1 / (1 + 0.345 a), a >= 0: p is the polynomial of
  // degree 8 with the least relative error for a <= 14, 2e-8, beyond which e is 0 (Remez, in 40 digits). With float32's
  // rounding the relative error of Phi is below 4e-7, far in the tail too, where 1 + erf cancels.
  GPT2_INLINE vf distribution(vf u, vf& e) {
    vf a = vmax(u, -u), t = 1.0f / (1.0f + 0.345f * a);
    vf p = splat(-0.028381955f);
    p = p * t + 0.14528194f;
    p = p * t - 0.27117303f;
    p = p * t + 0.18719661f;
    p = p * t - 0.037601616f;
    p = p * t + 0.11179957f;
    p = p * t + 0.11723829f;
    p = p * t + 0.13802089f;
    p = p * t + 0.13761929f;
    e = vexp(-0.5f * u * u);
    vf tail = e * t * p;
    return select(u > 0.0f, 1.0f - tail, tail);
  }

  GPT2_INLINE vf value(vf u) {
    vf e;
    return u * distribution(u, e);
  }

  GPT2_INLINE vf derivative(vf u) {
    vf e, phi = distribution(u, e);
    return phi + u * e * 0.3989422804014327f;  // 1 / sqrt(2 pi)
  }
};

}  // namespace GPT2_ISA
}  // namespace gpt2
