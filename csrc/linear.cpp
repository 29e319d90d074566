// C = A @ B + bias for products of many rows: the training step's and a prefill's.
//
// B is copied into panels (linear_pack.h), a block at a time. So is A, unless its inputs lie next to each other in the
// dtype that the tile multiplies: then it is read where it lies, but for what does not fill a tile or its steps. A tile
// of C (8 x 48 with AVX-512) stays in registers over CHAIN steps; what follows the sum (bias, GELU, rounding) happens
// before it is stored. From panels, products reach 97% of the processor's multiply-adds: what counts is to move less.
//
// After Goto and van de Geijn 2008 ("Anatomy of high-performance matrix multiplication") and BLIS, with longer panels:
// one of B comes from the second-level cache as fast as the tile takes it, so it need not fit the first.
//
// An output's sum runs over its inputs in order, CHAIN steps at a time, whatever the number of threads.
#include "kernels.h"
#if defined(__AMX_BF16__)
#include "linear_tile_amx.h"
#else
#include "linear_tile.h"
#endif
#include "linear_finish.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t CHAIN = 384;         // steps that are added up one after another; then their sums are
constexpr int64_t MAX_DEPTH = 1536;    // steps of a block
constexpr int64_t CACHED = 192 << 10;  // units (4 bytes) of A that stay in the second-level cache
constexpr int64_t PACKED_A = 2 << 20, PACKED_B = 512 << 10;  // units that are packed at a time

// n cut into equal blocks of at most `most`, each a multiple of `step`.
GPT2_INLINE int64_t block_of(int64_t n, int64_t most, int64_t step) {
  most = most < step ? step : most;
  return round_up(ceil_div(n, ceil_div(n, most)), step);
}

// How a product is cut: blocks of `rows` x `columns` x `depth` steps; and what the workspace holds, in units.
struct Plan {
  int64_t steps, depth, rows, columns, packed_a, packed_b, last_inputs, partial;

  Plan(int64_t M, int64_t N, int64_t K, int64_t group, int64_t threads) {
    const int64_t even = TILE_N * threads;  // columns of which every thread has as many
    steps = round_up(ceil_div(K, group), TILE_STEPS);
    depth = block_of(steps, MAX_DEPTH, TILE_STEPS);
    rows = block_of(M, PACKED_A / depth, TILE_N);  // A is packed in panels of TILE_M, but TILE_N at a time
    columns = block_of(N, PACKED_B / depth, N < even ? TILE_N : even);
    packed_a = rows * depth;
    packed_b = columns * depth;
    last_inputs = round_up(M, TILE_N) * TILE_STEPS;
    partial = depth < steps ? round_up(M, TILE_M) * round_up(N, TILE_N) : 0;
  }
};

// Part of C, and of the sums in it.
struct Block {
  int64_t row, column, step, steps;
  bool first, last;  // of the steps
};

// One thread's view of a product.
struct Product {
  // Whether each thread multiplies the columns that it packs itself, and waits for nobody.
  bool alone;
  Plan plan;
  Operand a, b;
  Result to;
  int64_t M, N, K, group, thread, threads;
  float *packed_a, *packed_b, *last_inputs, *partial;

  bool in_place() const { return a.step == 1 && a.dtype == (group == 2 ? BF16 : F32); }

  // Inputs at the end of a row that do not fill the steps of a tile: of A in place they are packed.
  int64_t last_count() const { return K % (TILE_STEPS * group); }

  // Nothing of A is packed, each thread's panels have a place of their own, and columns are as fair as a grid.
  bool can_be_alone() const {
    return in_place() && M % TILE_M == 0 && !last_count() && plan.columns % (TILE_N * threads) == 0 &&
           threads_along_columns(M / TILE_M, ceil_div(N, TILE_N)) == threads;
  }

  // Where a block of B is packed: panel after panel, and those of a thread that is alone from its own place on, which
  // is the same in every block: another may still be multiplying the one before.
  float* packed(const Block& block) const {
    const int64_t panels = ceil_div(smaller(plan.columns, N - block.column), TILE_N);
    if (!alone) return packed_b;
    return packed_b + plan.columns / threads * thread * plan.depth - panels * thread / threads * TILE_N * block.steps;
  }

  void meet_others() const {
    if (!alone) meet();
  }

