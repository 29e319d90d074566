// Causal flash attention on packed qkv [B, T, 3, H, D], forward and backward (Dao, "FlashAttention-2", 2023).
//
//   S = scale Q K^T    P = softmax(S) over visible keys    O = dropout(P) V    lse = log sum exp S
//   dV = dropout(P)^T dO    dP = dropout'(dO V^T)    dS = P (dP - delta)    delta = rowsum(dO O)
//   dQ = scale dS K    dK = scale dS^T Q
//
// Scores exist one BLOCK x BLOCK tile at a time, float32 and transposed ([key][query], see attention_tile.h). Where the
// processor multiplies pairs of bfloat16, probabilities and dS of bfloat16 inputs are rounded to pairs for the products
// that take them (G = 2 throughout; see gemm_micro.h).
// Scores of any finite size are right: those in the thousands and beyond take a longer way, shift_scores and in
// backward softmax_again, as float32 holds their lse too coarsely.
// Forward: a task is up to four blocks of queries of one head, which share each packed tile of K and V.
#include "attention_backward.h"
#include "attention_tile.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t QUERY_BLOCKS = 4;  // of a forward task, at most

// O^T += V^T P^T for one tile. v is [steps][D], or where tile registers multiply its transpose.
template <int G>
GPT2_INLINE void add_values(const Tile& t, const Shape& shape, const float* v, const float* p, float* o) {
  constexpr ALayout LAYOUT = HAS_TILES ? A_ROWS : A_COLUMNS;
  const int64_t ld = HAS_TILES ? BY_KEYS : shape.stride(), columns = t.columns();
  if (!t.diagonal()) {
    gemm<LAYOUT, ADD, G>(shape.D, columns, steps<G>(t.keys), v, ld, p, BLOCK, o, BLOCK);
    return;
  }
  for (int64_t r = 0; r < t.keys; r += CHUNK)
    gemm<LAYOUT, ADD, G>(shape.D, columns - r, steps<G>(smaller(CHUNK, t.keys - r)), v + r / G * (HAS_TILES ? 1 : ld),
                         ld, p + r / G * BLOCK + r, BLOCK, o + r, BLOCK);
}

// One block of queries in flight.
struct QueryBlock {
  float *q, *o;                   // [D][BLOCK], transposed
  float high[BLOCK], total[BLOCK];
};

void finish_queries(const Tile& t, const Shape& shape, const QueryBlock& block, int64_t queries, float* rows,
                    Elements out, float* lse) {
  alignas(64) float factor[BLOCK];
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float total = block.total[i], high = block.high[i] * t.log2_scale;
    factor[i] = total == 0.0f ? 0.0f : t.dropout->scale / total;
    if (i < queries) lse[i] = total == 0.0f ? -INFINITY : high * LN2 + logf(total);
  }
  for (int64_t d = 0; d < shape.D; ++d)
    for (int64_t c = 0; c < round_up(queries, W); c += W) {
      float* x = block.o + d * BLOCK + c;
      store(x, load(x) * load(factor + c));
    }
  transpose_tile(rows, shape.stride(), block.o, BLOCK, shape.D, round_up(queries, W));
  unpack_rows(out, shape.H * shape.D, rows, shape.stride(), queries, shape.D, 1.0f);
}

// One block of queries against one tile of keys.
template <int G>
GPT2_INLINE void attend(const Tile& t, const Shape& shape, const float* k, const float* v, float* s,
                        QueryBlock& block) {
  const Visibility visibility = tile_visibility(t.segments, t.i0, t.queries, t.j0, t.keys);
  if (visibility == HIDDEN) return;
  alignas(64) float shrink[BLOCK];
  bool shrunk = false;
  scores<G>(t, shape, k, block.q, s);
  GPT2_VISIBILITY(visibility, V,
                  shrunk = t.dropout->on ? softmax_tile<V, true, G>(t, s, block.high, block.total, shrink)
                                         : softmax_tile<V, false, G>(t, s, block.high, block.total, shrink));
  if (shrunk)
    for (int64_t d = 0; d < shape.D; ++d)
      for (int64_t c = 0; c < t.columns(); c += W) {
        float* x = block.o + d * BLOCK + c;
        store(x, load(x) * load(shrink + c));
      }
  add_values<G>(t, shape, v, s, block.o);
}

template <int G>
struct Forward {
  Shape shape;
  Elements qkv, out;
  float* lse;
  const int32_t* segments;
  Tile tile;

