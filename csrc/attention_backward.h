// The backward pass of attention.cpp, where the equations are.
//
// A task is GROUP keys of one head; dQ of a block of queries is summed group by group in that order whether one thread
// does all groups of a head or each thread one, so the bits do not depend on the number of threads.
#pragma once

#include "attention.h"
#include "attention_tile.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t GROUP = ATTENTION_KEY_GROUP;  // keys of a task

thread_local Scratch scratch;

// s: scores, becomes dropout(P) without its 1 / (1 - p); d: dO . V, becomes dS. With G = 2 both become bfloat16, a row
// in the first half of its place, and pairs, [BLOCK / 2][BLOCK], dS by pairs of keys.
template <Visibility VISIBILITY, bool DROP, int G>
__attribute__((noinline)) void gradient_tile(const Tile& t, float* s, float* d, float* pairs, const float* lse,
                                             const float* delta) {
  const float scale = t.dropout->scale;
  for (int64_t c = 0; c < t.columns(); c += W) {
    const int64_t rows = tile_rows(t.diagonal(), c, t.keys);
    Queries q{};
    if (VISIBILITY != FULL) q = load_queries(VISIBILITY == MASKED ? t.segments : nullptr, t.i0 + c, t.T);
    const vf shift = load(lse + c), mean = load(delta + c);
    vf even{};
    for (int64_t r = 0; r < rows; r += KEEP_KEYS) {
      vi keep[KEEP_KEYS];
      if (DROP) keep_keys(*t.dropout, (uint32_t)t.z, t.i0 + c, t.j0 + r, keep);
      for (int64_t k = 0; k < smaller(KEEP_KEYS, rows - r); ++k) {
        float *x = s + (r + k) * BLOCK, *y = d + (r + k) * BLOCK;
        vf p = vexp2(load(x + c) * t.log2_scale - shift);
        if (VISIBILITY != FULL) p = visible<VISIBILITY>(q, t.segments, t.j0 + r + k) ? p : vf{};
        vf g = load(y + c);
        if (DROP) g = keep[k] ? g * scale : vf{};
        const vf kept = DROP ? (keep[k] ? p : vf{}) : p, ds = p * (g - mean);
        if (G == 1) {
          store(x + c, kept);
          store(y + c, ds);
        } else {
          store((bf16*)x + c, kept);
          store((bf16*)y + c, ds);
          leave<G>(pairs + c, r + k, even, ds);
        }
      }
    }
    if (G == 2 && rows % 2) store(pairs + rows / 2 * BLOCK + c, pair_of(even, vf{}));
    clear_missing_pairs(pairs + c, rows);
  }
  if (HAS_TILES && t.columns() % 32 != 0)  // of what a tile register reads beside them, q_steps and g_steps have zeros
    for (int64_t r = 0; r < t.keys; ++r) {
      store((bf16*)(s + r * BLOCK) + t.columns(), vf{});
      store((bf16*)(d + r * BLOCK) + t.columns(), vf{});
    }
}

// The tiles of one backward task. Those of steps and columns are operands of `pack_steps` and `pack_columns`.
struct Gradients {
  float *dk, *dv;                                        // [GROUP][D], float32
  float *k_steps, *k_columns, *v_columns;                // [GROUP][D]
  float *q_steps, *q_columns, *g_steps, *g_columns, *dq;  // [BLOCK][D]; columns are transposed; g is dO
  float *s, *ds, *pairs, *by_queries;                    // [BLOCK][BLOCK]; the last is the transpose of pairs
  Gradients(int64_t ld, int64_t extra) {
    const int64_t area = BLOCK * ld, group = GROUP * ld, tile = BLOCK * BLOCK;
    dk = scratch.reserve(5 * group + 5 * area + 4 * tile + extra);
    dv = dk + group, k_steps = dv + group, k_columns = k_steps + group, v_columns = k_columns + group;
    q_steps = v_columns + group, q_columns = q_steps + area, g_steps = q_columns + area, g_columns = g_steps + area;
    dq = g_columns + area, s = dq + area, ds = s + tile, pairs = ds + tile, by_queries = pairs + tile;
  }
  float* extra() const { return by_queries + BLOCK * BLOCK; }
};

