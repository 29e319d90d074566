// The tile of linear.cpp in Intel's tile registers: 32 x 32 sums, of 16 pairs of bfloat16 at a time.
//
// A is read by rows: where it lies, or packed as [steps / 16][TILE_M][16] units. B is packed in panels as everywhere.
#pragma once

#include "amx.h"
#include "linear_pack.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t TILE_STEPS = TILE_UNITS;  // steps that a tile takes at once
constexpr int64_t AHEAD = 1;                // such steps that are fetched before their use

// Rows of a register that will be loaded: no hardware's prefetch sees 16 streams in time.
template <int ROWS>
GPT2_INLINE void fetch(const float* at, int64_t stride) {
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r) __builtin_prefetch((const char*)at + r * stride);
}

// sums[r][c] (=, += where `add`) the products of TILE_M rows of A, which in place are `next_row` bytes apart, and a
// panel of B. `steps` is a multiple of TILE_STEPS. Of pairs (G = 2): single floats are multiplied by the set this one
// is based on.
template <int G, bool IN_PLACE>
__attribute__((noinline)) void multiply_tile(int64_t steps, const float* a, int64_t next_row, const float* b, bool add,
                                             float* sums) {
  constexpr int64_t half = TILE_ROWS * TILE_N, wide = TILE_N * sizeof(float);
  const int64_t stride = IN_PLACE ? next_row : TILE_STEPS * (int64_t)sizeof(float);
  const int64_t next = IN_PLACE ? TILE_STEPS : TILE_M * TILE_STEPS;
  const float* lower = (const float*)((const char*)a + TILE_ROWS * stride);
  if (add) {
    GPT2_TILE_LOAD(0, sums, wide);
    GPT2_TILE_LOAD(1, sums + W, wide);
    GPT2_TILE_LOAD(2, sums + half, wide);
    GPT2_TILE_LOAD(3, sums + half + W, wide);
  } else {
    GPT2_TILE_ZERO(0);
    GPT2_TILE_ZERO(1);
    GPT2_TILE_ZERO(2);
    GPT2_TILE_ZERO(3);
  }
  for (int64_t s = 0; s < steps; s += TILE_STEPS) {
    GPT2_TILE_LOAD(6, b, wide);
    GPT2_TILE_LOAD(4, a, stride);
    GPT2_TILE_MULTIPLY(0, 4, 6);
    fetch<TILE_ROWS>(a + AHEAD * next, stride);
    GPT2_TILE_LOAD(7, b + W, wide);
    GPT2_TILE_MULTIPLY(1, 4, 7);
    fetch<TILE_ROWS>(lower + AHEAD * next, stride);
    GPT2_TILE_LOAD(5, lower, stride);
    GPT2_TILE_MULTIPLY(2, 5, 6);
    fetch<2 * TILE_ROWS>(b + AHEAD * TILE_STEPS * TILE_N, W * sizeof(float));
    GPT2_TILE_MULTIPLY(3, 5, 7);
    a += next;
    lower += next;
    b += TILE_STEPS * TILE_N;
  }
  GPT2_TILE_STORE(0, sums, wide);
  GPT2_TILE_STORE(1, sums + W, wide);
  GPT2_TILE_STORE(2, sums + half, wide);
  GPT2_TILE_STORE(3, sums + half + W, wide);
}

// 16 lanes from x on, n of which there are, and 16 pairs of their steps, of `count` inputs; the rest is zero.
GPT2_INLINE void pack_block(const bf16* x, const Operand& from, int64_t n, int64_t count, float* to) {
  const bool whole = count >= 2 * W;
  vf rows[W];
  if (from.lane == 1) {
    for (int64_t s = 0; s < W; ++s, x += 2 * from.step)
      rows[s] = 2 * s < count ? lanes_of<2>(x, from.step, 2 * s + 1 == count, n) : vf{};
    transpose(rows);
  } else {
    for (int64_t r = 0; r < W; ++r)
      rows[r] = r >= n || count <= 0 ? vf{}
                : whole              ? full_steps_of<2>(x + r * from.lane)
                                     : steps_of<2>(x + r * from.lane, count);
  }
  for (int64_t r = 0; r < W; ++r) store(to + r * TILE_STEPS, rows[r]);
}

// This thread's part of A: `lanes` rows from `origin` on, `count` inputs of each from `first` on.
void pack_left(const Operand& from, int64_t, int64_t origin, int64_t lanes, int64_t first, int64_t count,
               const Panels& to, int64_t thread, int64_t threads) {
  const int64_t panels = ceil_div(lanes, TILE_M);
  const bf16* x = (const bf16*)from.data + origin * from.lane + first * from.step;
  for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; ++panel)
    for (int64_t step = 0; step < to.depth; step += TILE_STEPS)
      for (int64_t row = panel * TILE_M; row < (panel + 1) * TILE_M; row += W)
        pack_block(x + row * from.lane + 2 * step * from.step, from, lanes - row, count - 2 * step,
                   to.units + panel * TILE_M * to.depth + step * TILE_M + row % TILE_M * TILE_STEPS);
}

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
