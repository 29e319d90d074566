// The embedding on the CPU: embedding_body.h over vectors, in parallel over rows and over chunks of sorted entries.
#include "embedding_body.h"
#include "isa.h"
#include "kernels.h"
#include "philox_simd.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

#define GPT2_NOINLINE __attribute__((noinline))
#define GPT2_TILE_METHOD inline __attribute__((always_inline))

// Eight vectors: enough bytes of each gradient row at a time for the memory's sake, and they fit the registers.
// The rare and the long parts are functions of their own: inlined everywhere they take a minute to compile.
struct Tile {
  using Mask = Dropout;
  static constexpr int64_t VECTORS = 8, COLS = VECTORS * W;
  vf v[VECTORS];

  static GPT2_TILE_METHOD Tile zero() { return Tile{}; }

  template <class T>
  static GPT2_TILE_METHOD Tile load(const T* p, int64_t n) {
    Tile tile;
    if (n < COLS) {
      tile.load_part(p, n);
    } else {
      for (int64_t i = 0; i < VECTORS; ++i) tile.v[i] = GPT2_ISA::load(p + i * W);
    }
    return tile;
  }

  template <class T>
  GPT2_TILE_METHOD void store(T* p, int64_t n) const {
    if (n < COLS) return store_part(p, n);
    for (int64_t i = 0; i < VECTORS; ++i) GPT2_ISA::store(p + i * W, v[i]);
  }

  GPT2_TILE_METHOD void add(const Tile& other) {
    for (int64_t i = 0; i < VECTORS; ++i) v[i] += other.v[i];
  }

  GPT2_NOINLINE void drop(const Dropout& mask, int64_t row, int64_t col) {
    int8_t keep[COLS];
    keep_columns<COLS / KEEP_COLS>(mask, (uint32_t)row, col, keep);
    for (int64_t i = 0; i < VECTORS; ++i) v[i] = apply_keep(v[i], mask.scale, keep + i * W);
  }

  template <class T>
  GPT2_NOINLINE void load_part(const T* p, int64_t n) {
    for (int64_t i = 0; i < VECTORS; ++i) v[i] = i * W < n ? load_n(p + i * W, n - i * W) : vf{};
  }

  template <class T>
  GPT2_NOINLINE void store_part(T* p, int64_t n) const {
    for (int64_t i = 0; i * W < n; ++i) store_n(p + i * W, v[i], n - i * W);
  }
};

// `run` with A and B bound to the dtypes' element types: the same, or one of them float32.
#define GPT2_DISPATCH_PAIR(a_dtype, A, b_dtype, B, run) \
  do { \
    if ((a_dtype) == (b_dtype)) { \
      GPT2_DISPATCH(a_dtype, A, { using B = A; run; }); \
    } else if ((a_dtype) == F32) { \
      using A = float; \
      GPT2_DISPATCH(b_dtype, B, run); \
    } else { \
      using B = float; \
      GPT2_DISPATCH(a_dtype, A, run); \
    } \
  } while (0)

// What embedding.h lists before the dtypes: a CUDA launch passes it as the struct.
static_assert(sizeof(EmbeddingForward) == 16 * 8 && sizeof(EmbeddingBackward) == 16 * 8);

// Below this many elements a row of threads costs more to wake than it saves (decoding embeds B rows).
constexpr int64_t SERIAL_ELEMENTS = 1 << 14;

template <class T, class O>
void forward(const EmbeddingForward& a, const Dropout& mask) {
#pragma omp parallel for schedule(static) if (a.rows * a.C > SERIAL_ELEMENTS)
  for (int64_t row = 0; row < a.rows; ++row) {
    EmbeddingRows at;
    if (embedding_locate(a, row, at) != IN_RANGE) continue;  // the caller has checked
    for (int64_t col = 0; col < a.C; col += Tile::COLS)
      embedding_forward_tile<Tile, T, O>(a, at, mask, row, col);
  }
}

template <class G, class T>
void backward(const EmbeddingBackward& a, const Dropout& mask) {
  const int64_t chunks = (a.entries + a.chunk - 1) / a.chunk, tiles = (a.C + Tile::COLS - 1) / Tile::COLS;
  GPT2_PARALLEL_FOR(chunk, chunks) {
    for (int64_t col = 0; col < a.C; col += Tile::COLS) embedding_reduce_chunk<Tile, G, T>(a, mask, chunk, col);
  }
  // Column tiles outermost: the partial sums of one long run are shared out among the threads.
  GPT2_PARALLEL_FOR(i, tiles * chunks) {
    embedding_finish_chunk<Tile, T>(a, i % chunks, i / chunks * Tile::COLS);
  }
}

}  // namespace

void embedding_first_outside(addr ids, int64_t n, int64_t limit, addr result) {
  const uint64_t* id = (const uint64_t*)ids;
  uint64_t outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= id[i] >= (uint64_t)limit;
  int64_t first = -1;
  if (outside)
    for (first = 0; id[first] < (uint64_t)limit;) ++first;
  *(int64_t*)result = first;
}

void embedding_forward(addr ids, addr positions, addr types, addr wte, addr wpe, addr out, int64_t rows, int64_t C,
                       int64_t vocab, int64_t n_positions, int64_t position_period, Drop dropout, addr fault,
                       int64_t dtype, int64_t out_dtype) {
  EmbeddingForward a = {(const int64_t*)ids, (const int64_t*)positions, (const int64_t*)types, (const void*)wte,
                        (const void*)wpe, (void*)out, rows, C, vocab, n_positions, position_period,
                        (const uint64_t*)dropout.key, dropout.threshold, dropout.scale, dropout.site, (int64_t*)fault};
  Dropout mask = dropout_of(dropout);
  GPT2_DISPATCH_PAIR(dtype, T, out_dtype, O, (forward<T, O>(a, mask)));
}

void embedding_backward(addr keys, addr order, addr grad, addr partial, addr dtable, int64_t entries, int64_t rows,
                        int64_t B, int64_t T, int64_t C, int64_t table_rows, int64_t chunk, Drop dropout,
                        int64_t grad_dtype, int64_t dtype) {
  EmbeddingBackward a = {(const int64_t*)keys, (const int64_t*)order, (const void*)grad, (float*)partial,
                         (void*)dtable, entries, rows, B, T, C, table_rows, chunk,
                         (const uint64_t*)dropout.key, dropout.threshold, dropout.scale, dropout.site};
  Dropout mask = dropout_of(dropout);
  GPT2_DISPATCH_PAIR(grad_dtype, G, dtype, D, (backward<G, D>(a, mask)));
}

}  // namespace GPT2_ISA
}  // namespace gpt2
