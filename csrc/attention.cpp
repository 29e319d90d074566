// Causal flash attention on packed qkv [B, T, 3, H, D], forward and backward (Dao, "FlashAttention-2", 2023).
//
//   S = scale Q K^T    P = softmax(S) over visible keys    O = dropout(P) V    lse = log sum exp S
//   dV = dropout(P)^T dO    dP = dropout'(dO V^T)    dS = P (dP - delta)    delta = rowsum(dO O)
//   dQ = scale dS K    dK = scale dS^T Q
//
// Scores exist one BLOCK x BLOCK tile at a time, float32 and transposed ([key][query], see attention_tile.h).
// Forward: a task is up to four blocks of queries of one head, which share each packed tile of K and V.
// Backward: a task is GROUP keys of one head; dQ of a block is summed group by group in that order whether one
// thread does all groups of a head or each thread one, so the bits do not depend on the number of threads.
#include "attention_tile.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t GROUP = 256;       // keys of a backward task
constexpr int64_t QUERY_BLOCKS = 4;  // of a forward task, at most

thread_local Scratch scratch;

// ---- forward ----

// Scores to probabilities in place, with the running maximum `high` and sum `total` of each query.
// shrink[query] is the factor that what was summed before must be multiplied by; returns whether any is not 1.
template <Visibility VISIBILITY, bool DROP>
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
      top = max2(top, x);
    }
    const vf before = load(high + c);
    const vf now = max2(top * t.log2_scale, before);
    const vf factor = vexp2(before - now);
    vf sum{};
    for (int64_t r = 0; r < rows; r += KEEP_KEYS) {
      vi keep[KEEP_KEYS];
      if (DROP) keep_keys(*t.dropout, (uint32_t)t.z, t.i0 + c, t.j0 + r, keep);
      for (int64_t k = 0; k < smaller(KEEP_KEYS, rows - r); ++k) {
        float* x = s + (r + k) * BLOCK + c;
        vf p = vexp2(load(x) * t.log2_scale - now);
        sum += p;
        store(x, DROP ? (keep[k] ? p : vf{}) : p);
      }
    }
    store(high + c, now);
    store(total + c, load(total + c) * factor + sum);
    store(shrink + c, factor);
    vi other = factor != 1.0f;
    for (int l = 0; l < W; ++l) shrunk |= other[l] != 0;
  }
  return shrunk;
}

// O^T += V^T P^T for one tile.
GPT2_INLINE void add_values(const Tile& t, const Shape& shape, const float* v, const float* p, float* o) {
  const int64_t ld = shape.stride(), columns = t.columns();
  if (!t.diagonal()) {
    gemm<A_COLUMNS, ADD>(shape.D, columns, t.keys, v, ld, p, BLOCK, o, BLOCK);
    return;
  }
  for (int64_t r = 0; r < t.keys; r += CHUNK)
    gemm<A_COLUMNS, ADD>(shape.D, columns - r, smaller(CHUNK, t.keys - r), v + r * ld, ld, p + r * BLOCK + r,
                         BLOCK, o + r, BLOCK);
}

// One block of queries in flight.
struct QueryBlock {
  float *q, *o;                   // [D][BLOCK], transposed
  float high[BLOCK], total[BLOCK];
};

