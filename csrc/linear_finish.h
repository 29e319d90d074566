// What becomes of the sums of a tile of linear.cpp: bias, GELU, rounding, and the way to memory.
#pragma once

#include "gelu.h"
#include "linear.h"
#include "linear_pack.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t HELD = 2 << 20;  // bytes of C a thread that the next op finds in the second-level cache

struct Result {
  char *c, *u;
  const float* bias;
  int64_t dtype, stride, finish;
  bool by_lines;

  // Whether C is stored past the cache: where the rows of a tile are lines, each of which would be fetched before it is
  // overwritten, and C is more than what the caches hold.
  static bool past_cache(addr c, addr u, int64_t dtype, int64_t stride, int64_t finish, int64_t bytes,
                         int64_t threads) {
    return HAS_TILES && dtype == BF16 && finish != FINISH_ADD && bytes > HELD * threads && stride % TILE_N == 0 &&
           (c | u) % 64 == 0;
  }
};

template <class Gelu, class T>
GPT2_INLINE void finish_vector(const Result& to, T* c, T* u, vf x, int64_t n) {
  if (to.finish == FINISH_ADD) x += load_n(c, n);
  if (to.finish >= FINISH_TANH_GELU) {
    x = rounded<T>(x);
    if (u) store_n(u, x, n);
    x = Gelu::value(x);
  }
  store_n(c, x, n);
}

// The sums of a tile at (row, column) of C, rows x columns of it, and what becomes of them.
template <class Gelu, class T>
__attribute__((noinline)) void finish_rows(const Result& to, const float* sums, int64_t row, int64_t column,
                                           int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += W) {
      const int64_t n = columns - i, at = (row + r) * to.stride + column + i;
      vf x = load(sums + r * TILE_N + i);
      if (to.bias) x += load_n(to.bias + column + i, n);
      finish_vector<Gelu>(to, (T*)to.c + at, to.u ? (T*)to.u + at : nullptr, x, n);
    }
}

#if defined(__AMX_BF16__)
GPT2_INLINE void stream_line(bf16* p, vf first, vf second) {
  _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

template <class Gelu>
__attribute__((noinline)) void finish_lines(const Result& to, const float* sums, int64_t row, int64_t column,
                                            int64_t rows) {
  static_assert(TILE_N * sizeof(bf16) == 64, "a row of a tile is a line");
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * to.stride + column;
    vf first = load(sums + r * TILE_N), second = load(sums + r * TILE_N + W);
    if (to.bias) first += load(to.bias + column), second += load(to.bias + column + W);
    if (to.finish >= FINISH_TANH_GELU) {
      first = rounded<bf16>(first), second = rounded<bf16>(second);
      if (to.u) stream_line((bf16*)to.u + at, first, second);
      first = Gelu::value(first), second = Gelu::value(second);
    }
    stream_line((bf16*)to.c + at, first, second);
  }
}

GPT2_INLINE void lines_are_seen() { _mm_sfence(); }  // by other threads, after the next barrier
#else
template <class Gelu>
void finish_lines(const Result&, const float*, int64_t, int64_t, int64_t) {}
GPT2_INLINE void lines_are_seen() {}
#endif

void finish_tile(const Result& to, const float* sums, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const bool erf = to.finish == FINISH_ERF_GELU;
  if (to.by_lines && columns == TILE_N)
    return (erf ? finish_lines<ErfGelu> : finish_lines<TanhGelu>)(to, sums, row, column, rows);
  GPT2_DISPATCH(to.dtype, T, {
    auto run = erf ? finish_rows<ErfGelu, T> : finish_rows<TanhGelu, T>;
    run(to, sums, row, column, rows, columns);
  });
}

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
