// u = product + bias, y = gelu(u), and back; the tanh form of GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415):
//   gelu(u) = u / 2 * (1 + tanh(z)) = u * s,   z = sqrt(2 / pi) * (u + 0.044715 u^3),   s = 1 / (1 + exp(-2 z))
//   gelu'(u) = s + u * s * (1 - s) * 2 dz/du
#include "isa.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {

constexpr float K = 0.7978845608028654f, A = 0.044715f;  // sqrt(2 / pi)

GPT2_INLINE vf gelu(vf u) { return u / (1.0f + vexp(-2.0f * K * u * (1.0f + A * u * u))); }

GPT2_INLINE vf gelu_derivative(vf u) {
  // Clamped, so that e is finite: far below zero s is a denormal's neighbour and 1 - s = e * s still 1.
  vf square = u * u, e = vexp(vmin(-2.0f * K * u * (1.0f + A * square), splat(80.0f)));
  vf s = 1.0f / (1.0f + e);
  return s + u * s * (e * s) * (2.0f * K) * (1.0f + 3.0f * A * square);
}

template <class TP, class TU, class TY>
static void forward(const TP* product, const float* bias, TU* u, TY* y, int64_t N, int64_t F) {
  GPT2_PARALLEL_FOR(i, N) {
    for (int64_t c = 0; c < F; c += W) {
      int64_t n = F - c, o = i * F + c;
      vf v = rounded<TU>(load_n(product + o, n) + load_n(bias + c, n));
      if (u) store_n(u + o, v, n);
      store_n(y + o, gelu(v), n);
    }
  }
}

template <class TG, class TU, class TO>
static void backward(const TG* dy, const TU* u, TO* du, float* partial, int64_t chunks, int64_t N, int64_t F) {
  int64_t rows = (N + chunks - 1) / chunks;
  GPT2_PARALLEL_FOR(k, chunks) {
    float* dbias = partial + k * F;
    memset(dbias, 0, F * sizeof(float));
    int64_t end = (k + 1) * rows < N ? (k + 1) * rows : N;
    for (int64_t i = k * rows; i < end; ++i) {
      for (int64_t c = 0; c < F; c += W) {
        int64_t n = F - c, o = i * F + c;
        vf g = load_n(dy + o, n) * gelu_derivative(load_n(u + o, n));
        store_n(du + o, g, n);
        store_n(dbias + c, load_n(dbias + c, n) + g, n);
      }
    }
  }
}

void bias_gelu_forward(addr product, addr bias, addr u, addr y, int64_t N, int64_t F, int64_t product_dtype,
                       int64_t u_dtype, int64_t y_dtype) {
  GPT2_DISPATCH(product_dtype, TP, GPT2_DISPATCH(u_dtype, TU, GPT2_DISPATCH(y_dtype, TY, {
    forward((const TP*)product, (const float*)bias, (TU*)u, (TY*)y, N, F);
  })));
}

void bias_gelu_backward(addr dy, addr u, addr du, addr partial, int64_t chunks, addr dbias, int64_t N,
                        int64_t F, int64_t dy_dtype, int64_t u_dtype, int64_t du_dtype) {
  GPT2_DISPATCH(dy_dtype, TG, GPT2_DISPATCH(u_dtype, TU, GPT2_DISPATCH(du_dtype, TO, {
    backward((const TG*)dy, (const TU*)u, (TO*)du, (float*)partial, chunks, N, F);
  })));
  sum_partials((const float*)partial, chunks, F, (float*)dbias, F);
}

}  // namespace GPT2_ISA
}  // namespace gpt2