// dV += P dO, dK += dS Q, dQ += dS^T K for one tile whose keys begin at row `at` of the group.
template <int G>
GPT2_INLINE void add_gradients(const Tile& t, const Shape& shape, const Gradients& x, int64_t at) {
  const int64_t ld = shape.stride(), width = shape.width();
  float *dk = x.dk + at * ld, *dv = x.dv + at * ld;
  const float *k = x.k_steps + at / G * ld, *left = HAS_TILES ? x.by_queries : G == 2 ? x.pairs : x.ds;
  constexpr ALayout LAYOUT = HAS_TILES ? A_ROWS : A_COLUMNS;
  const int64_t ld_left = HAS_TILES ? BY_KEYS : BLOCK;
  if (HAS_TILES) transpose_tile(x.by_queries, BY_KEYS, x.pairs, BLOCK, round_up(steps<G>(t.keys), W), t.columns());
  if (!t.diagonal()) {
    const int64_t queries = steps<G>(t.queries);
    gemm<A_ROWS, ADD, G>(t.keys, width, queries, x.s, BLOCK, x.g_steps, ld, dv, ld);
    gemm<A_ROWS, ADD, G>(t.keys, width, queries, x.ds, BLOCK, x.q_steps, ld, dk, ld);
    gemm<LAYOUT, ADD, G>(t.queries, width, steps<G>(t.keys), left, ld_left, k, ld, x.dq, ld);
    return;
  }
  for (int64_t r = 0; r < t.keys; r += CHUNK) {
    const int64_t rows = smaller(CHUNK, t.keys - r), queries = steps<G>(t.queries - r);
    const int64_t corner = r * BLOCK + r / G, first = r / G * ld;
    gemm<A_ROWS, ADD, G>(rows, width, queries, x.s + corner, BLOCK, x.g_steps + first, ld, dv + r * ld, ld);
    gemm<A_ROWS, ADD, G>(rows, width, queries, x.ds + corner, BLOCK, x.q_steps + first, ld, dk + r * ld, ld);
    gemm<LAYOUT, ADD, G>(rows, width, steps<G>(r + rows), left + r * (HAS_TILES ? ld_left : 1), ld_left, k, ld,
                         x.dq + r * ld, ld);
  }
}

