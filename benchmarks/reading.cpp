// The least that a decode step can take: its weights read once, by as many threads as the step has, each its own part
// of every matrix. benchmarks/reading.py compiles it.
#include <cstdint>
#include <cstring>

typedef uint32_t line __attribute__((vector_size(64)));

// The sum of all 4-byte words of the first `lines` lines of 64 bytes of each matrix, modulo 2^32.
extern "C" uint32_t read_once(const char* const* matrices, const int64_t* lines, int64_t count, int threads) {
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    line sum[8] = {};
    for (int64_t m = 0; m < count; ++m) {
      const char* at = matrices[m] + lines[m] * thread / threads * 64;
      const char* end = matrices[m] + lines[m] * (thread + 1) / threads * 64;
      for (; at + 512 <= end; at += 512)
        for (int i = 0; i < 8; ++i) {  // eight, so that none waits for the one before
          line x;
          memcpy(&x, at + 64 * i, 64);
          sum[i] += x;
        }
      for (; at < end; at += 64) {
        line x;
        memcpy(&x, at, 64);
        sum[0] += x;
      }
    }
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 16; ++j) total += sum[i][j];
  }
  return total;
}
