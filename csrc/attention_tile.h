// What the attention kernels share: the exponential, the visibility and the softmax of one tile of scores.
//
// Score tiles are kept transposed, [key][query]: the lanes of a vector are neighbouring queries. Then the softmax
// needs no sum across lanes, and Q alone is packed transposed.
#pragma once

#include <float.h>
#include <stdlib.h>

#include "gemm_micro.h"
#include "philox_simd.h"

namespace gpt2 {
namespace GPT2_ISA {

constexpr int64_t BLOCK = 64;  // queries of a block and keys of a tile
constexpr int64_t CHUNK = HAS_TILES ? 32 : 16;  // a diagonal tile is worked on in steps of CHUNK keys
constexpr int64_t BY_KEYS = BLOCK / 2;  // units of a row of pairs of keys: the left side of a product in tile registers
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
constexpr float NOTHING = -FLT_MAX;  // the running maximum before any key was seen
// Where the maximum is beyond it, in units of log 2, it is subtracted before scores are scaled: see shift_scores.
constexpr float FAR = 4096.0f;

// 2^t for t <= 127, to about one unit in the last place (the Cephes exp2f polynomial); 0 below 2^-120,
// so that products with it stay clear of subnormal numbers. NaN stays NaN.
GPT2_INLINE vf vexp2(vf t) {
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  vf n = (vf)_mm256_round_ps((__m256)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vf n = (t + 12582912.0f) - 12582912.0f;
#endif
  vf r = t - n;
  vf p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  __mmask16 keep = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-120.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
#else
  vi drop = t < -120.0f;
  vu scaled = as<vu>(p) + (as<vu>(__builtin_convertvector(n, vi)) << 23);  // unsigned: what is dropped may wrap
  return as<vf>(scaled & ~as<vu>(drop));
#endif
}

// FULL: every key of the tile is visible to every query. DIAGONAL: key <= query is all there is to check.
// MASKED: documents and padding too. HIDDEN: nothing is visible.
enum Visibility { FULL, DIAGONAL, MASKED, HIDDEN };

// segments of one sequence, or null: value >= 0 is the document of a token, ~value that of a padding token,
// which as a key is invisible.
GPT2_INLINE int32_t document(int32_t segment) { return segment < 0 ? ~segment : segment; }

static inline Visibility tile_visibility(const int32_t* segments, int64_t i0, int64_t queries, int64_t j0,
                                         int64_t keys) {
  const Visibility plain = i0 == j0 ? DIAGONAL : FULL;
  if (!segments) return plain;
  int32_t query_low = document(segments[i0]), query_high = query_low;
  for (int64_t i = i0 + 1; i < i0 + queries; ++i) {
    int32_t x = document(segments[i]);
    query_low = x < query_low ? x : query_low;
    query_high = x > query_high ? x : query_high;
  }
  int32_t key_low = INT32_MAX, key_high = -1;
  bool padding = false;
  for (int64_t j = j0; j < j0 + keys; ++j) {
    int32_t x = segments[j];
    padding |= x < 0;
    if (x >= 0 && x < key_low) key_low = x;
    if (x > key_high) key_high = x;
  }
  if (key_high < query_low || key_low > query_high) return HIDDEN;
  if (!padding && query_low == query_high && key_low == key_high) return plain;
  return MASKED;
}

// The lanes of one vector of queries: their index within the sequence and their document.
struct Queries {
  vi index, document;
};

GPT2_INLINE Queries load_queries(const int32_t* segments, int64_t i, int64_t T) {
  Queries q{};
  for (int l = 0; l < W; ++l) {
    q.index[l] = (int32_t)(i + l);
    q.document[l] = segments && i + l < T ? document(segments[i + l]) : -1;
  }
  return q;
}

template <Visibility VISIBILITY>
GPT2_INLINE vi visible(const Queries& q, const int32_t* segments, int64_t j) {
  vi mask = q.index >= vi{} + (int32_t)j;
  if (VISIBILITY == MASKED) mask &= q.document == vi{} + segments[j];
  return mask;
}

// Rows of the score tile that exist for the vector of columns at c: on the diagonal whole chunks up to it.
GPT2_INLINE int64_t tile_rows(bool diagonal, int64_t c, int64_t keys) {
  return diagonal ? smaller(keys, (c / CHUNK + 1) * CHUNK) : keys;
}

struct Shape {
  int64_t B, T, H, D;
  int64_t row() const { return 3 * H * D; }         // elements from one token to the next in qkv
  int64_t stride() const { return round_up(D, 16); }  // of a packed row
  int64_t width() const { return round_up(D, W); }    // of a packed row that gemm works on
};

// Operands of products whose steps are columns of rows, [n][D / G], or rows, [n / G][D]: float32, or with G = 2
// bfloat16 as they are, two steps an element.
template <int G>
GPT2_INLINE void pack_columns(float* dst, Elements src, int64_t lds, int64_t rows, const Shape& shape) {
  G == 2 ? pack_pairs(dst, shape.stride(), src, lds, rows, shape.D)
         : pack_rows(dst, shape.stride(), src, lds, rows, shape.D);
}
template <int G>
GPT2_INLINE void pack_steps(float* dst, Elements src, int64_t lds, int64_t rows, const Shape& shape) {
  G == 2 ? pack_row_pairs(dst, shape.stride(), src, lds, rows, shape.D)
         : pack_rows(dst, shape.stride(), src, lds, rows, shape.D);
}

struct Tile {
  const int32_t* segments;  // of this sequence, or null
  int64_t T, i0, queries, j0, keys, z;
  float log2_scale;  // scale / ln 2: probabilities are powers of two
  const Dropout* dropout;
  bool diagonal() const { return i0 == j0; }
  int64_t columns() const { return round_up(queries, W); }
};

static inline Tile make_tile(int64_t T, double scale, const Dropout& dropout) {
  Tile tile{};
  tile.T = T;
  tile.log2_scale = (float)(scale * 1.4426950408889634);
  tile.dropout = &dropout;
  return tile;
}

#define GPT2_VISIBILITY(visibility, V, ...) \
  do { \
    if ((visibility) == FULL) { \
      constexpr Visibility V = FULL; \
      __VA_ARGS__; \
    } else if ((visibility) == DIAGONAL) { \
      constexpr Visibility V = DIAGONAL; \
      __VA_ARGS__; \
    } else { \
      constexpr Visibility V = MASKED; \
      __VA_ARGS__; \
    } \
  } while (0)

// Tile registers multiply pairs alone: other dtypes go to the set that this one is based on.
#if defined(__AMX_BF16__)
#define GPT2_GROUP(dtype, G, ...) \
  do { \
    constexpr int G = PAIR; \
    __VA_ARGS__; \
  } while (0)
#else
#define GPT2_GROUP(dtype, G, ...) \
  do { \
    if (PAIR == 2 && (dtype) == BF16) { \
      constexpr int G = PAIR; \
      __VA_ARGS__; \
    } else { \
      constexpr int G = 1; \
      __VA_ARGS__; \
    } \
  } while (0)
#endif

// out[key][query] = rows(A) . columns of packed Q or dO, all of pack_columns; above the diagonal only where a chunk
// needs it.
template <int G>
GPT2_INLINE void scores(const Tile& t, const Shape& shape, const float* rows, const float* packed, float* out) {
  const int64_t ld = shape.stride(), depth = steps<G>(shape.D), columns = t.columns();
  if (!t.diagonal()) {
    gemm<A_ROWS, SET, G>(t.keys, columns, depth, rows, ld, packed, BLOCK, out, BLOCK);
    return;
  }
  for (int64_t r = 0; r < t.keys; r += CHUNK)
    gemm<A_ROWS, SET, G>(smaller(CHUNK, t.keys - r), columns - r, depth, rows + r * ld, ld, packed + r, BLOCK,
                         out + r * BLOCK + r, BLOCK);
}

// Row r of a column of vectors in place of what was there, or with G = 2 its half of a pair.
template <int G>
GPT2_INLINE void leave(float* column, int64_t r, vf& even, vf x) {
  if (G == 1)
    store(column + r * BLOCK, x);
  else if (r % 2)
    store(column + r / 2 * BLOCK, pair_of(even, x));
  else
    even = x;
}

// Rows of a column of vectors that are pairs of keys and that tile registers read beside those of `keys` keys: 0.
GPT2_INLINE void clear_missing_pairs(float* column, int64_t keys) {
  if (HAS_TILES)
    for (int64_t r = ceil_div(keys, 2); r % 16; ++r) store(column + r * BLOCK, vf{});
}

// A maximum of scores in units of log 2. NOTHING stays finite.
GPT2_INLINE vf in_log2(vf high, float log2_scale) { return vmax(high * log2_scale, splat(NOTHING)); }

// -inf, the lse of a query that sees nothing, is not far.
GPT2_INLINE vi is_far(vf x) { return (x > FAR) | ((x < -FAR) & (x != -INFINITY)); }

GPT2_INLINE bool any(vi mask) {
  int32_t found = 0;
  for (int l = 0; l < W; ++l) found |= mask[l];
  return found != 0;
}

// Exponents in place of the scores of one column of vectors: (x - high) * log2_scale - log2_total in lanes that are
// far, in the others x * log2_scale - shift, as everywhere else. That one is wrong by half a unit in the last place of
// shift, which is nothing for a small score, 2^8 for one of 4e9: the probability of the maximum itself would overflow
// or vanish.
GPT2_OUT_OF_LINE void shift_scores(float* column, int64_t rows, vi far, vf high, vf log2_total, vf shift,
                                   float log2_scale) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf x = load(column + r * BLOCK);
    const vf near = multiply_add(x, splat(log2_scale), -shift);
    store(column + r * BLOCK, select(far, (x - high) * log2_scale - log2_total, near));
  }
}

// Scores to probabilities in place, with the running maximum `high` of the scores, not scaled, and sum `total` of each
// query. With G = 2 row n of s becomes the pairs of keys 2 n and 2 n + 1.
// shrink[query] is the factor that what was summed before must be multiplied by; returns whether any is not 1.
template <Visibility VISIBILITY, bool DROP, int G>
__attribute__((noinline)) bool softmax_tile(const Tile& t, float* s, float* high, float* total, float* shrink) {
  bool shrunk = false;
  for (int64_t c = 0; c < t.columns(); c += W) {
    const int64_t rows = tile_rows(t.diagonal(), c, t.keys);
    Queries q{};
    if (VISIBILITY != FULL) q = load_queries(VISIBILITY == MASKED ? t.segments : nullptr, t.i0 + c, t.T);
    vf top = splat(-INFINITY);
    for (int64_t r = 0; r < rows; ++r) {
      vf x = load(s + r * BLOCK + c);
      if (VISIBILITY != FULL) {
        x = visible<VISIBILITY>(q, t.segments, t.j0 + r) ? x : splat(-INFINITY);
        store(s + r * BLOCK + c, x);
      }
      top = vmax(top, x);
    }
    const vf before = load(high + c);
    const vf now = vmax(top, before);
    const vf shift = in_log2(now, t.log2_scale);
    vf factor = vexp2(in_log2(before, t.log2_scale) - shift), less = shift;
    float scale = t.log2_scale;
    const vi far = is_far(shift) & (now != NOTHING);
    if (any(far)) {
      shift_scores(s + c, rows, far, now, vf{}, shift, scale);
      factor = select(far, vexp2((before - now) * scale), factor);
      scale = 1.0f, less = vf{};
    }
    vf sum{}, even{};
    for (int64_t r = 0; r < rows; r += KEEP_KEYS) {
      vi keep[KEEP_KEYS];
      if (DROP) keep_keys(*t.dropout, (uint32_t)t.z, t.i0 + c, t.j0 + r, keep);
      for (int64_t k = 0; k < smaller(KEEP_KEYS, rows - r); ++k) {
        float* x = s + (r + k) * BLOCK + c;
        vf p = vexp2(load(x) * scale - less);
        sum += p;
        if (DROP) p = keep[k] ? p : vf{};
        leave<G>(s + c, r + k, even, p);
      }
    }
    if (G == 2 && rows % 2) store(s + rows / 2 * BLOCK + c, pair_of(even, vf{}));
    clear_missing_pairs(s + c, rows);
    store(high + c, now);
    store(total + c, load(total + c) * factor + sum);
    store(shrink + c, factor);
    vi other = factor != 1.0f;
    for (int l = 0; l < W; ++l) shrunk |= other[l] != 0;
  }
  return shrunk;
}

// Memory of this thread, kept between calls and grown when needed.
struct Scratch {
  float* data = nullptr;
  size_t floats = 0;
  ~Scratch() { free(data); }
  float* reserve(size_t n) {
    if (n > floats) {
      free(data);
      data = (float*)aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
      floats = data ? n : 0;
    }
    return data;
  }
};

}  // namespace GPT2_ISA
}  // namespace gpt2
