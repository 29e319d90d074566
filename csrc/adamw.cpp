// AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101) over every parameter in one pass, as torch.optim.AdamW:
//   g = coefficient * grad,   coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
//   exp_avg    += (1 - beta1) * (g - exp_avg)
//   exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   param       = param * (1 - lr * weight_decay)
//               - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
// param is float32, or the rounded copy of a float32 master, which is what is updated; where it is another number than
// that, somebody wrote it, and the master begins from it.
// Work is cut into chunks of all tensors laid end to end, so threads share it evenly and sums have one order.
#include "isa.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {

typedef double vd __attribute__((vector_size(4 * W)));
typedef float vf_half __attribute__((vector_size(2 * W)));

struct TensorRow {
  int64_t param, grad, exp_avg, exp_avg_sq, master, step, numel, group, dtype, first_chunk;
};

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, maximize;
};

// The row that chunk number `k` falls in.
static const TensorRow& row_of(const TensorRow* rows, int64_t tensors, int64_t k) {
  int64_t low = 0, high = tensors - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (rows[middle].first_chunk <= k)
      low = middle;
    else
      high = middle - 1;
  }
  return rows[low];
}

template <class T>
static double sum_of_squares(const T* g, int64_t n) {
  vd sum[2] = {};
  for (int64_t i = 0; i < n; i += W) {
    vf v = load_n(g + i, n - i);
    vf_half halves[2];
    memcpy(halves, &v, sizeof(v));
    for (int k = 0; k < 2; ++k) {
      vd d = __builtin_convertvector(halves[k], vd);
      sum[k] += d * d;
    }
  }
  vd total = sum[0] + sum[1];
  double r = 0.0;
  for (int i = 0; i < W / 2; ++i) r += total[i];
  return r;
}

void adamw_grad_norm(addr table, int64_t tensors, int64_t chunks, int64_t chunk, addr partial, addr norm) {
  const TensorRow* rows = (const TensorRow*)table;
  double* sums = (double*)partial;
  GPT2_PARALLEL_FOR(k, chunks) {
    const TensorRow& row = row_of(rows, tensors, k);
    int64_t start = (k - row.first_chunk) * chunk, n = row.numel - start < chunk ? row.numel - start : chunk;
    GPT2_DISPATCH(row.dtype, T, { sums[k] = sum_of_squares((const T*)row.grad + start, n); });
  }
  double total = 0.0;
  for (int64_t k = 0; k < chunks; ++k) total += sums[k];
  *(float*)norm = (float)sqrt(total);
}

struct Factors {
  float gradient, decay, average, square_keep, square_add, step_size, root_scale, eps;
};

static Factors factors_of(const Hyper& h, double step, double coefficient) {
  double correction1 = 1.0 - pow(h.beta1, step), correction2 = 1.0 - pow(h.beta2, step);
  return {(float)(h.maximize != 0.0 ? -coefficient : coefficient),
          (float)(1.0 - h.lr * h.weight_decay),
          (float)(1.0 - h.beta1),
          (float)h.beta2,
          (float)(1.0 - h.beta2),
          (float)(h.lr / correction1),
          (float)(1.0 / sqrt(correction2)),
          (float)h.eps};
}

// The master of each element: as it is where param is its rounding, bit for bit; else param, which was written since. A
// NaN needs no care: the master becomes one, whichever of the two it was.
template <class T>
GPT2_INLINE vf master_of(const T* param, vf master, int64_t left) {
  vf written = load_n(param, left);
  return select(as<vi>(written) == as<vi>(rounded<T>(master)), master, written);
}

template <class T, bool MASTER>
static void update(const TensorRow& row, int64_t start, int64_t n, const Factors& f) {
  T* param = (T*)row.param + start;
  const T* grad = (const T*)row.grad + start;
  float *m = (float*)row.exp_avg + start, *v = (float*)row.exp_avg_sq + start;
  float* master = MASTER ? (float*)row.master + start : nullptr;
  for (int64_t i = 0; i < n; i += W) {
    int64_t left = n - i;
    vf p = MASTER ? master_of(param + i, load_n(master + i, left), left) : load_n(param + i, left);
    vf g = load_n(grad + i, left) * f.gradient;
    vf average = load_n(m + i, left), square = load_n(v + i, left);
    average += (g - average) * f.average;
    square = square * f.square_keep + g * g * f.square_add;
    p = p * f.decay - f.step_size * (average / (vsqrt(square) * f.root_scale + f.eps));
    store_n(m + i, average, left);
    store_n(v + i, square, left);
    if (MASTER) store_n(master + i, p, left);
    store_n(param + i, p, left);
  }
}

void adamw_update(addr table, int64_t tensors, int64_t chunks, int64_t chunk, addr hyper, addr norm, double max_norm,
                  addr grad_scale, addr found_inf) {
  const TensorRow* rows = (const TensorRow*)table;
  if (found_inf && *(const float*)found_inf != 0.0f) return;
  if (grad_scale && norm && !(*(const float*)norm < INFINITY)) return;
  double coefficient = max_norm < 0.0 ? 1.0 : max_norm / ((double)*(const float*)norm + 1e-6);
  if (coefficient > 1.0) coefficient = 1.0;
  if (grad_scale) coefficient /= (double)*(const float*)grad_scale;
  GPT2_PARALLEL_FOR(k, chunks) {
    const TensorRow& row = row_of(rows, tensors, k);
    int64_t start = (k - row.first_chunk) * chunk, n = row.numel - start < chunk ? row.numel - start : chunk;
    Factors f = factors_of(((const Hyper*)hyper)[row.group], *(const float*)row.step, coefficient);
    GPT2_DISPATCH(row.dtype, T, {
      if (row.master)
        update<T, true>(row, start, n, f);
      else
        update<T, false>(row, start, n, f);
    });
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
