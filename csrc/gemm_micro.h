// Small float32 matrix products on tiles that live in cache: C[m][n] (=, +=) sum over k of A(m, k) * B[k][n]. With
// G = 2 an element of A and B is a pair of bfloat16, two steps of the sum, which the processor must have products of.
//
// A 6 x 4 tile of AVX-512 accumulators (6 x 2 with sixteen registers) reads 10 vectors for 24 multiply-adds,
// so the two load ports stay ahead of the two multiply-add ports. Packing turns rows of any dtype into
// float32 tiles, straight or transposed; it is the only place where the element type appears.
#pragma once

#include "amx.h"
#include "isa.h"
#include "transpose.h"
#if defined(__AMX_BF16__)
#include "gemm_tiles.h"
#endif

namespace gpt2 {
namespace GPT2_ISA {

constexpr int MICRO_M = 6;
#if defined(__AVX512F__)
constexpr int MICRO_V = 4;
#else
constexpr int MICRO_V = 2;
#endif

// Elements that `n` steps of a sum are.
template <int G>
GPT2_INLINE int64_t steps(int64_t n) { return (n + G - 1) / G; }

// Where the elements of A are: A(m, k) = a[m * lda + k] (rows) or a[k * lda + m] (columns).
enum ALayout { A_ROWS, A_COLUMNS };
// Whether the product replaces C or is added to it.
enum Update { SET, ADD };

template <int M, int V, ALayout LAYOUT, Update UPDATE, int G>
GPT2_INLINE void micro_tile(int64_t k_count, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                            int64_t ldc) {
  vf sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = vf{};
  for (int64_t k = 0; k < k_count; ++k) {
    vf row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      vf x = splat(LAYOUT == A_ROWS ? a[m * lda] : a[m]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_lanes<G>(sum[m][v], row[v], x);
    }
    a += LAYOUT == A_ROWS ? 1 : lda;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* p = c + m * ldc + v * W;
      store(p, UPDATE == ADD ? load(p) + sum[m][v] : sum[m][v]);
    }
}

// One panel of V vectors of columns, all rows.
template <int V, ALayout LAYOUT, Update UPDATE, int G>
static __attribute__((noinline)) void micro_panel(int64_t m_count, int64_t k_count, const float* a, int64_t lda,
                                                  const float* b, int64_t ldb, float* c, int64_t ldc) {
  const int64_t step = LAYOUT == A_ROWS ? lda : 1;
  int64_t m = 0;
  for (; m + MICRO_M <= m_count; m += MICRO_M)
    micro_tile<MICRO_M, V, LAYOUT, UPDATE, G>(k_count, a + m * step, lda, b, ldb, c + m * ldc, ldc);
  a += m * step;
  c += m * ldc;
  switch (m_count - m) {
    case 5: micro_tile<5, V, LAYOUT, UPDATE, G>(k_count, a, lda, b, ldb, c, ldc); break;
    case 4: micro_tile<4, V, LAYOUT, UPDATE, G>(k_count, a, lda, b, ldb, c, ldc); break;
    case 3: micro_tile<3, V, LAYOUT, UPDATE, G>(k_count, a, lda, b, ldb, c, ldc); break;
    case 2: micro_tile<2, V, LAYOUT, UPDATE, G>(k_count, a, lda, b, ldb, c, ldc); break;
    case 1: micro_tile<1, V, LAYOUT, UPDATE, G>(k_count, a, lda, b, ldb, c, ldc); break;
  }
}

// n_count is a multiple of W; B and C rows are readable and writable up to it. Where there are tile registers, A lies
// by rows, and gemm_tiles.h says what has to be zero.
template <ALayout LAYOUT, Update UPDATE, int G = 1>
GPT2_INLINE void gemm(int64_t m_count, int64_t n_count, int64_t k_count, const float* a, int64_t lda,
                      const float* b, int64_t ldb, float* c, int64_t ldc) {
#if defined(__AMX_BF16__)
  static_assert(LAYOUT == A_ROWS && G == 2, "what tile registers multiply");
  return gemm_tiles<UPDATE == ADD>(m_count, n_count, k_count, a, lda, b, ldb, c, ldc);
#endif
  const int64_t vectors = n_count / W, panels = (vectors + MICRO_V - 1) / MICRO_V;
  for (int64_t panel = 0, v = 0; panel < panels; ++panel) {
    // Panels of nearly equal width: five vectors go as 3 + 2, since a single one cannot hide the latency.
    const int64_t width = (vectors - v + panels - panel - 1) / (panels - panel);
    const float* bp = b + v * W;
    float* cp = c + v * W;
    switch (width) {
#if defined(__AVX512F__)
      case 4: micro_panel<4, LAYOUT, UPDATE, G>(m_count, k_count, a, lda, bp, ldb, cp, ldc); break;
      case 3: micro_panel<3, LAYOUT, UPDATE, G>(m_count, k_count, a, lda, bp, ldb, cp, ldc); break;
#endif
      case 2: micro_panel<2, LAYOUT, UPDATE, G>(m_count, k_count, a, lda, bp, ldb, cp, ldc); break;
      case 1: micro_panel<1, LAYOUT, UPDATE, G>(m_count, k_count, a, lda, bp, ldb, cp, ldc); break;
    }
    v += width;
  }
}

// Elements whose type is known at run time alone. Only packing touches them, so that what works on packed tiles is
// compiled once for all types.
struct Elements {
  addr data;
  int64_t dtype;
  Elements operator+(int64_t n) const { return {data + n * (dtype == F32 ? 4 : 2), dtype}; }
};

// dst[rows][ldd] float32 from src[rows][lds]; columns n..roundup(n, W) become 0.
template <class T>
GPT2_INLINE void pack_rows(float* dst, int64_t ldd, const T* src, int64_t lds, int64_t rows, int64_t n) {
  const int64_t whole = n / W * W;
  for (int64_t r = 0; r < rows; ++r, dst += ldd, src += lds) {
    for (int64_t d = 0; d < whole; d += W) store(dst + d, load(src + d));
    if (whole < n) store(dst + whole, load_tail(src + whole, n - whole));
  }
}

GPT2_OUT_OF_LINE void pack_rows(float* dst, int64_t ldd, Elements src, int64_t lds, int64_t rows, int64_t n) {
  GPT2_DISPATCH(src.dtype, T, pack_rows(dst, ldd, (const T*)src.data, lds, rows, n));
}

// dst[rows][ldd] pairs of bfloat16 from src[rows][lds], as they are; a half that is missing and the pairs up to
// roundup(., W) become 0.
GPT2_OUT_OF_LINE void pack_pairs(float* dst, int64_t ldd, Elements src, int64_t lds, int64_t rows, int64_t n) {
  const int64_t whole = ((n + 1) / 2 + W - 1) / W * W;
  for (int64_t r = 0; r < rows; ++r, dst += ldd) {
    memcpy(dst, (const bf16*)src.data + r * lds, n * sizeof(bf16));
    memset((bf16*)dst + n, 0, whole * sizeof(float) - n * sizeof(bf16));
  }
}

// dst[rows / 2][ldd] from src[rows][lds], bfloat16: the same column of two rows is a pair; a row that is missing is 0,
// and so are columns n..roundup(n, W) and, for tile registers, the pairs up to a multiple of 16.
GPT2_OUT_OF_LINE void pack_row_pairs(float* dst, int64_t ldd, Elements src, int64_t lds, int64_t rows, int64_t n) {
  const bf16* x = (const bf16*)src.data;
  for (int64_t r = 0; r < rows; r += 2, dst += ldd, x += 2 * lds)
    for (int64_t d = 0; d < n; d += W) {
      const vf low = load_n(x + d, n - d), high = r + 1 < rows ? load_n(x + lds + d, n - d) : vf{};
      store(dst + d, as<vf>((as<vu>(low) >> 16) | as<vu>(high)));
    }
  if (HAS_TILES)
    for (int64_t r = ceil_div(rows, 2); r % 16; ++r, dst += ldd) memset(dst, 0, round_up(n, W) * sizeof(float));
}

#if defined(__AVX512BF16__)
// Lanes of pairs, rounded to bfloat16; `low` is the first step.
GPT2_INLINE vf pair_of(vf low, vf high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}
#else
GPT2_INLINE vf pair_of(vf low, vf high) {
  return as<vf>((as<vu>(rounded<bf16>(low)) >> 16) | as<vu>(rounded<bf16>(high)));
}
#endif

// The other way: dst[rows][ldd] in its own dtype from scale * src[rows][lds].
template <class T>
GPT2_INLINE void unpack_rows(T* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t n,
                             float scale) {
  const int64_t whole = n / W * W;
  for (int64_t r = 0; r < rows; ++r, dst += ldd, src += lds) {
    for (int64_t d = 0; d < whole; d += W) store(dst + d, load(src + d) * scale);
    if (whole < n) store_tail(dst + whole, load(src + whole) * scale, n - whole);
  }
}

GPT2_OUT_OF_LINE void unpack_rows(Elements dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t n,
                                  float scale) {
  GPT2_DISPATCH(dst.dtype, T, unpack_rows((T*)dst.data, ldd, src, lds, rows, n, scale));
}

// dst[n][ldd] = transpose of the float32 tile src[rows][lds]; both have room up to multiples of W in each
// direction. Columns of dst from rows to roundup(rows, W) are what src holds there, or 0 past `rows`.
GPT2_OUT_OF_LINE void transpose_tile(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t d = 0; d < n; d += W) {
      vf x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = r + i < rows ? load(src + (r + i) * lds + d) : vf{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(dst + (d + i) * ldd + r, x[i]);
    }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
