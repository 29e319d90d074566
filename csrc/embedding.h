// Kernels of embedding.cpp, for kernels.h. The parameters are the fields of the structs in embedding_body.h, in
// their order; the last two are the dtypes: of the tables and of out, of grad and of the table.
//
// embedding_first_outside writes to result [1] int64 the first i with ids[i] outside [0, limit), or -1.
#pragma once

#define GPT2_EMBEDDING_KERNELS(KERNEL) \
  KERNEL(embedding_first_outside, (addr ids, int64_t n, int64_t limit, addr result)) \
  KERNEL(embedding_forward, \
         (addr ids, addr positions, addr types, addr wte, addr wpe, addr out, int64_t rows, int64_t C, \
          int64_t vocab, int64_t n_positions, int64_t position_period, addr rng, int64_t threshold, \
          double scale, int64_t site, addr fault, int64_t dtype, int64_t out_dtype)) \
  KERNEL(embedding_backward, \
         (addr keys, addr order, addr grad, addr partial, addr dtable, int64_t entries, int64_t rows, \
          int64_t B, int64_t T, int64_t C, int64_t table_rows, int64_t chunk, addr rng, int64_t threshold, \
          double scale, int64_t site, int64_t grad_dtype, int64_t dtype))
