// u = product + bias, y = gelu(u), and back.
#include "gelu.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {

template <class Gelu, class P, class T>
static void forward(const P* product, const float* bias, T* u, T* y, int64_t N, int64_t F) {
  GPT2_PARALLEL_FOR(i, N) {
    for (int64_t c = 0; c < F; c += W) {
      int64_t n = F - c, o = i * F + c;
      vf v = rounded<T>(load_n(product + o, n) + load_n(bias + c, n));
      if (u) store_n(u + o, v, n);
      store_n(y + o, Gelu::value(v), n);
    }
  }
}

template <class Gelu, class T>
static void gelu_rows(const T* u, T* y, int64_t N, int64_t F) {
  GPT2_PARALLEL_FOR(i, N) {
    for (int64_t c = 0; c < F; c += W) store_n(y + i * F + c, Gelu::value(load_n(u + i * F + c, F - c)), F - c);
  }
}

template <class Gelu, class P, class T>
static void backward(const T* dy, const T* u, P* du, float* partial, int64_t chunks, int64_t N, int64_t F) {
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

// `body` with P bound to the element type of the product and T to that of the rest.
#define GPT2_PRODUCT_DISPATCH(product_dtype, P, dtype, T, ...) \
  do { \
    if ((product_dtype) == BF16) { \
      using P = bf16; \
      using T = bf16; \
      __VA_ARGS__; \
    } else { \
      using P = float; \
      GPT2_DISPATCH(dtype, T, __VA_ARGS__); \
    } \
  } while (0)

void bias_gelu_forward(addr product, addr bias, addr u, addr y, int64_t N, int64_t F, int64_t product_dtype,
                       int64_t dtype, bool erf) {
  GPT2_PRODUCT_DISPATCH(product_dtype, P, dtype, T, {
    auto run = erf ? forward<ErfGelu, P, T> : forward<TanhGelu, P, T>;
    run((const P*)product, (const float*)bias, (T*)u, (T*)y, N, F);
  });
}

void bias_gelu_backward(addr dy, addr u, addr du, addr partial, int64_t chunks, addr dbias, int64_t N,
                        int64_t F, int64_t product_dtype, int64_t dtype, bool erf) {
  GPT2_PRODUCT_DISPATCH(product_dtype, P, dtype, T, {
    auto run = erf ? backward<ErfGelu, P, T> : backward<TanhGelu, P, T>;
    run((const T*)dy, (const T*)u, (P*)du, (float*)partial, chunks, N, F);
  });
  sum_partials((const float*)partial, chunks, F, (float*)dbias, F);
}

void gelu(addr u, addr y, int64_t N, int64_t F, int64_t dtype, bool erf) {
  GPT2_DISPATCH(dtype, T, {
    auto run = erf ? gelu_rows<ErfGelu, T> : gelu_rows<TanhGelu, T>;
    run((const T*)u, (T*)y, N, F);
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
