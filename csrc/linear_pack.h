// Copies of matrix operands in the order in which the tile of linear.cpp reads them: panels of a few lanes (rows of A,
// columns of B), one step after another. A step is one input, widened to float32, or a pair of bfloat16 as they are; so
// neither a transposed operand nor one of lower precision costs a pass of its own.
#pragma once

#include "isa.h"
#include "transpose.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

// Sums, a row of B's panel and one number of A fit the registers.
#if defined(__AMX_BF16__)
constexpr int TILE_M = 32, TILE_V = 2;  // two by two tile registers; of pairs alone
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_M = 8, TILE_V = 3;
#elif defined(__AVX2__)
constexpr int TILE_M = 4, TILE_V = 3;
#else
constexpr int TILE_M = 4, TILE_V = 2;
#endif
constexpr int TILE_N = TILE_V * W;
constexpr int64_t AHEAD_ROWS = 8;  // steps that are fetched before their use

struct Operand {
  const char* data;
  int64_t dtype, lane, step;  // strides in elements, between rows of A or columns of B, and between inputs
};

// units[panel][step][lane], a unit being a float or a pair of bfloat16
struct Panels {
  float* units;
  int64_t width, depth;

  // A vector of neighbouring lanes of one step. Either side is a multiple of the other's width.
  inline __attribute__((always_inline)) void put(int64_t lane, int64_t step, vf x) const {
    if (width >= W) {
      store(units + lane / width * width * depth + step * width + lane % width, x);
    } else {
      float lanes[W];
      store(lanes, x);
      for (int64_t i = 0; i < W; i += width)
        memcpy(units + (lane + i) * depth + step * width, lanes + i, width * sizeof(float));
    }
  }
};

// G = 1: a unit is T as float; G = 2: a pair of bfloat16 as it is.

// Lanes next to each other in memory; n of them, then zeros.
template <int G, class T>
GPT2_INLINE vf lanes_of(const T* x, int64_t step, bool last_is_single, int64_t n) {
  if (n <= 0) return vf{};
  vf first = load_n(x, n);
  if (G == 1) return first;
  vf second = last_is_single ? vf{} : load_n(x + step, n);
  return as<vf>((as<vu>(first) >> 16) | as<vu>(second));
}

template <int G, class T>
GPT2_INLINE void pack_along_lanes(const T* x, int64_t stride, int64_t lanes, int64_t count, const Panels& to,
                                  int64_t lane) {
  for (int64_t step = 0; step * G < count; ++step, x += G * stride) {
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < TILE_N; i += 64 / (int64_t)sizeof(T))
        __builtin_prefetch(x + (AHEAD_ROWS * G + g) * stride + i);
    for (int64_t i = 0; i < TILE_N; i += W)
      to.put(lane + i, step, lanes_of<G>(x + i, stride, step * G + 1 == count, lanes - i));
  }
}

// A vector of steps of one lane.
template <int G, class T>
GPT2_INLINE vf steps_of(const T* x, int64_t count) {
  if (G == 1) return load_n(x, count);
  vf pairs{};
  memcpy(&pairs, x, smaller(2 * W, count) * sizeof(T));
  return pairs;
}
template <int G>
GPT2_INLINE vf full_steps_of(const bf16* x) {
  if (G == 1) return load(x);
  vf pairs;
  memcpy(&pairs, x, sizeof(pairs));
  return pairs;
}
template <int G, class T>
GPT2_INLINE vf full_steps_of(const T* x) { return load(x); }

template <int G, class T>
GPT2_INLINE void pack_along_steps(const T* x, int64_t stride, int64_t lanes, int64_t count, const Panels& to,
                                  int64_t lane) {
  for (int64_t i = 0; i < TILE_N; i += W)
    for (int64_t begin = 0; begin < count; begin += W * G) {
      const int64_t n = count - begin;
      vf block[W];
      for (int r = 0; r < W; ++r) {
        const T* row = x + (i + r) * stride + begin;
        __builtin_prefetch(row + W * stride, 0, 2);  // the next block of rows: a row is too short for the hardware's
        block[r] = i + r >= lanes ? vf{} : n >= W * G ? full_steps_of<G>(row) : steps_of<G>(row, n);
      }
      transpose(block);
      for (int s = 0; s < W && s * G < n; ++s) to.put(lane + i, begin / G + s, block[s]);
    }
}

// TILE_N lanes from `lane` on, of the `lanes` that there are, and `count` inputs from `first` on; the rest, up to the
// depth of the panels, is zero.
template <int G, class T>
__attribute__((noinline)) void pack_lanes(const Operand& from, int64_t origin, int64_t lane, int64_t lanes,
                                          int64_t first, int64_t count, const Panels& to) {
  const T* x = (const T*)from.data + (origin + lane) * from.lane + first * from.step;
  if (from.lane == 1)
    pack_along_lanes<G>(x, from.step, lanes - lane, count, to, lane);
  else
    pack_along_steps<G>(x, from.lane, lanes - lane, count, to, lane);
  for (int64_t step = ceil_div(count, G); step < to.depth; ++step)
    for (int64_t i = 0; i < TILE_N; i += W) to.put(lane + i, step, vf{});
}

// This thread's part of a block: `lanes` from `origin` on.
void pack(const Operand& from, int64_t group, int64_t origin, int64_t lanes, int64_t first, int64_t count,
          const Panels& to, int64_t thread, int64_t threads) {
  const int64_t blocks = ceil_div(lanes, TILE_N);
  for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; ++i) {
    const int64_t lane = i * TILE_N;
    if (group == 2)
      pack_lanes<2, bf16>(from, origin, lane, lanes, first, count, to);
    else
      GPT2_DISPATCH(from.dtype, T, { pack_lanes<1, T>(from, origin, lane, lanes, first, count, to); });
  }
}

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
