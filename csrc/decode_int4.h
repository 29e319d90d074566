// Products of a few rows of activations with int4 panels (gpt2_fast/ops/packed_int4.py): codes of 4 bits that choose
// one of 16 levels, int8, and a bfloat16 scale for 32 inputs of an output. As in decode_panels.h a panel is read from
// end to end: for two groups a line of scales, [2][16] bfloat16, and four lines of codes for each. A line of codes is
// eight inputs of 16 outputs; byte i of an output's four holds input i in its low half and input 4 + i in its high
// half.
#pragma once

#include "decode_integers.h"

namespace gpt2 {
namespace GPT2_ISA {

constexpr int INT4_GROUP = 32, INT4_LINES = 4;  // inputs and lines of a group

GPT2_INLINE int64_t int4_pitch(int64_t groups) { return ((groups + 1) / 2 + INT4_LINES * groups) * LINE; }

// Input k of output n of a matrix of K inputs.
GPT2_INLINE float int4_value(const char* panels, const int8_t* levels, int64_t K, int64_t n, int64_t k) {
  const int64_t group = k / INT4_GROUP, odd = group % 2, lane = n % PANEL;
  const char* pair = panels + n / PANEL * int4_pitch(K / INT4_GROUP) + group / 2 * (1 + 2 * INT4_LINES) * LINE;
  const char* line = pair + (1 + odd * INT4_LINES + k % INT4_GROUP / 8) * LINE;
  const uint8_t byte = (uint8_t)line[lane * 4 + k % 4];
  uint16_t bits;
  memcpy(&bits, pair + odd * LINE / 2 + lane * 2, sizeof(bits));
  const uint32_t wide = (uint32_t)bits << 16;
  float scale;
  memcpy(&scale, &wide, sizeof(scale));
  return (float)levels[k % 8 < 4 ? byte & 15 : byte >> 4] * scale;
}

// What a vector of a line means: int8 of the inputs 0 to 3 of each lane, and of 4 to 7.
struct Levels {
#if defined(__AVX512F__)
  __m512i table;
  explicit Levels(const int8_t* levels, char plus = 0)
      : table(_mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)levels)),
                              _mm512_set1_epi8(plus))) {}
  GPT2_INLINE vu shuffled(__m512i table, __m512i codes) {
    return (vu)_mm512_shuffle_epi8(table, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  vu low(vu line) const { return shuffled(table, (__m512i)line); }
  vu high(vu line) const { return shuffled(table, _mm512_srli_epi32((__m512i)line, 4)); }
#elif defined(__AVX2__)
  __m256i table;
  explicit Levels(const int8_t* levels, char plus = 0)
      : table(_mm256_add_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)levels)),
                              _mm256_set1_epi8(plus))) {}
  GPT2_INLINE vu shuffled(__m256i table, __m256i codes) {
    return (vu)_mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
  }
  vu low(vu line) const { return shuffled(table, (__m256i)line); }
  vu high(vu line) const { return shuffled(table, _mm256_srli_epi32((__m256i)line, 4)); }
#else
  const int8_t* table;
  explicit Levels(const int8_t* levels) : table(levels) {}
  vu low(vu line) const {
    uint8_t codes[sizeof(vu)];
    memcpy(codes, &line, sizeof(vu));
    for (size_t i = 0; i < sizeof(vu); ++i) codes[i] = (uint8_t)table[codes[i] & 15];
    memcpy(&line, codes, sizeof(vu));
    return line;
  }
  vu high(vu line) const { return low(line >> 4); }
#endif
};

// Rows of float32 activations [M, stride].
struct Grouped {
  const float* values;
  int64_t stride;
  const int8_t* levels;

  static constexpr int GROUP = INT4_GROUP;
  static constexpr int sums(int) { return SUMS; }  // one panel at a time
  static int64_t pitch(int64_t groups) { return int4_pitch(groups); }
};

