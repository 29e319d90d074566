// Kernels of embedding.cpp, for kernels.h. The parameters are the fields of the structs in embedding_body.h, those of
// Drop among them, in their order; the last two are the dtypes: of the tables and of out, of grad and of the table.
//
// embedding_first_outside writes to result [1] int64 the first i with ids[i] outside [0, limit), or -1.
#pragma once

#define GPT2_EMBEDDING_KERNELS(KERNEL) \
  KERNEL(embedding_first_outside, (i64 ids, int64_t n, int64_t limit, i64 result)) \
  KERNEL(embedding_forward, \
         (i64 ids, i64 positions, i64 types, addr wte, addr wpe, addr out, int64_t rows, int64_t C, \
          int64_t vocab, int64_t n_positions, int64_t position_period, Drop dropout, i64 fault, int64_t wte_dtype, \
          int64_t out_dtype)) \
  KERNEL(embedding_backward, \
         (i64 keys, i64 order, addr grad, f32 partial, addr dtable, int64_t entries, int64_t rows, \
          int64_t B, int64_t T, int64_t C, int64_t table_rows, int64_t chunk, Drop dropout, int64_t grad_dtype, \
          int64_t dtable_dtype))
