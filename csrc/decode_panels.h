// Products of a few rows of activations with panels of 16 columns (gpt2_fast/ops/packed_weights.py), which also hold
// the keys and values of the decode step. A panel is read from end to end, a line of 64 bytes a step; a step is
// 1 (float32), 2 (bfloat16) or 4 (int8) inputs of its 16 outputs.
#pragma once

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {

constexpr int PANEL = 16, LINE = 64;
constexpr int PV = PANEL / W;  // vectors of a panel's columns

// What a thread reads: memory up to `end`, then what lies `jump` bytes on. So what comes next is on its way before it
// is asked for, and what nobody reads is not fetched, but for the rest of a few lines that are fetched together.
struct Stream {
  const char* end;
  int64_t jump;

  static Stream to(const char* end, const char* next) { return {end, next - end}; }

  // Before `N` lines at w are read: as many further on are fetched, each in two steps. A core can wait for few lines to
  // its first cache and for more to its second: the far ones come from memory to the second, the near ones from there.
  template <int N = 1>
  inline __attribute__((always_inline)) void fetch_ahead(const char* w) const {
    constexpr int64_t TO_SECOND = 8192, TO_FIRST = 3072;  // bytes
    const char *far = w + TO_SECOND, *near = w + TO_FIRST;
    if (far >= end) far += jump;
    if (near >= end) near += jump;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      __builtin_prefetch(far + i * LINE, 0, 2);
      __builtin_prefetch(near + i * LINE);
    }
  }
};

// The rows that one pass over a panel serves; a pass for fewer takes the next of these.
#if defined(__AVX512F__)
constexpr int ROW_TILES[] = {1, 2, 4, 8, 12}, SUMS = 24;
#elif defined(__AVX2__)
constexpr int ROW_TILES[] = {1, 2, 4}, SUMS = 8;
#else
constexpr int ROW_TILES[] = {1, 2}, SUMS = 8;
#endif
constexpr int TILES = sizeof(ROW_TILES) / sizeof(int), ROWS = ROW_TILES[TILES - 1];

// Inputs of an output that lie together.
template <class E>
constexpr int GROUP_OF = 4 / (int)sizeof(E);

// Input i of the group that each lane holds, as float.
template <class E>
GPT2_INLINE vf widen(vu x, int i) {
  if (sizeof(E) == 4) return as<vf>(x);
  if (sizeof(E) == 2) return as<vf>(i == 0 ? x << 16 : x & 0xffff0000u);
  return __builtin_convertvector(as<vi>((x ^ 0x80808080u) << (24 - 8 * i)) >> 24, vf);
}

// Every third row of R: those between are one and two strides on, which an x86 address expresses.
#define GPT2_THIRD_ROWS(T, name, R, rows, stride) \
  const T* name[(R + 2) / 3]; \
  for (int i = 0; i < (R + 2) / 3; ++i) name[i] = (rows) + 3 * i * (stride)

// Rows of float32 activations [M, stride] for panels of E; zero where a panel's last line goes beyond K.
template <class E>
struct Dense {
  const float* values;
  int64_t stride;

  static constexpr int GROUP = GROUP_OF<E>;
  static constexpr int sums(int rows) { return rows * PV; }
  static int64_t pitch(int64_t steps) { return steps * LINE; }
};

// Panels as they lie in memory, the lines of one `line` bytes apart and panels `pitch` bytes.
struct Panels {
  const char* w;
  int64_t pitch, line, steps;  // steps: lines of a panel; of int4, groups

  Panels from(int64_t panel) const { return {w + panel * pitch, pitch, line, steps}; }
};

// Lines of a panel that a tile of few rows reads in one pass of its loop: of float32, bfloat16 and int8 several are
// faster than one, of int4 they are slower.
constexpr int lines_of(int rows, int panels) { return panels == 1 && rows <= 4 ? 8 : 1; }

