// Products of int8 panels with rows of whole numbers, whose sums are exact: decode_panels.h in integers.
//
// A row of activations is rounded to multiples of its largest magnitude / `most`, numbers of 15 bits with their sign.
// With VNNI it is split as 128 hi + lo, two rows of int8; elsewhere it is int16, and `most` is less where K is so large
// that a sum would not fit int32.
#pragma once

#include "decode_panels.h"

#if defined(__AVX2__)
#define GPT2_INTEGERS 1

namespace gpt2 {
namespace GPT2_ISA {

constexpr int32_t MOST = 16256;  // 127 * 128: what hi and lo can say

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif
constexpr int PARTS = HAS_VNNI ? 2 : 1;  // sums of a row: of hi and of lo, or of both

// Rows [M, K] of activations for quads, in tiles as tile_rows cuts M: [K / 4][rows of the tile] of 8 bytes, so that a
// tile is read from end to end: [hi, lo][4] int8, or int16 of the inputs 0, 2, 1 and 3. A tile begins where its first
// row would, at 2 `stride` bytes a row.
struct Split {
  int8_t* values;
  int32_t* offsets;  // [M, PARTS]: -128 times the sums of a row, which undo the + 128 of the weights
  float* scales;     // [M]
  int64_t stride;

  static constexpr int GROUP = 4;
  static constexpr int sums(int rows) { return PARTS * rows * PV; }
  static int64_t pitch(int64_t steps) { return steps * LINE; }
};

// Into how many steps the largest magnitude of a row of K activations is divided.
GPT2_INLINE int32_t most_of(int64_t K) {
  return HAS_VNNI || K * MOST < (1 << 24) ? MOST : (int32_t)(((1 << 24) - 1) / K);  // 128 K most < 2^31
}

GPT2_INLINE vi nearest(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#else
  return (vi)_mm256_cvtps_epi32((__m256)x);
#endif
}

GPT2_INLINE int32_t sum_of(vi x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 2 | 3 << 2));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 1)));
#endif
}

// W numbers as they are multiplied: their quads, `pitch` bytes apart; and each part is added to sums.
GPT2_INLINE void store_quads(vi numbers, int8_t* to, int64_t pitch, vi (&sums)[PARTS]) {
  typedef int16_t half __attribute__((vector_size(2 * W)));
  if (HAS_VNNI) {
    const vi hi = (numbers + 64) >> 7, lo = numbers - (hi << 7);
    sums[0] += hi;
    sums[PARTS - 1] += lo;
    numbers = (hi & 0xff) | (lo << 8);  // a byte of each
  } else {
    sums[0] += numbers;
  }
  // Two quads of 16 bits each, which are sorted: the bytes of hi before those of lo; or 0, 2, 1, 3.
  const __m128i order = HAS_VNNI ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                 : _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const half narrow = __builtin_convertvector(numbers, half);
  __m128i quads[W / 8];
  memcpy(quads, &narrow, sizeof(narrow));
  for (int i = 0; i < W / 8; ++i) {
    const __m128d two = (__m128d)_mm_shuffle_epi8(quads[i], order);
    _mm_storel_pd((double*)(to + 2 * i * pitch), two);
    _mm_storeh_pd((double*)(to + (2 * i + 1) * pitch), two);
  }
}

// A vector of unsigned bytes, four inputs of each lane, as its halves of a quad take them: as they are, or the inputs 0
// and 2 in 16 bits each, and 1 and 3.
struct Bytes {
  vu half[2];
  explicit Bytes(vu x) {
    typedef uint16_t words __attribute__((vector_size(4 * W)));
    half[0] = HAS_VNNI ? x : x & 0x00ff00ff;
    half[1] = HAS_VNNI ? x : as<vu>(as<words>(x) >> 8);
  }
};

// sum += the products of a quad's first or second four bytes. Unsigned, as rows that pad a tile, which nobody wrote and
// nobody reads, may overflow.
GPT2_INLINE void add_half(vu (&sum)[PARTS], const Bytes& bytes, int i, vu quad) {
#if defined(__AVX512VNNI__)
  // The intrinsic makes g++ 12 copy its accumulators.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(bytes.half[i]), "v"(quad));
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[i]) : "x"(bytes.half[i]), "x"(quad));
#elif defined(__AVX512F__)
  sum[0] += (vu)_mm512_madd_epi16((__m512i)bytes.half[i], (__m512i)quad);
#else
  sum[0] += (vu)_mm256_madd_epi16((__m256i)bytes.half[i], (__m256i)quad);
#endif
}

GPT2_INLINE vu quad_at(const int8_t* x) {
  uint32_t bytes;
  memcpy(&bytes, x, sizeof(bytes));
  return bytes - vu{};
}

GPT2_INLINE vf value_of(const vu (&sum)[PARTS]) {
  const vf first = __builtin_convertvector(as<vi>(sum[0]), vf);
  return PARTS == 1 ? first : first * 128.0f + __builtin_convertvector(as<vi>(sum[PARTS - 1]), vf);
}

// V vectors of each of P panels, of a panel's PV, at N lines.
template <int N, int R, int P, int V>
GPT2_INLINE void add_lines(const Panels& panels, const Stream& stream, const char*& w, const int8_t*& x,
                           vu (&sum)[R][P][V][PARTS]) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p) stream.fetch_ahead<N>(w + p * panels.pitch);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    vu weight[P][V];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) memcpy(&weight[p][v], w + p * panels.pitch + v * sizeof(vu), sizeof(vu));
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const vu quad = quad_at(x + 8 * r + 4 * i);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) add_half(sum[r][p][v], Bytes(weight[p][v]), i, quad);
      }
    w += LINE;
    x += 8 * R;
  }
}

// As in decode_panels.h. The weights' scales are not yet applied.
template <int R, int P>
__attribute__((noinline)) void panel_tile(const Panels& panels, const Stream& stream, const Split& a, int64_t row,
                                          float* out, int64_t ldo) {
  constexpr int N = lines_of(R, P), V = Split::sums(R) * P <= SUMS ? PV : 1;
  for (int first = 0; first < PV; first += V) {
    const char* w = panels.w + first * sizeof(vu);
    vu sum[R][P][V][PARTS];
#pragma GCC unroll 64
    for (int i = 0; i < R * P * V * PARTS; ++i)
      sum[i / PARTS / V / P][i / PARTS / V % P][i / PARTS % V][i % PARTS] =
          (uint32_t)a.offsets[PARTS * (row + i / PARTS / V / P) + i % PARTS] - vu{};
    const int8_t* x = a.values + 2 * row * a.stride;
    int64_t s = 0;
    for (; s + N <= panels.steps; s += N) add_lines<N, R, P, V>(panels, stream, w, x, sum);
    for (; s < panels.steps; ++s) add_lines<1, R, P, V>(panels, stream, w, x, sum);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          store(out + r * ldo + p * PANEL + (first + v) * W, value_of(sum[r][p][v]) * a.scales[row + r]);
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
#endif