template <int G>
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

  // Rows of a block as steps and, transposed, as columns.
  void pack_block(float* as_steps, float* as_columns, Elements rows, int64_t stride, const Tile& t,
                  const Gradients& x) const {
    pack_steps<G>(as_steps, rows, stride, t.queries, shape);
    if (G == 2) pack_columns<G>(x.s, rows, stride, t.queries, shape);  // the tiles of scores are free now
    transpose_tile(as_columns, BLOCK, G == 2 ? x.s : as_steps, shape.stride(), t.queries, steps<G>(shape.D));
  }

  // delta, with the sum over D in the order of gemm: a query that sees one key then gets exactly zero dS.
  void row_products(const Gradients& x, Elements o_rows, const Tile& t, float* product) const {
    // The tiles of scores are together [BLOCK][2 * BLOCK] floats, and ld is at most that.
    pack_columns<G>(x.s, o_rows, shape.H * shape.D, t.queries, shape);
    if constexpr (HAS_TILES) {
      for (int64_t c = 0; c < t.columns(); c += W) {
        gemm<A_ROWS, SET, G>(W, W, steps<G>(shape.D), x.s + c * shape.stride(), shape.stride(), x.g_columns + c, BLOCK,
                             x.pairs, W);
        for (int64_t i = 0; i < W; ++i) product[c + i] = c + i < t.queries ? x.pairs[i * W + i] : 0.0f;
      }
      return;
    }
    transpose_tile(x.dq, BLOCK, x.s, shape.stride(), t.queries, steps<G>(shape.D));
    for (int64_t c = 0; c < t.columns(); c += W) {
      vf sum{};
      for (int64_t d = 0; d < steps<G>(shape.D); ++d)
        add_lanes<G>(sum, load(x.dq + d * BLOCK + c), load(x.g_columns + d * BLOCK + c));
      store(product + c, sum);
    }
  }

  // high and log2_total of a block of queries, as forward found them: the largest score, and log2 of the sum over all
  // keys of 2^((score - high) * log2_scale). lse is their sum, rounded to a multiple of 2^-11 and more where it is far.
  void softmax_again(const Gradients& x, int64_t z, Tile t, float* high, float* log2_total) const {
    const Elements k_rows = qkv + (packed(z, 0) + shape.H * shape.D);
    float *keys = x.dq, total[BLOCK], shrink[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) high[i] = NOTHING, total[i] = 0.0f;
    for (t.j0 = 0; t.j0 <= t.i0; t.j0 += BLOCK) {
      t.keys = smaller(BLOCK, shape.T - t.j0);
      const Visibility visibility = tile_visibility(t.segments, t.i0, t.queries, t.j0, t.keys);
      if (visibility == HIDDEN) continue;
      pack_columns<G>(keys, k_rows + t.j0 * shape.row(), shape.row(), t.keys, shape);
      scores<G>(t, shape, keys, x.q_columns, x.s);
      GPT2_VISIBILITY(visibility, V, (softmax_tile<V, false, G>(t, x.s, high, total, shrink)));
    }
    for (int64_t i = 0; i < BLOCK; ++i) log2_total[i] = log2f(total[i]);
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
    alignas(64) float shift[BLOCK], mean[BLOCK], high[BLOCK], log2_total[BLOCK];
    alignas(64) const float zeros[BLOCK] = {};
    Tile t = tile;
    t.z = z;
    t.segments = segments ? segments + z / shape.H * T : nullptr;
    pack_steps<G>(x.k_steps, k_rows, row, rows, shape);
    if (G == 2) pack_columns<G>(x.k_columns, k_rows, row, rows, shape);
    pack_columns<G>(x.v_columns, k_rows + side, row, rows, shape);
    const float* k_columns = G == 2 ? x.k_columns : x.k_steps;
    memset(x.dk, 0, 2 * GROUP * ld * sizeof(float));
    for (t.i0 = begin; t.i0 < T; t.i0 += BLOCK) {
      t.queries = smaller(BLOCK, T - t.i0);
      pack_block(x.q_steps, x.q_columns, qkv + packed(z, t.i0), row, t, x);
      pack_block(x.g_steps, x.g_columns, dout + token(z, t.i0) * D, side, t, x);
      row_products(x, out + token(z, t.i0) * D, t, mean);
      for (int64_t i = 0; i < BLOCK; ++i) shift[i] = i < t.queries ? lse[z * T + t.i0 + i] * LOG2E : 0.0f;
      vi some{};
      for (int64_t c = 0; c < BLOCK; c += W) some |= is_far(load(shift + c));
      const bool far = any(some);
      if (far) softmax_again(x, z, t, high, log2_total);
      memset(x.dq, 0, BLOCK * ld * sizeof(float));
      for (int64_t at = 0; at < rows && begin + at <= t.i0; at += BLOCK) {
        t.j0 = begin + at;
        t.keys = smaller(BLOCK, T - t.j0);
        const Visibility visibility = tile_visibility(t.segments, t.i0, t.queries, t.j0, t.keys);
        if (visibility == HIDDEN) continue;
        scores<G>(t, shape, k_columns + at * ld, x.q_columns, x.s);
        scores<G>(t, shape, x.v_columns + at * ld, x.g_columns, x.ds);
        Tile u = t;
        if (far) {  // the tile's scores become the exponents
          for (int64_t c = 0; c < t.columns(); c += W)
            shift_scores(x.s + c, tile_rows(t.diagonal(), c, t.keys), is_far(load(shift + c)), load(high + c),
                         load(log2_total + c), load(shift + c), t.log2_scale);
          u.log2_scale = 1.0f;
        }
        const float* less = far ? zeros : shift;
        GPT2_VISIBILITY(visibility, V,
                        t.dropout->on ? gradient_tile<V, true, G>(u, x.s, x.ds, x.pairs, less, mean)
                                      : gradient_tile<V, false, G>(u, x.s, x.ds, x.pairs, less, mean));
        add_gradients<G>(t, shape, x, at);
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
      [[maybe_unused]] const TileRegisters registers;
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
}  // namespace GPT2_ISA
}  // namespace gpt2
