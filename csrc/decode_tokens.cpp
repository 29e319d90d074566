// Several tokens of each sequence, each a decode step and a draw (gpt2_fast/ops/decode_tokens.py).
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

bool contains(const int64_t* values, int64_t n, int64_t value) {
  for (int64_t i = 0; i < n; ++i)
    if (values[i] == value) return true;
  return false;
}

}  // namespace

void decode_tokens(addr model, addr cache, addr sequences, int64_t B, int64_t V, int64_t first, addr tokens,
                   int64_t count, addr ends, int64_t n_ends, addr uniforms, double temperature, int64_t top_k,
                   double top_p, addr highest, addr logits, addr scratch, int64_t threads, int64_t draw_threads,
                   addr made) {
  int64_t i = 0;
  for (bool on = true; on && i < count; ++i) {
    const int64_t* newest = (const int64_t*)tokens + i * B;
    int64_t* next = (int64_t*)tokens + (i + 1) * B;
    float* high = (float*)highest + i * B;
    kernels().decode_step(model, cache, (addr)newest, sequences, 0, B, first + i, logits, threads);
    kernels().draw(logits, uniforms ? uniforms + i * B * sizeof(double) : 0, B, V, temperature, top_k, top_p,
                   (addr)next, (addr)high, scratch, draw_threads);
    for (int64_t b = 0; b < B; ++b)
      if (high[b] - high[b] != 0 || contains((const int64_t*)ends, n_ends, next[b])) on = false;
  }
  *(int64_t*)made = i;
}

}  // namespace GPT2_ISA
}  // namespace gpt2