  // A grid of threads over a block of `panels_m` x `panels_n` tiles: as even as can be, then more along the columns.
  int64_t threads_along_columns(int64_t panels_m, int64_t panels_n) const {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t n = 1; n <= threads; ++n) {
      if (threads % n) continue;
      const int64_t tiles = ceil_div(panels_m, threads / n) * ceil_div(panels_n, n);
      if (tiles <= least) least = tiles, best = n;
    }
    return best;
  }

  // The sums of a tile at (row, column) of a block.
  void sum_tile(const Block& block, int64_t row, int64_t column, float* sums) const {
    const float* at_b = packed(block) + column * block.steps;
    const int64_t at_row = block.row + row;
    if (!in_place() || at_row + TILE_M > M) {
      const float* at_a = packed_a + (in_place() ? 0 : row * block.steps);
      for (int64_t s = 0; s < block.steps; s += CHAIN) {
        auto run = group == 2 ? multiply_tile<2, false> : multiply_tile<1, false>;
        run(smaller(CHAIN, block.steps - s), at_a + s * TILE_M, 0, at_b + s * TILE_N, s > 0, sums);
      }
      return;
    }
    const bool tail = block.last && last_count();
    const int64_t steps = block.steps - (tail ? TILE_STEPS : 0), stride = a.lane * 4 / group;
    const float* at_a = (const float*)(a.data + at_row * stride) + block.step;
    for (int64_t s = 0; s < steps; s += CHAIN) {
      auto run = group == 2 ? multiply_tile<2, true> : multiply_tile<1, true>;
      run(smaller(CHAIN, steps - s), at_a + s, stride, at_b + s * TILE_N, s > 0, sums);
    }
    if (tail)  // pairs: single floats fill every step
      multiply_tile<2, false>(TILE_STEPS, last_inputs + at_row * TILE_STEPS, 0, at_b + steps * TILE_N, steps > 0, sums);
  }

  // A tile's sums, added to those of the blocks of steps before, and what becomes of them.
  void tile(const Block& block, int64_t row, int64_t column) const {
    const int64_t at_row = block.row + row, at_column = block.column + column;
    const int64_t rows = smaller(TILE_M, M - at_row), columns = smaller(TILE_N, N - at_column);
    if (block.last && !to.by_lines)
      for (int64_t r = 0; r < rows; ++r)
        __builtin_prefetch(to.c + ((at_row + r) * to.stride + at_column) * (to.dtype == F32 ? 4 : 2), 1);
    alignas(64) float sums[TILE_M * TILE_N];
    sum_tile(block, row, column, sums);
    if (!block.first || !block.last) {
      float* held = partial + at_row * round_up(N, TILE_N) + at_column * TILE_M;
      for (int64_t i = 0; i < TILE_M * TILE_N; i += W) {
        const vf x = block.first ? load(sums + i) : load(held + i) + load(sums + i);
        store(block.last ? sums + i : held + i, x);
      }
    }
    if (block.last) finish_tile(to, sums, at_row, at_column, rows, columns);
  }

  // This thread's tiles: those of the rows that stay in its cache, panel of B after panel.
  void tiles(const Block& block) const {
    const int64_t panels_m = ceil_div(smaller(plan.rows, M - block.row), TILE_M);
    const int64_t panels_n = ceil_div(smaller(plan.columns, N - block.column), TILE_N);
    const int64_t along = alone ? threads : threads_along_columns(panels_m, panels_n), others = threads / along;
    const int64_t i = thread / along, j = thread % along;
    const int64_t end_m = panels_m * (i + 1) / others, end_n = panels_n * (j + 1) / along;
    const int64_t held = CACHED / block.steps / TILE_M > 0 ? CACHED / block.steps / TILE_M : 1;
    for (int64_t m0 = panels_m * i / others; m0 < end_m; m0 += held)
      for (int64_t n = panels_n * j / along; n < end_n; ++n)
        for (int64_t m = m0; m < m0 + held && m < end_m; ++m) tile(block, m * TILE_M, n * TILE_N);
  }

  // What of A is not read where it lies.
  void pack_a(const Block& block, int64_t first, int64_t count) const {
    const Panels panels{packed_a, TILE_M, block.steps};
    if (!in_place()) {
      pack_left(a, group, block.row, smaller(plan.rows, M - block.row), first, count, panels, thread, threads);
      return;
    }
    pack_left(a, group, M / TILE_M * TILE_M, M % TILE_M, first, count, panels, thread, threads);
    if (block.last && last_count())
      pack_left(a, group, 0, M, K - last_count(), last_count(), {last_inputs, TILE_M, TILE_STEPS}, thread, threads);
  }

  void run() const {
    [[maybe_unused]] const TileRegisters registers;
    Block block{};
    for (; block.step < plan.steps; block.step += plan.depth) {
      block.steps = smaller(plan.depth, plan.steps - block.step);
      block.first = block.step == 0, block.last = block.step + block.steps == plan.steps;
      const int64_t first = block.step * group, count = smaller(block.steps * group, K - first);
      for (block.row = 0; block.row < M; block.row += plan.rows) {
        pack_a(block, first, count);
        for (block.column = 0; block.column < N; block.column += plan.columns) {
          if (block.row == 0 || plan.columns < N)  // a single block of columns stays packed for all rows
            pack(b, group, block.column, smaller(plan.columns, N - block.column), first, count,
                 {packed(block), TILE_N, block.steps}, thread, threads);
          meet_others();
          tiles(block);
          meet_others();
        }
      }
    }
    lines_are_seen();
  }
};