void finish_queries(const Shape& shape, const QueryBlock& block, int64_t queries, float keep_scale, float* rows,
                    Elements out, float* lse) {
  alignas(64) float factor[BLOCK];
  for (int64_t i = 0; i < BLOCK; ++i) {
    const float total = block.total[i];
    factor[i] = total == 0.0f ? 0.0f : keep_scale / total;
    if (i < queries) lse[i] = total == 0.0f ? -INFINITY : block.high[i] * LN2 + logf(total);
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
GPT2_INLINE void attend(const Tile& t, const Shape& shape, const float* k, const float* v, float* s,
                        QueryBlock& block) {
  const Visibility visibility = tile_visibility(t.segments, t.i0, t.queries, t.j0, t.keys);
  if (visibility == HIDDEN) return;
  alignas(64) float shrink[BLOCK];
  bool shrunk = false;
  scores(t, shape, k, block.q, s);
  GPT2_VISIBILITY(visibility, V,
                  shrunk = t.dropout->on ? softmax_tile<V, true>(t, s, block.high, block.total, shrink)
                                     : softmax_tile<V, false>(t, s, block.high, block.total, shrink));
  if (shrunk)
    for (int64_t d = 0; d < shape.D; ++d)
      for (int64_t c = 0; c < t.columns(); c += W) {
        float* x = block.o + d * BLOCK + c;
        store(x, load(x) * load(shrink + c));
      }
  add_values(t, shape, v, s, block.o);
}

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
      pack_terms(k, q_rows + i0 * row, row, queries, shape);
      transpose_tile(block.q, BLOCK, k, ld, queries, shape.depth());
      memset(block.o, 0, shape.width() * BLOCK * sizeof(float));
      for (int64_t i = 0; i < BLOCK; ++i) block.high[i] = NOTHING, block.total[i] = 0.0f;
    }
    for (int64_t j = 0; j < first + count; ++j) {
      t.j0 = j * BLOCK;
      t.keys = smaller(BLOCK, T - t.j0);
      pack_terms(k, k_rows + t.j0 * row, row, t.keys, shape);
      pack_rows(v, ld, v_rows + t.j0 * row, row, t.keys, D);
      for (int64_t n = j < first ? 0 : j - first; n < count; ++n) {
        t.i0 = (first + n) * BLOCK;
        t.queries = smaller(BLOCK, T - t.i0);
        attend(t, shape, k, v, s, blocks[n]);
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i0 = (first + n) * BLOCK, queries = smaller(BLOCK, T - i0);
      finish_queries(shape, blocks[n], queries, t.dropout->scale, k, out + ((b * T + i0) * shape.H + h) * D,
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
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
    for (int64_t n = 0; n < tasks; ++n) {
      const int64_t first = (spans - 1 - n / heads) * span;  // the longest rows go first
      task(n % heads, first, smaller(span, blocks - first));
    }
  }
};

// ---- backward ----

// s: scores, becomes dropout(P) without its 1 / (1 - p); d: dO . V, becomes dS.
template <Visibility VISIBILITY, bool DROP>
__attribute__((noinline)) void gradient_tile(const Tile& t, float* s, float* d, const float* lse,
                                             const float* delta) {
  const float scale = t.dropout->scale;
  for (int64_t c = 0; c < t.columns(); c += W) {
    const int64_t rows = tile_rows(t.diagonal(), c, t.keys);
    Queries q{};
    if (VISIBILITY != FULL) q = load_queries(VISIBILITY == MASKED ? t.segments : nullptr, t.i0 + c, t.T);
    const vf shift = load(lse + c), mean = load(delta + c);
    for (int64_t r = 0; r < rows; r += KEEP_KEYS) {
      vi keep[KEEP_KEYS];
      if (DROP) keep_keys(*t.dropout, (uint32_t)t.z, t.i0 + c, t.j0 + r, keep);
      for (int64_t k = 0; k < smaller(KEEP_KEYS, rows - r); ++k) {
        float *x = s + (r + k) * BLOCK + c, *y = d + (r + k) * BLOCK + c;
        vf p = vexp2(load(x) * t.log2_scale - shift);
        if (VISIBILITY != FULL) p = visible<VISIBILITY>(q, t.segments, t.j0 + r + k) ? p : vf{};
        vf g = load(y);
        if (DROP) g = keep[k] ? g * scale : vf{};
        store(x, DROP ? (keep[k] ? p : vf{}) : p);
        store(y, p * (g - mean));
      }
    }
  }
}

// The tiles of one backward task, float32 but for those that products over D take (`pack_terms`).
struct Gradients {
  float *k, *dk, *dv;            // [GROUP][D]
  float *k_terms, *v_terms;      // [GROUP][D]
  float *q, *qt, *g, *gt, *dq;   // [BLOCK][D], and qt and gt of terms, transposed; g is dO
  float *s, *ds;                 // [BLOCK][BLOCK]
  explicit Gradients(int64_t ld, int64_t extra) {
    const int64_t area = BLOCK * ld, group = GROUP * ld;
    k = scratch.reserve(5 * group + 5 * area + 2 * BLOCK * BLOCK + extra);
    dk = k + group, dv = dk + group, k_terms = dv + group, v_terms = k_terms + group;
    q = v_terms + group, qt = q + area, g = qt + area, gt = g + area, dq = gt + area;
    s = dq + area, ds = s + BLOCK * BLOCK;
  }
  float* extra() const { return ds + BLOCK * BLOCK; }
};

// dV += P dO, dK += dS Q, dQ += dS^T K for one tile whose keys begin at row `at` of the group.
GPT2_INLINE void add_gradients(const Tile& t, const Shape& shape, const Gradients& x, int64_t at) {
  const int64_t ld = shape.stride(), width = shape.width();
  float *dk = x.dk + at * ld, *dv = x.dv + at * ld;
  const float* k = x.k + at * ld;
  if (!t.diagonal()) {
    gemm<A_ROWS, ADD>(t.keys, width, t.queries, x.s, BLOCK, x.g, ld, dv, ld);
    gemm<A_ROWS, ADD>(t.keys, width, t.queries, x.ds, BLOCK, x.q, ld, dk, ld);
    gemm<A_COLUMNS, ADD>(t.queries, width, t.keys, x.ds, BLOCK, k, ld, x.dq, ld);
    return;
  }
  for (int64_t r = 0; r < t.keys; r += CHUNK) {
    const int64_t rows = smaller(CHUNK, t.keys - r), corner = r * BLOCK + r;
    gemm<A_ROWS, ADD>(rows, width, t.queries - r, x.s + corner, BLOCK, x.g + r * ld, ld, dv + r * ld, ld);
    gemm<A_ROWS, ADD>(rows, width, t.queries - r, x.ds + corner, BLOCK, x.q + r * ld, ld, dk + r * ld, ld);
    gemm<A_COLUMNS, ADD>(rows, width, r + rows, x.ds + r, BLOCK, k, ld, x.dq + r * ld, ld);
  }
}

struct Backward {
  Shape shape;
  Elements dout, qkv, out, dqkv;
  const float* lse;
  const int32_t* segments;
  float* partial;  // or null
  Tile tile;
  float scale;

  int64_t groups() const { return (shape.T + GROUP - 1) / GROUP; }
  int64_t token(int64_t z, int64_t t) const { return (z / shape.H * shape.T + t) * shape.H + z % shape.H; }
  // Element offset of head z of token t in qkv: q, and k and v one and two H * D further.
  int64_t packed(int64_t z, int64_t t) const {
    return (z / shape.H * shape.T + t) * shape.row() + z % shape.H * shape.D;
  }

  // The terms of a block's rows, transposed. `packed_rows` are the same rows in float32; the tile of scores is free now.
  void transpose_terms(float* dst, const float* packed_rows, Elements rows, int64_t stride, const Tile& t,
                       const Gradients& x) const {
    if (shape.pairs) pack_terms(x.s, rows, stride, t.queries, shape);
    transpose_tile(dst, BLOCK, shape.pairs ? x.s : packed_rows, shape.stride(), t.queries, shape.depth());
  }

  // delta, with the sum over D in the order of gemm: a query that sees one key then gets exactly zero dS.
  void row_products(const Gradients& x, Elements o_rows, const Tile& t, float* product) const {
    const int64_t ld = shape.stride();
    // The tiles of scores are free now: together [BLOCK][2 * BLOCK] floats, and ld is at most that.
    pack_terms(x.s, o_rows, shape.H * shape.D, t.queries, shape);
    transpose_tile(x.dq, BLOCK, x.s, ld, t.queries, shape.depth());
    for (int64_t c = 0; c < t.columns(); c += W) {
      vf sum{};
      for (int64_t d = 0; d < shape.depth(); ++d) {
        const vf o = load(x.dq + d * BLOCK + c), g = load(x.gt + d * BLOCK + c);
        shape.pairs ? add_lanes<PAIR>(sum, o, g) : add_lanes<1>(sum, o, g);
      }
      store(product + c, sum);
    }
  }

  // Where dQ of a block goes after one group: to its own partial sums, else onto the running total, and
  // from there, in the block's last group, to dqkv.
  void leave_queries(const Gradients& x, int64_t z, int64_t group, int64_t i0, int64_t queries) const {
    const int64_t ld = shape.stride(), count = queries * ld;
    float* total = partial ? partial + ((z * groups() + group) * shape.T + i0) * ld : x.extra() + i0 * ld;
    const bool last = i0 / GROUP == group;
    if (!partial && group > 0)
      for (int64_t n = 0; n < count; n += W) store(x.dq + n, load(total + n) + load(x.dq + n));
    if (partial || !last)
      memcpy(total, x.dq, count * sizeof(float));
    else
      unpack_rows(dqkv + packed(z, i0), shape.row(), x.dq, ld, queries, shape.D, scale);
  }

  void run_group(int64_t z, int64_t group) const {
    const int64_t T = shape.T, D = shape.D, ld = shape.stride(), row = shape.row(), side = shape.H * D;
    const Gradients x(ld, partial || groups() == 1 ? 0 : T * ld);
    const int64_t begin = group * GROUP, rows = smaller(GROUP, T - begin);
    const Elements k_rows = qkv + (packed(z, begin) + side);
    alignas(64) float shift[BLOCK], mean[BLOCK];
    Tile t = tile;
    t.z = z;
    t.segments = segments ? segments + z / shape.H * T : nullptr;
    pack_rows(x.k, ld, k_rows, row, rows, D);
    pack_terms(x.k_terms, k_rows, row, rows, shape);
    pack_terms(x.v_terms, k_rows + side, row, rows, shape);
    memset(x.dk, 0, 2 * GROUP * ld * sizeof(float));
    for (t.i0 = begin; t.i0 < T; t.i0 += BLOCK) {
      t.queries = smaller(BLOCK, T - t.i0);
      const Elements q_rows = qkv + packed(z, t.i0), g_rows = dout + token(z, t.i0) * D;
      pack_rows(x.q, ld, q_rows, row, t.queries, D);
      pack_rows(x.g, ld, g_rows, side, t.queries, D);
      transpose_terms(x.qt, x.q, q_rows, row, t, x);
      transpose_terms(x.gt, x.g, g_rows, side, t, x);
      row_products(x, out + token(z, t.i0) * D, t, mean);
      memset(x.dq, 0, BLOCK * ld * sizeof(float));
      for (int64_t i = 0; i < BLOCK; ++i) shift[i] = i < t.queries ? lse[z * T + t.i0 + i] * LOG2E : 0.0f;
      for (int64_t at = 0; at < rows && begin + at <= t.i0; at += BLOCK) {
        t.j0 = begin + at;
        t.keys = smaller(BLOCK, T - t.j0);
        const Visibility visibility = tile_visibility(t.segments, t.i0, t.queries, t.j0, t.keys);
        if (visibility == HIDDEN) continue;
        scores(t, shape, x.k_terms + at * ld, x.qt, x.s);
        scores(t, shape, x.v_terms + at * ld, x.gt, x.ds);
        GPT2_VISIBILITY(visibility, V, t.dropout->on ? gradient_tile<V, true>(t, x.s, x.ds, shift, mean)
                                                 : gradient_tile<V, false>(t, x.s, x.ds, shift, mean));
        add_gradients(t, shape, x, at);
      }
      leave_queries(x, z, group, t.i0, t.queries);
    }
    unpack_rows(dqkv + packed(z, begin) + side, row, x.dk, ld, rows, D, scale);
    unpack_rows(dqkv + packed(z, begin) + 2 * side, row, x.dv, ld, rows, D, t.dropout->scale);
  }

  // Sums what the groups left of dQ of one head, in their order.
  void sum_partial(int64_t z) const {
    const int64_t ld = shape.stride();
    for (int64_t i = 0; i < shape.T; ++i) {
      float* sum = partial + (z * groups() * shape.T + i) * ld;
      for (int64_t group = 1; group <= i / GROUP; ++group)
        for (int64_t d = 0; d < ld; d += W)
          store(sum + d, load(sum + d) + load(sum + group * shape.T * ld + d));
      unpack_rows(dqkv + packed(z, i), shape.row(), sum, ld, 1, shape.D, scale);
    }
  }

  void run() const {
    const int64_t heads = shape.B * shape.H, count = groups();
#pragma omp parallel if (heads * count > 1)
    {
      if (partial) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * count; ++task) run_group(task % heads, task / heads);
#pragma omp for schedule(static)
        for (int64_t z = 0; z < heads; ++z) sum_partial(z);
      } else {
#pragma omp for schedule(dynamic, 1)
        for (int64_t z = 0; z < heads; ++z)
          for (int64_t group = 0; group < count; ++group) run_group(z, group);
      }
    }
  }
};

}  // namespace

