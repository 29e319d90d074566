// A token of each row of logits: the most likely one, or the one at a place in the cumulated probabilities of the
// tokens that top_k and top_p keep (gpt2_fast/ops/draw.py has the definition).
//
// A row is read once for the largest logit of each block of DRAW_BLOCK. The n largest of all lie at or above the n-th
// largest of those, so few are left to be put in order: n and what else is as large. Sums are float64: what the width
// of a vector and exp's last bits change of them can move a token's boundary by as much.
#include "kernels.h"

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t FEW = 512;  // most likely tokens among which top_p is looked for first

typedef double vd __attribute__((vector_size(8 * W)));

// A token and its logit, or its probability.
struct Entry {
  float value;
  int32_t id;
};

struct Falling {  // the most likely first, of equals the first in the vocabulary
  static bool before(Entry a, Entry b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }
};
struct Vocabulary {
  static bool before(Entry a, Entry b) { return a.id < b.id; }
};

// Lets the entry at i sink in a heap of n whose top comes last in the order.
template <class Order>
void sink(Entry* heap, int64_t i, int64_t n) {
  const Entry moved = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && Order::before(heap[child], heap[child + 1])) ++child;
    if (!Order::before(moved, heap[child])) break;
    heap[i] = heap[child];
  }
  heap[i] = moved;
}

template <class Order>
void make_heap(Entry* entries, int64_t n) {
  for (int64_t i = n / 2 - 1; i >= 0; --i) sink<Order>(entries, i, n);
}

template <class Order>
void sort(Entry* entries, int64_t n) {
  make_heap<Order>(entries, n);
  for (int64_t last = n - 1; last > 0; --last) {
    const Entry top = entries[0];
    entries[0] = entries[last];
    entries[last] = top;
    sink<Order>(entries, 0, last);
  }
}

// One row.
struct Row {
  const float* logits;
  int64_t V, blocks;
  float *maxima, temperature, inverse, high;
  double* sums;
  Entry* entries;

  // exp((x - high) / temperature). Near 0 the inverse is infinite, and the temperature itself may round to 0.
  vf probability(vf x) const {
    const vf below = x - high;
    if (temperature >= 0.01f) return vexp(below * inverse);
    return vexp(select(below == 0, below, below / splat(temperature)));
  }