// As in decode_panels.h, a step being a group. Level times scale is exact in float32.
template <int R, int P>
__attribute__((noinline)) void panel_tile(const Panels& panels, const Stream& stream, const Grouped& a, int64_t row,
                                          float* out, int64_t ldo) {
  static_assert(P == 1, "one panel");
  const char* w = panels.w;
  const int64_t steps = panels.steps;
  const Levels levels(a.levels);
  vf sum[R][PV];
#pragma GCC unroll 32
  for (int i = 0; i < R * PV; ++i) sum[i / PV][i % PV] = vf{};
  GPT2_THIRD_ROWS(float, third, R, a.values + row * a.stride, a.stride);
  const char* scales = w;
  for (int64_t line = 0; line < steps * INT4_LINES; ++line) {
    if (line % INT4_LINES == 0) {
      scales += LINE / 2;
      if (line % (2 * INT4_LINES) == 0) scales = w, w += LINE;
    }
    stream.fetch_ahead(w);
    vu packed[PV][2];
    vf scale[PV];
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v) {
      vu codes;
      memcpy(&codes, w + v * sizeof(vu), sizeof(vu));
      packed[v][0] = levels.low(codes);
      packed[v][1] = levels.high(codes);
      scale[v] = load((const bf16*)scales + v * W);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      vf weight[PV];
#pragma GCC unroll 4
      for (int v = 0; v < PV; ++v)
        weight[v] = __builtin_convertvector(as<vi>(packed[v][i / 4] << (24 - 8 * (i % 4))) >> 24, vf) * scale[v];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const vf x = splat(third[r / 3][r % 3 * a.stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < PV; ++v) sum[r][v] = multiply_add(x, weight[v], sum[r][v]);
      }
    }
    w += LINE;
#pragma GCC unroll 8
    for (int i = 0; i < (R + 2) / 3; ++i) third[i] += 8;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < PV; ++v) store(out + r * ldo + v * W, sum[r][v]);
}

#if GPT2_INTEGERS
// Rows split as for int8, with an offset a group: [groups][rows of the tile] int32, -128 times the sum of the
// activations. A tile's begin where its first row's would, at `groups` a row.
struct SplitGroups {
  int8_t* values;
  int32_t* offsets;
  float* scales;  // [M]
  int64_t stride, groups;
  const int8_t* levels;

  static constexpr int GROUP = INT4_GROUP;
  static constexpr int sums(int) { return SUMS; }
  static int64_t pitch(int64_t groups) { return int4_pitch(groups); }
};

// A group's sum of 32 products is exact in int32; groups are added in float32.
template <int R, int P>
__attribute__((noinline)) void panel_tile(const Panels& panels, const Stream& stream, const SplitGroups& a, int64_t row,
                                          float* out, int64_t ldo) {
  static_assert(P == 1, "one panel");
  // Lines and vectors of a line whose weights are in registers together: of 32 all of a group's, of 16 one line's.
  constexpr int LINES = W == 16 ? INT4_LINES : 1, V = R <= 2 ? PV : 1;
  const char* w = panels.w;
  const int64_t steps = panels.steps;
  const Levels levels(a.levels, (char)-128);  // unsigned, as the instruction has it: 128 more
  vf sum[R][PV];
#pragma GCC unroll 24
  for (int i = 0; i < R * PV; ++i) sum[i / PV][i % PV] = vf{};
  const int8_t* x = a.values + 2 * row * a.stride;
  const int32_t* offset = a.offsets + row * a.groups;
  const char* scales = w;
  for (int64_t g = 0; g < steps; ++g) {
    scales += LINE / 2;
    if (g % 2 == 0) {
      stream.fetch_ahead(w);
      scales = w;
      w += LINE;
    }
#pragma GCC unroll 2
    for (int first = 0; first < PV; first += V) {
      vu group[R][V][PARTS];
#pragma GCC unroll 4
      for (int l = 0; l < INT4_LINES; l += LINES) {
        vu weight[2 * LINES][V];
#pragma GCC unroll 4
        for (int i = 0; i < LINES; ++i) {
          if (first == 0) stream.fetch_ahead(w + (l + i) * LINE);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            vu line;
            memcpy(&line, w + (l + i) * LINE + (first + v) * sizeof(vu), sizeof(vu));
            weight[2 * i][v] = levels.low(line);
            weight[2 * i + 1][v] = levels.high(line);
          }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            if (l == 0) {
              group[r][v][0] = vu{};
              group[r][v][PARTS - 1] = (uint32_t)offset[r] - vu{};
            }
#pragma GCC unroll 8
          for (int q = 0; q < 2 * LINES; ++q)
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              // Each from memory by itself: read as one, they would take the port that the shuffles need.
              const vu quad = quad_at(x + 8 * (R * (2 * l + q) + r) + 4 * i);
#pragma GCC unroll 2
              for (int v = 0; v < V; ++v) add_half(group[r][v], Bytes(weight[q][v]), i, quad);
            }
          if (l + LINES < INT4_LINES) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            const vu total = PARTS == 1 ? group[r][v][0] : (group[r][v][0] << 7) + group[r][v][PARTS - 1];
            const vf scale = load((const bf16*)scales + (first + v) * W);
            sum[r][first + v] = multiply_add(__builtin_convertvector(as<vi>(total), vf), scale, sum[r][first + v]);
          }
        }
      }
    }
    w += INT4_LINES * LINE;
    x += 8 * R * (INT4_GROUP / 4);
    offset += R;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < PV; ++v) store(out + r * ldo + v * W, sum[r][v] * a.scales[row + r]);
}
#endif

}  // namespace GPT2_ISA
}  // namespace gpt2