void attention_forward(addr qkv, addr out, addr lse, addr segments, int64_t B, int64_t T, int64_t H, int64_t D,
                       double scale, int64_t dtype, addr rng, int64_t threshold, double keep_scale, int64_t site) {
  const Dropout dropout = dropout_of(rng, threshold, keep_scale, site);
  const Tile tile = make_tile(T, scale, dropout);
  Forward{make_shape(B, T, H, D, dtype), {qkv, dtype}, {out, dtype}, (float*)lse, (const int32_t*)segments, tile}.run();
}

void attention_backward(addr dout, addr qkv, addr out, addr lse, addr segments, addr dqkv, addr partial, int64_t B,
                        int64_t T, int64_t H, int64_t D, double scale, int64_t dtype, addr rng, int64_t threshold,
                        double keep_scale, int64_t site) {
  const Dropout dropout = dropout_of(rng, threshold, keep_scale, site);
  const Tile tile = make_tile(T, scale, dropout);
  Backward{make_shape(B, T, H, D, dtype), {dout, dtype}, {qkv, dtype}, {out, dtype}, {dqkv, dtype}, (const float*)lse,
           (const int32_t*)segments, (float*)partial, tile, (float)scale}.run();
}

}  // namespace GPT2_ISA
}  // namespace gpt2
