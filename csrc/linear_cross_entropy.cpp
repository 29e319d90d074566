// Cross-entropy of a chunk of logits and, in place, its gradient.
//
// Each row is walked three times while the second-level cache holds it: maximum; exponentials and their sum;
// gradient. float32 logits are replaced by their exponentials, so exp is taken once.
#include "isa.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {

template <class T>
GPT2_INLINE constexpr bool is_float(const T*) { return false; }
GPT2_INLINE constexpr bool is_float(const float*) { return true; }

template <class T>
GPT2_INLINE float row_max(const T* x, int64_t V) {
  vf m[4];
  for (int k = 0; k < 4; ++k) m[k] = splat(-__builtin_inff());
  int64_t c = 0;
  for (; c + 4 * W <= V; c += 4 * W)
    for (int k = 0; k < 4; ++k) m[k] = vmax(load(x + c + k * W), m[k]);
  for (; c < V; c += W) m[0] = vmax(load_n(x + c, V - c, -__builtin_inff()), m[0]);
  return hmax(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
}

// sum(exp(x - m)); with STORE, x becomes exp(x - m).
template <bool STORE, class T>
GPT2_INLINE float exp_sum(T* x, float m, int64_t V) {
  vf sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * W <= V; c += 2 * W) {
    for (int k = 0; k < 2; ++k) {
      vf e = vexp(load(x + c + k * W) - m);
      if (STORE) store(x + c + k * W, e);
      sum[k] += e;
    }
  }
  for (; c < V; c += W) {
    vf e = vexp(load_n(x + c, V - c, -__builtin_inff()) - m);
    if (STORE) store_n(x + c, e, V - c);
    sum[0] += e;
  }
  return hsum(sum[0] + sum[1]);
}

template <class T>
static void rows(T* logits, int64_t stride, const int64_t* labels, float* losses, T* dlogits, const float* row_scale,
                 int64_t scale_stride, int64_t n, int64_t V, int64_t ignore_index) {
  GPT2_PARALLEL_FOR(i, n) {
    T* x = logits + i * stride;
    T* dx = dlogits ? dlogits + i * stride : nullptr;
    int64_t label = labels[i];
    if (label == ignore_index) {
      losses[i] = 0.0f;
      if (dx) memset(dx, 0, V * sizeof(T));
      continue;
    }
    constexpr bool STORE = is_float((const T*)nullptr);
    float target = load_tail(x + label, 1)[0];
    float m = row_max(x, V);
    float sum = dx ? exp_sum<STORE>(x, m, V) : exp_sum<false>(x, m, V);
    // Not (m + log(sum)) - target: for a confident row that cancels.
    losses[i] = (float)(log((double)sum) + ((double)m - (double)target));
    if (!dx) continue;
    float scale = row_scale[i * scale_stride], factor = scale / sum;
    float at_label = STORE ? load_tail(x + label, 1)[0] : (vexp(splat(target - m)))[0];
    for (int64_t c = 0; c < V; c += W) {
      vf v = load_n(x + c, V - c);
      store_n(dx + c, (STORE ? v : vexp(v - m)) * factor, V - c);
    }
    store_tail(dx + label, splat((at_label - sum) * factor), 1);
  }
}

void softmax_xent(addr logits, int64_t stride, addr labels, addr losses, addr dlogits, addr row_scale,
                  int64_t scale_stride, int64_t n, int64_t V, int64_t ignore_index, int64_t dtype) {
  GPT2_DISPATCH(dtype, T, {
    rows((T*)logits, stride, (const int64_t*)labels, (float*)losses, (T*)dlogits, (const float*)row_scale,
         scale_stride, n, V, ignore_index);
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
