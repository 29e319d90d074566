// The tile of linear.cpp in vector registers: TILE_M x TILE_N sums, of multiply-adds of one step after another.
#pragma once

#include "amx.h"
#include "linear_pack.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t TILE_STEPS = 1;              // steps that a tile takes at once
constexpr int64_t AHEAD_A = 64, AHEAD_B = 16;  // steps that are fetched before their use

// A is packed as B is.
GPT2_INLINE void pack_left(const Operand& from, int64_t group, int64_t origin, int64_t lanes, int64_t first,
                           int64_t count, const Panels& to, int64_t thread, int64_t threads) {
  pack(from, group, origin, lanes, first, count, to, thread, threads);
}

// A unit (4 bytes: a float or a pair of bfloat16), which in place is aligned as its elements are.
GPT2_INLINE float unit_at(const char* p) {
  float x;
  memcpy(&x, p, sizeof(x));
  return x;
}

// sums[r][c] (=, += where `add`) the products of TILE_M rows of A, whose units are `next_row` and `next_step` apart,
// and a panel of B. Every third row has an address of its own: those between are one and two strides on.
template <int G, bool IN_PLACE>
__attribute__((noinline)) void multiply_tile(int64_t steps, const float* a, int64_t next_row, const float* b, bool add,
                                             float* sums) {
  const char* third[(TILE_M + 2) / 3];
  for (int i = 0; i < (TILE_M + 2) / 3; ++i) third[i] = (const char*)a + 3 * i * next_row;
  vf sum[TILE_M][TILE_V];
#pragma GCC unroll 32
  for (int i = 0; i < TILE_M * TILE_V; ++i) sum[i / TILE_V][i % TILE_V] = vf{};
  for (int64_t s = 0; s < steps; ++s) {
    if (!IN_PLACE) __builtin_prefetch(a + AHEAD_A * TILE_M);  // half of it was packed, and is held, by another core
    vf column[TILE_V];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_V; ++v) {
      column[v] = load(b + v * W);
      __builtin_prefetch(b + AHEAD_B * TILE_N + v * W);
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE_M; ++r) {
      const vf x = splat(IN_PLACE ? unit_at(third[r / 3] + r % 3 * next_row) : a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < TILE_V; ++v) add_lanes<G>(sum[r][v], column[v], x);
    }
    a += TILE_M;
    b += TILE_N;
    if (IN_PLACE)
#pragma GCC unroll 4
      for (int i = 0; i < (TILE_M + 2) / 3; ++i) third[i] += sizeof(float);
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE_M; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_V; ++v) {
      float* to = sums + r * TILE_N + v * W;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