  // Query blocks first .. first + count of head z.
  void task(int64_t z, int64_t first, int64_t count) const {
    const int64_t T = shape.T, D = shape.D, ld = shape.stride(), row = shape.row(), area = BLOCK * ld;
    const int64_t b = z / shape.H, h = z % shape.H;
    const Elements q_rows = qkv + (b * T * row + h * D);
    const Elements k_rows = q_rows + shape.H * D, v_rows = k_rows + shape.H * D;
    float* k = scratch.reserve((2 + 2 * QUERY_BLOCKS) * area + BLOCK * BLOCK);
    float *v = k + area, *s = v + area, *state = s + BLOCK * BLOCK;
    alignas(64) QueryBlock blocks[QUERY_BLOCKS];
    Tile t = tile;
    t.z = z;
    t.segments = segments ? segments + b * T : nullptr;
    for (int64_t n = 0; n < count; ++n) {
      QueryBlock& block = blocks[n];
      block.q = state + 2 * n * area;
      block.o = block.q + area;
      const int64_t i0 = (first + n) * BLOCK, queries = smaller(BLOCK, T - i0);
      pack_columns<G>(k, q_rows + i0 * row, row, queries, shape);
      transpose_tile(block.q, BLOCK, k, ld, queries, steps<G>(D));
      memset(block.o, 0, shape.width() * BLOCK * sizeof(float));
      for (int64_t i = 0; i < BLOCK; ++i) block.high[i] = NOTHING, block.total[i] = 0.0f;
    }
    for (int64_t j = 0; j < first + count; ++j) {
      t.j0 = j * BLOCK;
      t.keys = smaller(BLOCK, T - t.j0);
      pack_columns<G>(k, k_rows + t.j0 * row, row, t.keys, shape);
      pack_steps<G>(HAS_TILES ? s : v, v_rows + t.j0 * row, row, t.keys, shape);
      if (HAS_TILES) transpose_tile(v, BY_KEYS, s, ld, steps<G>(t.keys), D);
      for (int64_t n = j < first ? 0 : j - first; n < count; ++n) {
        t.i0 = (first + n) * BLOCK;
        t.queries = smaller(BLOCK, T - t.i0);
        attend<G>(t, shape, k, v, s, blocks[n]);
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i0 = (first + n) * BLOCK, queries = smaller(BLOCK, T - i0);
      finish_queries(t, shape, blocks[n], queries, k, out + ((b * T + i0) * shape.H + h) * D,
                     lse + z * T + i0);
    }
  }

  void run() const {
    const int64_t heads = shape.B * shape.H, blocks = (shape.T + BLOCK - 1) / BLOCK;
    int64_t span = QUERY_BLOCKS, threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    // Blocks of queries are independent, so how many share a task changes no bit.
    while (span > 1 && heads * ((blocks + span - 1) / span) < 2 * threads) span /= 2;
    const int64_t spans = (blocks + span - 1) / span, tasks = heads * spans;
#pragma omp parallel if (tasks > 1)
    {
      [[maybe_unused]] const TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < tasks; ++n) {
        const int64_t first = (spans - 1 - n / heads) * span;  // the longest rows go first
        task(n % heads, first, smaller(span, blocks - first));
      }
    }
  }
};

}  // namespace
}  // namespace GPT2_ISA

#if defined(__AMX_BF16__)
namespace GPT2_BASE_ISA {
GPT2_ATTENTION_KERNELS(GPT2_DECLARE)
}
#define GPT2_OTHER_DTYPES(kernel, ...) \
  if (dtype != BF16) return GPT2_BASE_ISA::kernel(__VA_ARGS__)
#else
#define GPT2_OTHER_DTYPES(kernel, ...)
#endif

namespace GPT2_ISA {

void attention_forward(addr qkv, addr out, addr lse, addr segments, int64_t B, int64_t T, int64_t H, int64_t D,
                       double scale, int64_t dtype, Drop drop) {
  GPT2_OTHER_DTYPES(attention_forward, qkv, out, lse, segments, B, T, H, D, scale, dtype, drop);
  const Dropout dropout = dropout_of(drop);
  const Tile tile = make_tile(T, scale, dropout);
  GPT2_GROUP(dtype, G, {
    Forward<G>{{B, T, H, D}, {qkv, dtype}, {out, dtype}, (float*)lse, (const int32_t*)segments, tile}.run();
  });
}

void attention_backward(addr dout, addr qkv, addr out, addr lse, addr segments, addr dqkv, addr partial, int64_t B,
                        int64_t T, int64_t H, int64_t D, double scale, int64_t dtype, Drop drop) {
  GPT2_OTHER_DTYPES(attention_backward, dout, qkv, out, lse, segments, dqkv, partial, B, T, H, D, scale, dtype, drop);
  const Dropout dropout = dropout_of(drop);
  const Tile tile = make_tile(T, scale, dropout);
  GPT2_GROUP(dtype, G, {
    Backward<G>{{B, T, H, D}, {dout, dtype}, {qkv, dtype}, {out, dtype}, {dqkv, dtype}, (const float*)lse,
                (const int32_t*)segments, (float*)partial, tile, (float)scale}.run();
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