int64_t group_of(bool pairs) { return pairs ? PAIR : 1; }

}  // namespace
}  // namespace GPT2_ISA

#if defined(__AMX_BF16__)
namespace GPT2_BASE_ISA {
GPT2_LINEAR_KERNELS(GPT2_DECLARE)
}
#endif

namespace GPT2_ISA {

void linear_workspace(int64_t M, int64_t N, int64_t K, bool pairs, int64_t threads, addr bytes) {
#if defined(__AMX_BF16__)
  if (!pairs) return GPT2_BASE_ISA::linear_workspace(M, N, K, pairs, threads, bytes);
#endif
  const Plan plan(M, N, K, group_of(pairs), threads);
  const int64_t units = plan.packed_a + plan.packed_b + plan.last_inputs + plan.partial;
  *(int64_t*)bytes = units * (int64_t)sizeof(float);
}

void linear_product(addr a, int64_t a_dtype, int64_t a_m, int64_t a_k, addr b, int64_t b_dtype, int64_t b_k,
                    int64_t b_n, addr bias, addr c, int64_t c_m, addr u, int64_t c_dtype, int64_t finish, int64_t M,
                    int64_t N, int64_t K, bool pairs, addr workspace, int64_t threads) {
#if defined(__AMX_BF16__)
  if (!pairs)
    return GPT2_BASE_ISA::linear_product(a, a_dtype, a_m, a_k, b, b_dtype, b_k, b_n, bias, c, c_m, u, c_dtype, finish,
                                         M, N, K, pairs, workspace, threads);
#endif
  const int64_t group = group_of(pairs);
  const Plan plan(M, N, K, group, threads);
  float *packed_a = (float*)workspace, *packed_b = packed_a + plan.packed_a;
  float *last_inputs = packed_b + plan.packed_b, *partial = last_inputs + plan.last_inputs;
  const Result to{(char*)c, (char*)u, (const float*)bias, c_dtype, c_m, finish,
                  Result::past_cache(c, u, c_dtype, c_m, finish, M * N * (int64_t)sizeof(bf16), threads)};
#pragma omp parallel num_threads((int)threads)
  {
    Product product{false, plan, {(const char*)a, a_dtype, a_m, a_k}, {(const char*)b, b_dtype, b_n, b_k}, to, M, N, K,
                          group, this_thread(), thread_count(), packed_a, packed_b, last_inputs, partial};
    product.alone = product.can_be_alone();
    product.run();
  }
}

template <class T>
static void sum_chunks(const T* x, float* partial, int64_t chunks, int64_t N, int64_t F) {
  const int64_t rows = ceil_div(N, chunks);
  GPT2_PARALLEL_FOR(k, chunks) {
    float* sum = partial + k * F;
    memset(sum, 0, F * sizeof(float));
    for (int64_t i = k * rows; i < smaller((k + 1) * rows, N); ++i)
      for (int64_t c = 0; c < F; c += W) store_n(sum + c, load_n(sum + c, F - c) + load_n(x + i * F + c, F - c), F - c);
  }
}

void column_sum(addr x, addr partial, int64_t chunks, addr sum, int64_t N, int64_t F, int64_t x_dtype,
                int64_t sum_dtype) {
  float* sums = sum_dtype == F32 ? (float*)sum : (float*)partial;  // a block of columns is read before it is written
  GPT2_DISPATCH(x_dtype, T, { sum_chunks((const T*)x, (float*)partial, chunks, N, F); });
  sum_partials((const float*)partial, chunks, F, sums, F);
  if (sum_dtype == F32) return;
  GPT2_DISPATCH(sum_dtype, T, {
    for (int64_t c = 0; c < F; c += W) store_n((T*)sum + c, load_n(sums + c, F - c), F - c);
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
