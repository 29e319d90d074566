// u = product + bias, y = gelu(u), and back.
#include "gelu.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {

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
