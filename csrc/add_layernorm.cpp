// h = residual + dropout(x), y = (h - mean) * rstd * weight + bias, and the gradients of both.
//
// A row is read from memory once: the later passes over it find it in the first-level cache. Statistics are of h
// as stored (rounded to its dtype), mean first and then the centred variance, in float32.
#include "isa.h"
#include "kernels.h"
#include "philox_simd.h"

namespace gpt2 {
namespace GPT2_ISA {

constexpr int ROW_STEP = 2 * KEEP_COLS;  // columns, eight vectors

// h = residual + dropout(x) for one row; returns its sum.
template <class TX, class TH>
GPT2_INLINE float add_row(const TX* x, const TH* residual, TH* h, int64_t C, const Dropout& d, int64_t row) {
  vf sum[4] = {};
  int8_t keep[ROW_STEP];
  for (int64_t c = 0; c < C; c += ROW_STEP) {
    if (d.on) keep_columns<2>(d, (uint32_t)row, c, keep);
    for (int k = 0; k < ROW_STEP / W; ++k) {
      int64_t o = c + k * W, n = C - o;
      if (n <= 0) break;
      vf v = load_n(x + o, n);
      if (d.on) v = apply_keep(v, d.scale, keep + k * W);
      v = rounded<TH>(v + load_n(residual + o, n));
      store_n(h + o, v, n);
      sum[k % 4] += v;  // a tail's spare lanes are 0 + 0
    }
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class TH>
GPT2_INLINE float sum_row(const TH* h, int64_t C) {
  vf sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * W <= C; c += 2 * W) {
    sum[0] += load(h + c);
    sum[1] += load(h + c + W);
  }
  for (; c < C; c += W) sum[0] += load_n(h + c, C - c);
  return hsum(sum[0] + sum[1]);
}

template <class TH>
GPT2_INLINE float centred_squares(const TH* h, float mean, int64_t C) {
  vf sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * W <= C; c += 2 * W) {
    vf a = load(h + c) - mean, b = load(h + c + W) - mean;
    sum[0] += a * a;
    sum[1] += b * b;
  }
  for (; c < C; c += W) {
    vf a = load_n(h + c, C - c, mean) - mean;
    sum[0] += a * a;
  }
  return hsum(sum[0] + sum[1]);
}

template <class TH, class TY>
GPT2_INLINE void normalize_row(const TH* h, const float* weight, const float* bias, TY* y, float m, float r,
                               int64_t C) {
  for (int64_t c = 0; c < C; c += W) {
    int64_t n = C - c;
    store_n(y + c, (load_n(h + c, n) - m) * r * load_n(weight + c, n) + load_n(bias + c, n), n);
  }
}

template <class TX, class TH, class TY>
static void forward(const TX* x, const TH* residual, const float* weight, const float* bias, TY* y, TH* h,
                    float* mean, float* rstd, int64_t N, int64_t C, double eps, const Dropout& d) {
  GPT2_PARALLEL_FOR(i, N) {
    const TH* row = residual ? h + i * C : (const TH*)x + i * C;
    float sum = residual ? add_row<TX, TH>(x + i * C, residual + i * C, h + i * C, C, d, i)
                         : sum_row(row, C);
    float m = sum / (float)C;
    float r = (float)(1.0 / sqrt((double)centred_squares(row, m, C) / (double)C + eps));
    mean[i] = m;
    rstd[i] = r;
    normalize_row(row, weight, bias, y + i * C, m, r, C);
  }
}

template <class TH, class TY>
static void normalize(const TH* h, const float* weight, const float* bias, const float* mean, const float* rstd, TY* y,
                      int64_t N, int64_t C) {
  GPT2_PARALLEL_FOR(i, N) { normalize_row(h + i * C, weight, bias, y + i * C, mean[i], rstd[i], C); }
}

// With g = weight * dy and xhat = (h - mean) * rstd:
//   dresidual = dh + rstd * (g - mean_C(g) - xhat * mean_C(g * xhat)),   dx = dropout'(dresidual)
//   dweight = sum_N(dy * xhat),   dbias = sum_N(dy)
template <class TX, class TH, class TY>
GPT2_INLINE void backward_row(const TY* dy, const TH* dh, const TH* h, const float* weight, float m, float r,
                              TX* dx, TH* dresidual, float* dweight, float* dbias, int64_t C,
                              const Dropout& d, int64_t row) {
  vf sum_g = {}, sum_gx = {};
  for (int64_t c = 0; c < C; c += W) {
    int64_t n = C - c;
    vf t = load_n(dy + c, n), xhat = (load_n(h + c, n, m) - m) * r, g = t * load_n(weight + c, n);
    sum_g += g;
    sum_gx += g * xhat;
    store_n(dweight + c, load_n(dweight + c, n) + t * xhat, n);
    store_n(dbias + c, load_n(dbias + c, n) + t, n);
  }
  float mean_g = hsum(sum_g) / (float)C, mean_gx = hsum(sum_gx) / (float)C;
  int8_t keep[ROW_STEP];
  for (int64_t c = 0; c < C; c += ROW_STEP) {
    if (d.on) keep_columns<2>(d, (uint32_t)row, c, keep);
    for (int k = 0; k < ROW_STEP / W; ++k) {
      int64_t o = c + k * W, n = C - o;
      if (n <= 0) break;
      vf xhat = (load_n(h + o, n) - m) * r;
      vf v = (load_n(dy + o, n) * load_n(weight + o, n) - mean_g - xhat * mean_gx) * r;
      if (dh) v += load_n(dh + o, n);
      store_n(dresidual + o, v, n);
      if (dx) store_n(dx + o, d.on ? apply_keep(v, d.scale, keep + k * W) : v, n);
    }
  }
}

template <class TX, class TH, class TY>
static void backward(const TY* dy, const TH* dh, const TH* h, const float* weight, const float* mean,
                     const float* rstd, TX* dx, TH* dresidual, float* partial, int64_t chunks, int64_t N,
                     int64_t C, const Dropout& d) {
  int64_t rows = (N + chunks - 1) / chunks;
  GPT2_PARALLEL_FOR(k, chunks) {
    float *dweight = partial + k * 2 * C, *dbias = dweight + C;
    memset(dweight, 0, 2 * C * sizeof(float));
    int64_t end = (k + 1) * rows < N ? (k + 1) * rows : N;
    for (int64_t i = k * rows; i < end; ++i)
      backward_row<TX, TH, TY>(dy + i * C, dh ? dh + i * C : nullptr, h + i * C, weight, mean[i], rstd[i],
                                     dx ? dx + i * C : nullptr, dresidual + i * C, dweight, dbias, C, d, i);
  }
}

// `body` with TX, TH, TY bound to the dtypes' element types, for the combinations that add_layernorm.h allows.
#define GPT2_LAYERNORM_DISPATCH(x_dtype, h_dtype, y_dtype, ...) \
  do { \
    if ((h_dtype) != F32 && (y_dtype) != F32) { \
      GPT2_DISPATCH(h_dtype, TH, { using TX = TH; using TY = TH; __VA_ARGS__; }); \
    } else if ((h_dtype) != F32) { \
      using TY = float; \
      GPT2_DISPATCH(h_dtype, TH, { using TX = TH; __VA_ARGS__; }); \
    } else if ((x_dtype) == F32) { \
      using TX = float; \
      using TH = float; \
      GPT2_DISPATCH(y_dtype, TY, __VA_ARGS__); \
    } else if ((y_dtype) == F32) { \
      using TH = float; \
      using TY = float; \
      GPT2_DISPATCH(x_dtype, TX, __VA_ARGS__); \
    } else { \
      using TH = float; \
      GPT2_DISPATCH(x_dtype, TX, { using TY = TX; __VA_ARGS__; }); \
    } \
  } while (0)

void add_layernorm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr h, addr mean, addr rstd,
                           int64_t N, int64_t C, double eps, int64_t x_dtype, int64_t h_dtype, int64_t y_dtype,
                           Drop dropout) {
  Dropout d = dropout_of(dropout);
  GPT2_LAYERNORM_DISPATCH(x_dtype, h_dtype, y_dtype, {
    forward<TX, TH, TY>((const TX*)x, (const TH*)residual, (const float*)weight, (const float*)bias, (TY*)y, (TH*)h,
        (float*)mean, (float*)rstd, N, C, eps, d);
  });
}

void add_layernorm_normalize(addr h, addr weight, addr bias, addr mean, addr rstd, addr y, int64_t N, int64_t C,
                             int64_t h_dtype, int64_t y_dtype) {
  GPT2_LAYERNORM_DISPATCH(h_dtype, h_dtype, y_dtype, {
    normalize((const TH*)(const TX*)h, (const float*)weight, (const float*)bias, (const float*)mean, (const float*)rstd,
              (TY*)y, N, C);
  });
}

void add_layernorm_backward(addr dy, addr dh, addr h, addr weight, addr mean, addr rstd, addr dx,
                            addr dresidual, addr partial, int64_t chunks, addr dweight, addr dbias, int64_t N,
                            int64_t C, int64_t x_dtype, int64_t h_dtype, int64_t y_dtype, Drop dropout) {
  Dropout d = dropout_of(dropout);
  GPT2_LAYERNORM_DISPATCH(x_dtype, h_dtype, y_dtype, {
    backward<TX, TH, TY>((const TY*)dy, (const TH*)dh, (const TH*)h, (const float*)weight, (const float*)mean,
        (const float*)rstd, (TX*)dx, (TH*)dresidual, (float*)partial, chunks, N, C, d);
  });
  sum_partials((const float*)partial, chunks, 2 * C, (float*)dweight, C);
  sum_partials((const float*)partial + C, chunks, 2 * C, (float*)dbias, C);
}

}  // namespace GPT2_ISA
}  // namespace gpt2
