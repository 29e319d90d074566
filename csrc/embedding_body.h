// The embedding's index arithmetic and reductions, one body for embedding.cpp (vectors) and embedding.cu (threads).
//
// Forward, for flat row r = b * T + t:
//   out[r] = dropout(wte[ids[r]] + wpe[position(r)] (+ wte[types[r]]))
// Backward of a table (wte or wpe): dtable[k] += sum of dropout'(grad[row]) over the entries whose key is k. The
// entries are sorted by key, so that each touched row is one run of entries, summed in float32 in the order of the
// sort, added to the row and rounded once. For the sum to run in parallel and yet be the same every time, the entries
// are cut into chunks of fixed size: a chunk writes the runs it holds whole, and leaves the sum of a run that began
// before it in partial[chunk][0] and of one that it begins and that goes on after it in partial[chunk][1]; the chunk
// where a run begins then adds up the run's partial sums in order.
//
// A Tile is a few neighbouring columns of one row in float32: Tile::COLS, zero(), load(p, n), store(p, n),
// add(other), drop(mask, row, col); n is how many columns are left in the row, and col a multiple of COLS.
#pragma once

#include "philox.h"

namespace gpt2 {

// A CUDA launch passes the arguments of the kernel of the same name in embedding.h, 8 bytes each, as these structs:
// their fields are in that order, and what follows (dtypes) is not read.
struct EmbeddingForward {
  const int64_t* ids;        // [rows]
  const int64_t* positions;  // [position_period], or 0: position t
  const int64_t* types;      // [rows], rows of wte, or 0
  const void* wte;           // [vocab, C]
  const void* wpe;           // [n_positions, C]
  void* out;                 // [rows, C]
  int64_t rows, C, vocab, n_positions;
  int64_t position_period;  // T where every batch row has the same positions, else rows
  const uint64_t* rng;      // [1], or 0: no dropout
  int64_t threshold;
  double scale;
  int64_t site;
  int64_t* fault;  // [5]: set, EmbeddingIndex, value, its bound, row, of one index outside its table; CUDA only
};

struct EmbeddingBackward {
  const int64_t* keys;   // [entries], sorted; or 0: entries are (t, b) in order, and t the key
  const int64_t* order;  // [entries], each key's place before the sort: its row, modulo rows
  const void* grad;      // [rows, C], of out
  float* partial;        // [chunks, 2, C]
  void* dtable;          // [table_rows, C], added to
  int64_t entries, rows, B, T, C, table_rows;  // rows = B * T
  int64_t chunk;        // entries a chunk
  const uint64_t* rng;  // as in the forward pass
  int64_t threshold;
  double scale;
  int64_t site;
};

enum EmbeddingIndex : int64_t { IN_RANGE = 0, TOKEN = 1, POSITION = 2, TOKEN_TYPE = 3 };

struct EmbeddingRows {
  int64_t token, position, type;
};

// a / b for 0 <= a, 0 < b: the 32-bit division is several times faster on a GPU.
GPT2_HOST_DEVICE int64_t embedding_divide(int64_t a, int64_t b) {
  if ((((uint64_t)a | (uint64_t)b) >> 32) == 0) return (int64_t)((uint32_t)a / (uint32_t)b);
  return a / b;
}

GPT2_HOST_DEVICE int64_t embedding_offset(int64_t row, int64_t C, int64_t col) { return row * C + col; }

// The table rows that flat row `row` adds up; says which index is outside its table, if one is.
GPT2_HOST_DEVICE EmbeddingIndex embedding_locate(const EmbeddingForward& a, int64_t row, EmbeddingRows& at) {
  int64_t in_period = row - embedding_divide(row, a.position_period) * a.position_period;
  at.token = a.ids[row];
  at.position = a.positions ? a.positions[in_period] : in_period;
  at.type = a.types ? a.types[row] : 0;
  if ((uint64_t)at.token >= (uint64_t)a.vocab) return TOKEN;
  if ((uint64_t)at.position >= (uint64_t)a.n_positions) return POSITION;
  if ((uint64_t)at.type >= (uint64_t)a.vocab) return TOKEN_TYPE;
  return IN_RANGE;
}

template <class Tile, class W, class O>
GPT2_HOST_DEVICE void embedding_forward_tile(const EmbeddingForward& a, const EmbeddingRows& at,
                                             const typename Tile::Mask& mask, int64_t row, int64_t col) {
  const W *wte = (const W*)a.wte, *wpe = (const W*)a.wpe;
  int64_t n = a.C - col;
  Tile sum = Tile::load(wte + embedding_offset(at.token, a.C, col), n);
  sum.add(Tile::load(wpe + embedding_offset(at.position, a.C, col), n));
  if (a.types) sum.add(Tile::load(wte + embedding_offset(at.type, a.C, col), n));
  if (a.rng) sum.drop(mask, row, col);
  sum.store((O*)a.out + embedding_offset(row, a.C, col), n);
}

// Key and flat row of sorted entry i.
GPT2_HOST_DEVICE int64_t embedding_key(const EmbeddingBackward& a, int64_t i) {
  return a.keys ? a.keys[i] : embedding_divide(i, a.B);
}
GPT2_HOST_DEVICE int64_t embedding_row(const EmbeddingBackward& a, int64_t i) {
  if (a.keys) {
    int64_t row = a.order[i];
    return row < a.rows ? row : row - embedding_divide(row, a.rows) * a.rows;
  }
  int64_t t = embedding_divide(i, a.B);
  return (i - t * a.B) * a.T + t;
}

// dtable[k] += sum; each touched row comes here once.
template <class Tile, class W>
GPT2_HOST_DEVICE void embedding_add_to_row(const EmbeddingBackward& a, int64_t k, Tile& sum, int64_t col) {
  W* row = (W*)a.dtable + embedding_offset(k, a.C, col);
  sum.add(Tile::load(row, a.C - col));
  sum.store(row, a.C - col);
}

template <class Tile, class G, class W>
GPT2_HOST_DEVICE void embedding_reduce_chunk(const EmbeddingBackward& a, const typename Tile::Mask& mask,
                                             int64_t chunk, int64_t col) {
  const int64_t first = chunk * a.chunk, n = a.C - col;
  const int64_t end = first + a.chunk < a.entries ? first + a.chunk : a.entries;
  int64_t i = first, key = embedding_key(a, i);
  while (i < end) {
    const int64_t run = key;
    const bool began_before = i == first && i > 0 && embedding_key(a, i - 1) == run;
    Tile sum = Tile::zero();
    do {
      int64_t row = embedding_row(a, i);
      Tile tile = Tile::load((const G*)a.grad + embedding_offset(row, a.C, col), n);
      if (a.rng) tile.drop(mask, row, col);
      sum.add(tile);
      ++i;
      key = i < a.entries ? embedding_key(a, i) : run - 1;
    } while (i < end && key == run);
    if ((uint64_t)run >= (uint64_t)a.table_rows) continue;  // the forward pass has reported it
    if (began_before || key == run)
      sum.store(a.partial + embedding_offset(2 * chunk + !began_before, a.C, col), n);
    else
      embedding_add_to_row<Tile, W>(a, run, sum, col);
  }
}

// Adds up the partial sums of the run that begins in `chunk` and goes on after it, if there is one.
template <class Tile, class W>
GPT2_HOST_DEVICE void embedding_finish_chunk(const EmbeddingBackward& a, int64_t chunk, int64_t col) {
  const int64_t first = chunk * a.chunk, end = first + a.chunk, n = a.C - col;
  if (end >= a.entries) return;
  const int64_t run = embedding_key(a, end - 1);
  if (embedding_key(a, end) != run) return;
  if (first > 0 && embedding_key(a, first - 1) == run) return;
  if ((uint64_t)run >= (uint64_t)a.table_rows) return;
  Tile sum = Tile::load((const float*)a.partial + embedding_offset(2 * chunk + 1, a.C, col), n);
  for (int64_t next = chunk + 1; next * a.chunk < a.entries; ++next) {
    if (embedding_key(a, next * a.chunk) != run) break;
    sum.add(Tile::load((const float*)a.partial + embedding_offset(2 * next, a.C, col), n));
  }
  embedding_add_to_row<Tile, W>(a, run, sum, col);
}

}  // namespace gpt2