// sum += N lines of each of P panels times the inputs that they hold.
template <int N, int R, int P, class E>
GPT2_INLINE void add_lines(const Panels& panels, const Stream& stream, const Dense<E>& a, const char*& w,
                           const float* (&third)[(R + 2) / 3], vf (&sum)[R][P][PV]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) stream.fetch_ahead<N>(w + p * panels.pitch);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    vu packed[P][PV];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) memcpy(&packed[p][v], w + p * panels.pitch + v * sizeof(vu), sizeof(vu));
#pragma GCC unroll 4
    for (int i = 0; i < GROUP_OF<E>; ++i) {
      vf weight[P][PV];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) weight[p][v] = widen<E>(packed[p][v], i);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const vf x = splat(third[r / 3][r % 3 * a.stride + n * GROUP_OF<E> + i]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
          for (int v = 0; v < PV; ++v) sum[r][p][v] = multiply_add(x, weight[p][v], sum[r][p][v]);
      }
    }
    w += panels.line;
  }
#pragma GCC unroll 8
  for (int i = 0; i < (R + 2) / 3; ++i) third[i] += N * GROUP_OF<E>;
}

// out[r][0 .. 16 P) = rows `row`, row + 1 ... of a times P panels.
template <int R, int P, class E>
__attribute__((noinline)) void panel_tile(const Panels& panels, const Stream& stream, const Dense<E>& a, int64_t row,
                                          float* out, int64_t ldo) {
  constexpr int N = lines_of(R, P);
  const char* w = panels.w;
  vf sum[R][P][PV];
#pragma GCC unroll 32
  for (int i = 0; i < R * P * PV; ++i) sum[i / (P * PV)][i / PV % P][i % PV] = vf{};
  GPT2_THIRD_ROWS(float, third, R, a.values + row * a.stride, a.stride);
  int64_t s = 0;
  for (; s + N <= panels.steps; s += N) add_lines<N>(panels, stream, a, w, third, sum);
  for (; s < panels.steps; ++s) add_lines<1>(panels, stream, a, w, third, sum);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v) store(out + r * ldo + p * PANEL + v * W, sum[r][p][v]);
}

// Panels side by side in a tile of `rows` rows, as many as the registers hold sums for. Of a few rows it is one where
// each panel lies by itself, as memory gives a single stream more than four.
template <class A>
constexpr int panels_of(int rows, bool apart) {
  return apart && rows <= 4 ? 1 : 4 * A::sums(rows) <= SUMS ? 4 : 2 * A::sums(rows) <= SUMS ? 2 : 1;
}

// `count` panels side by side, R rows.
template <int R, bool APART, class A>
GPT2_INLINE void panel_row(const Panels& panels, const Stream& stream, const A& a, int64_t row, int64_t count,
                           float* out, int64_t ldo) {
  constexpr int P = panels_of<A>(R, APART);
  int64_t p = 0;
  for (; p + P <= count; p += P) panel_tile<R, P>(panels.from(p), stream, a, row, out + p * PANEL, ldo);
  if (P > 1)
    for (; p < count; ++p) panel_tile<R, 1>(panels.from(p), stream, a, row, out + p * PANEL, ldo);
}

// How many rows the tile for `rows` more of them has: memory up to there is read and written.
GPT2_INLINE int tile_rows(int64_t rows) {
  for (int i = 0; i < TILES; ++i)
    if (rows <= ROW_TILES[i]) return ROW_TILES[i];
  return ROWS;
}

// out = a[row .. row + rows) times `count` panels; rows: of tile_rows. APART: a panel's lines follow one another.
template <bool APART = true, class A>
__attribute__((noinline)) void panel_rows(const Panels& panels, const Stream& stream, const A& a, int64_t row, int rows,
                                          int64_t count, float* out, int64_t ldo) {
  switch (rows) {
    case 1: return panel_row<1, APART>(panels, stream, a, row, count, out, ldo);
    case 2: return panel_row<2, APART>(panels, stream, a, row, count, out, ldo);
#if defined(__AVX2__)
    case 4: return panel_row<4, APART>(panels, stream, a, row, count, out, ldo);
#endif
#if defined(__AVX512F__)
    case 8: return panel_row<8, APART>(panels, stream, a, row, count, out, ldo);
    case 12: return panel_row<12, APART>(panels, stream, a, row, count, out, ldo);
#endif
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
