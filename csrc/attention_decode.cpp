// Attention of one query a head against a KV cache, the keys of a head split over threads (Flash-Decoding).
//
//   out = softmax(scale q K^T) V    over the keys starts <= j < lengths of each sequence
//
// A task takes SPLIT consecutive keys, counted from the sequence's first visible one, and leaves the maximum of
// their scores, the sum of exponentials and the unnormalised output; these are combined in order. The cut knows
// neither the batch nor the threads, so a sequence decodes to the same bits alone and in any batch.
// The bound is reading K and V once.
#include "attention_tile.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t SPLIT = ATTENTION_KEY_GROUP;
constexpr int64_t KEYS = 64;       // scores at a time
constexpr int64_t HEAD_MAX = 128;  // largest D
constexpr int64_t SERIAL_WORK = 1 << 15;  // cache elements below which starting threads costs more than it saves

template <class E>
GPT2_INLINE vf load_part(const E* row, int64_t d, int64_t D) {
  return d + W <= D ? load(row + d) : d < D ? load_tail(row + d, D - d) : vf{};
}

// Reading K and V in turn leaves the memory idle at each change: while one is used, the other is fetched.
template <class E>
GPT2_INLINE void fetch_row(const E* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / (int64_t)sizeof(E)) __builtin_prefetch(row + d, 0, 2);
}

// scores[0 .. round_up(n, W)) = q . k rows; what is past n is -inf. V vectors hold a row, D = V * W when WHOLE.
// The same rows of `next` are fetched meanwhile.
template <int V, bool WHOLE, class E>
__attribute__((noinline)) void score_keys(const float* q, const E* k, const E* next, int64_t n, int64_t D,
                                          float* scores) {
  vf query[V];
#pragma GCC unroll 32
  for (int d = 0; d < V; ++d) query[d] = load(q + d * W);
  for (int64_t j = 0; j < n; j += W) {
    vf sum[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const E* row = k + smaller(j + i, n - 1) * D;
      fetch_row(next + (j + i) * D, D);
      sum[i] = vf{};
#pragma GCC unroll 32
      for (int d = 0; d < V; ++d)
        sum[i] += query[d] * (WHOLE ? load(row + d * W) : load_part(row, d * W, D));
    }
    transpose(sum);
    // By halves, so that the additions do not wait for one another.
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    store(scores + j, sum[0]);
    for (int64_t i = n - j; i < W; ++i) scores[j + i] = -INFINITY;
  }
}

// acc = acc * shrink + p . v rows, for V vectors of columns from d on.
template <int V, bool WHOLE, class E>
__attribute__((noinline)) void add_values(const float* p, const E* v, const E* next, int64_t n, int64_t D,
                                          float shrink, int64_t d, float* acc) {
  vf sum[V];
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) sum[i] = load(acc + d + i * W) * shrink;
  for (int64_t j = 0; j < n; ++j) {
    const E* row = v + j * D;
    fetch_row(next + j * D + d, smaller(V * W, D - d));
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i)
      sum[i] += splat(p[j]) * (WHOLE ? load(row + d + i * W) : load_part(row, d + i * W, D));
  }
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) store(acc + d + i * W, sum[i]);
}

// The head size of GPT-2 has a loop of its own; others go a vector at a time.
template <class E>
GPT2_INLINE void score_keys(const float* q, const E* k, const E* next, int64_t n, int64_t D, float* scores) {
  if (D == 64)
    score_keys<64 / W, true>(q, k, next, n, D, scores);
  else
    score_keys<HEAD_MAX / W, false>(q, k, next, n, D, scores);
}
template <class E>
GPT2_INLINE void add_values(const float* p, const E* v, const E* next, int64_t n, int64_t D, float shrink,
                            float* acc) {
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) add_values<4, true>(p, v, next, n, D, shrink, d, acc);
  for (; d + W <= D; d += W) add_values<1, true>(p, v, next, n, D, shrink, d, acc);
  if (d < D) add_values<1, false>(p, v, next, n, D, shrink, d, acc);
}

