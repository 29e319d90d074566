// u = product + bias, y = gelu(u), and back. GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415) is u * Phi(u), Phi the
// standard normal's distribution function, and GPT-2's is its approximation by tanh:
//   tanh:  gelu(u) = u / 2 * (1 + tanh(z)) = u * s,   z = sqrt(2 / pi) * (u + 0.044715 u^3),   s = 1 / (1 + exp(-2 z))
//          gelu'(u) = s + u * s * (1 - s) * 2 dz/du
//   erf:   gelu(u) = u / 2 * (1 + erf(u / sqrt(2))) = u * Phi(u),   gelu'(u) = Phi(u) + u * exp(-u^2 / 2) / sqrt(2 pi)
#include "isa.h"
#include "kernels.h"

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

template <class Gelu, class TP, class TU, class TY>
static void forward(const TP* product, const float* bias, TU* u, TY* y, int64_t N, int64_t F) {
  GPT2_PARALLEL_FOR(i, N) {
    for (int64_t c = 0; c < F; c += W) {
      int64_t n = F - c, o = i * F + c;
      vf v = rounded<TU>(load_n(product + o, n) + load_n(bias + c, n));
      if (u) store_n(u + o, v, n);
      store_n(y + o, Gelu::value(v), n);
    }
  }
}

template <class Gelu, class TG, class TU, class TO>
static void backward(const TG* dy, const TU* u, TO* du, float* partial, int64_t chunks, int64_t N, int64_t F) {
  int64_t rows = (N + chunks - 1) / chunks;
  GPT2_PARALLEL_FOR(k, chunks) {
    float* dbias = partial + k * F;
    memset(dbias, 0, F * sizeof(float));
    int64_t end = (k + 1) * rows < N ? (k + 1) * rows : N;
    for (int64_t i = k * rows; i < end; ++i) {
      for (int64_t c = 0; c < F; c += W) {
        int64_t n = F - c, o = i * F + c;
        vf g = load_n(dy + o, n) * Gelu::derivative(load_n(u + o, n));
        store_n(du + o, g, n);
        store_n(dbias + c, load_n(dbias + c, n) + g, n);
      }
    }
  }
}

void bias_gelu_forward(addr product, addr bias, addr u, addr y, int64_t N, int64_t F, int64_t product_dtype,
                       int64_t u_dtype, int64_t y_dtype, bool erf) {
  GPT2_DISPATCH(product_dtype, TP, GPT2_DISPATCH(u_dtype, TU, GPT2_DISPATCH(y_dtype, TY, {
    auto run = erf ? forward<ErfGelu, TP, TU, TY> : forward<TanhGelu, TP, TU, TY>;
    run((const TP*)product, (const float*)bias, (TU*)u, (TY*)y, N, F);
  })));
}

void bias_gelu_backward(addr dy, addr u, addr du, addr partial, int64_t chunks, addr dbias, int64_t N,
                        int64_t F, int64_t dy_dtype, int64_t u_dtype, int64_t du_dtype, bool erf) {
  GPT2_DISPATCH(dy_dtype, TG, GPT2_DISPATCH(u_dtype, TU, GPT2_DISPATCH(du_dtype, TO, {
    auto run = erf ? backward<ErfGelu, TG, TU, TO> : backward<TanhGelu, TG, TU, TO>;
    run((const TG*)dy, (const TU*)u, (TO*)du, (float*)partial, chunks, N, F);
  })));
  sum_partials((const float*)partial, chunks, F, (float*)dbias, F);
}

}  // namespace GPT2_ISA
}  // namespace gpt2