  // The largest logit of each block, and of all; NaN, where one is.
  void find_maxima() {
    vf all = splat(-INFINITY), nan{};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * DRAW_BLOCK, end = smaller(V, begin + DRAW_BLOCK);
      vf high_of_block = splat(-INFINITY);
      for (int64_t i = begin; i < end; i += W) {
        const vf x = load_n(logits + i, end - i, -INFINITY);
        nan += select(x != x, x, vf{});
        high_of_block = vmax(x, high_of_block);
      }
      maxima[b] = hmax(high_of_block);
      all = vmax(splat(maxima[b]), all);
    }
    const float none = hsum(nan);
    high = none != none ? none : hmax(all);
  }

  int64_t most_likely() const {
    int64_t b = 0;
    while (maxima[b] != high) ++b;
    int64_t i = b * DRAW_BLOCK;
    while (logits[i] != high) ++i;
    return i;
  }

  // The sum of the probabilities of all tokens, and of each block; not yet divided by it.
  double sum_all() const {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * DRAW_BLOCK, end = smaller(V, begin + DRAW_BLOCK);
      vd sum{};
      for (int64_t i = begin; i < end; i += W)
        sum += __builtin_convertvector(probability(load_n(logits + i, end - i, -INFINITY)), vd);
      sums[b] = 0;
      for (int i = 0; i < W; ++i) sums[b] += sum[i];
      total += sums[b];
    }
    return total;
  }

  // Of all tokens the first whose cumulated probability is above `at`.
  int64_t find(double at) const {
    int64_t b = 0, last = 0;
    double before = 0;
    for (; before + sums[b] <= at; ++b) before += sums[b];  // `at` is below the sum of all
    // By rounding a block may hold less than its sum: then the next one has it, or the last token that can be drawn.
    for (; b < blocks; ++b) {
      const int64_t begin = b * DRAW_BLOCK, end = smaller(V, begin + DRAW_BLOCK);
      for (int64_t i = begin; i < end; i += W) {
        float p[W];
        store(p, probability(load_n(logits + i, end - i, -INFINITY)));
        for (int64_t j = 0; j < W && i + j < end; ++j) {
          before += p[j];
          if (p[j] > 0) last = i + j;
          if (before > at) return i + j;
        }
      }
    }
    return last;
  }

  // The `n` most likely tokens and all that are as likely as the last of them, the most likely first; how many.
  int64_t take(int64_t n) const {
    float bound = -INFINITY;
    if (n <= blocks) {  // the n-th largest of the maxima, on top of a heap of n of them
      for (int64_t b = 0; b < n; ++b) entries[b] = {maxima[b], 0};
      make_heap<Falling>(entries, n);
      for (int64_t b = n; b < blocks; ++b)
        if (maxima[b] > entries[0].value) {
          entries[0].value = maxima[b];
          sink<Falling>(entries, 0, n);
        }
      bound = entries[0].value;
    }
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (maxima[b] < bound) continue;
      const int64_t end = smaller(V, (b + 1) * DRAW_BLOCK);
      for (int64_t i = b * DRAW_BLOCK; i < end; ++i)
        if (logits[i] >= bound) entries[count++] = {logits[i], (int32_t)i};
    }
    sort<Falling>(entries, count);
    int64_t kept = smaller(n, count);
    while (kept < count && entries[kept].value == entries[kept - 1].value) ++kept;
    return kept;
  }

  // Of the tokens in `entries`, the most likely first: their probabilities in place of their logits; the sum.
  double weigh(int64_t count) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      float p[W];
      store(p, probability(splat(entries[i].value)));
      total += entries[i].value = p[0];
    }
    return total;
  }

  // How many of `count` come before the sum reaches top_p of `total`, at least one; -1: it is not reached.
  int64_t nucleus(int64_t count, double most) const {
    double before = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (before >= most) return i;
      before += entries[i].value;
    }
    return before >= most ? count : -1;
  }

  int64_t draw(double uniform, int64_t top_k, double top_p) const {
    if (!top_k && top_p >= 1) return find(uniform * sum_all());
    int64_t kept = 0;
    if (top_k) {
      kept = take(top_k);
      const double total = weigh(kept);
      const int64_t within = top_p < 1 ? nucleus(kept, top_p * total) : kept;
      kept = within < 0 ? kept : within;
    } else {
      const double most = top_p * sum_all();
      for (int64_t n = smaller(FEW, V);; n = smaller(8 * n, V)) {
        const int64_t count = take(n);
        weigh(count);
        kept = nucleus(count, most);
        if (kept < 0 && count == V) kept = count;
        if (kept >= 0) break;
      }
    }
    sort<Vocabulary>(entries, kept);
    double total = 0, before = 0;
    for (int64_t i = 0; i < kept; ++i) total += entries[i].value;
    for (int64_t i = 0; i < kept; ++i)
      if ((before += entries[i].value) > uniform * total) return entries[i].id;
    return entries[kept - 1].id;
  }
};

}  // namespace

void draw_scratch(int64_t V, addr units) { *(int64_t*)units = draw_scratch_size(V); }

void draw(addr logits, addr uniforms, int64_t B, int64_t V, double temperature, int64_t top_k, double top_p,
          addr tokens, addr highest, addr scratch, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (B > 1)
  for (int64_t b = 0; b < B; ++b) {
    const int64_t blocks = ceil_div(V, DRAW_BLOCK);
    float* own = (float*)scratch + this_thread() * draw_scratch_size(V);
    double* sums = (double*)(((addr)own + 63) / 64 * 64);
    Entry* entries = (Entry*)(sums + blocks);
    Row row{(const float*)logits + b * V, V, blocks, (float*)(entries + V), (float)temperature,
            (float)(1 / temperature), 0, sums, entries};
    row.find_maxima();
    ((float*)highest)[b] = row.high;
    const bool finite = row.high - row.high == 0;
    ((int64_t*)tokens)[b] = !finite ? 0 : !uniforms ? row.most_likely()
                                                    : row.draw(((const double*)uniforms)[b], top_k, top_p);
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