// One split of n keys: acc[round_up(D, 16)], then the maximum (in units of log 2) and the sum.
template <class E>
void attend_split(const float* q, const E* k, const E* v, int64_t n, int64_t D, float* acc) {
  const int64_t width = round_up(D, 16);
  alignas(64) float p[KEYS];
  float high = NOTHING, total = 0.0f;
  memset(acc, 0, width * sizeof(float));
  for (int64_t begin = 0; begin < n; begin += KEYS) {
    const int64_t count = smaller(KEYS, n - begin);
    const E *keys = k + begin * D, *values = v + begin * D;
    score_keys(q, keys, values, count, D, p);
    vf top = splat(high), sum{};
    for (int64_t j = 0; j < count; j += W) top = vmax(load(p + j), top);
    const float now = hmax(top);
    for (int64_t j = 0; j < count; j += W) {
      vf x = vexp2(load(p + j) - now);
      sum += x;
      store(p + j, x);
    }
    const float shrink = vexp2(splat(high - now))[0];
    total = total * shrink + hsum(sum);
    high = now;
    add_values(p, values, keys + KEYS * D, count, D, shrink, acc);
  }
  acc[width] = high;
  acc[width + 1] = total;
}

template <class E>
struct Decode {
  const E *q, *k, *v;
  E* out;
  const int32_t *starts, *lengths;
  float* partial;
  int64_t B, H, S, D;
  float log2_scale;

  int64_t slots() const { return (S + SPLIT - 1) / SPLIT; }  // a head in `partial`
  int64_t pitch() const { return round_up(D, 16) + 16; }     // floats of a split in `partial`
  int64_t begin(int64_t b) const { return starts[b] > 0 ? starts[b] : 0; }
  int64_t keys(int64_t b) const {
    const int64_t n = smaller(lengths[b], S) - begin(b);
    return n > 0 ? n : 0;
  }

  void split(int64_t head, int64_t slot) const {
    const int64_t b = head / H, first = slot * SPLIT, n = smaller(SPLIT, keys(b) - first);
    if (n <= 0) return;
    alignas(64) float scaled[HEAD_MAX];
    for (int64_t d = 0; d < HEAD_MAX; d += W) store(scaled + d, load_part(q + head * D, d, D) * log2_scale);
    const int64_t offset = (head * S + begin(b) + first) * D;
    attend_split(scaled, k + offset, v + offset, n, D, partial + (head * slots() + slot) * pitch());
  }

  void combine(int64_t head) const {
    const int64_t used = (keys(head / H) + SPLIT - 1) / SPLIT, width = round_up(D, 16);
    const float* parts = partial + head * slots() * pitch();
    alignas(64) float sum[HEAD_MAX] = {};
    float high = NOTHING, total = 0.0f;
    for (int64_t n = 0; n < used; ++n) {
      const float* part = parts + n * pitch();
      const float now = high > part[width] ? high : part[width];
      const float old_factor = vexp2(splat(high - now))[0], factor = vexp2(splat(part[width] - now))[0];
      for (int64_t d = 0; d < width; d += W) store(sum + d, load(sum + d) * old_factor + load(part + d) * factor);
      total = total * old_factor + part[width + 1] * factor;
      high = now;
    }
    unpack_rows(out + head * D, D, sum, width, 1, D, total == 0.0f ? 0.0f : 1.0f / total);
  }

  void run() const {
    const int64_t heads = B * H;
    int64_t longest = 0;
    for (int64_t b = 0; b < B; ++b) longest = keys(b) > longest ? keys(b) : longest;
    const int64_t splits = (longest + SPLIT - 1) / SPLIT;
#pragma omp parallel if (heads * longest * D > SERIAL_WORK)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * splits; ++task) split(task % heads, task / heads);
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; ++head) combine(head);
    }
  }
};

}  // namespace

void attention_decode(addr q, addr k, addr v, addr out, addr starts, addr lengths, addr partial, int64_t B, int64_t H,
                      int64_t S, int64_t D, double scale, int64_t dtype) {
  const float log2_scale = (float)(scale * 1.4426950408889634);
  GPT2_DISPATCH(dtype, E, {
    Decode<E> op{(const E*)q, (const E*)k, (const E*)v, (E*)out, (const int32_t*)starts, (const int32_t*)lengths,
                 (float*)partial, B, H, S, D, log2_scale};
    op.run();
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
