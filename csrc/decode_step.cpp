// GPT-2 from token ids to logits in one parallel region (gpt2_fast/ops/decode_step.py has the equations).
//
// Threads share each product by its columns, so that every one streams parts of the weights of its own, and everything
// else by rows or heads; between these the region meets at a barrier. Whoever reads knows what it reads next. An
// output's sum runs over its inputs in order, in one thread, whatever the number of threads and of rows. Of the last
// layer, what comes after its keys and values is computed for the newest rows alone.
#include "decode_attention.h"
#include "decode_int4.h"
#include "gelu.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t COLUMNS = 4;  // panels whose sums are finished together

GPT2_INLINE float value(float x) { return x; }
GPT2_INLINE float value(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
GPT2_INLINE float value(uint8_t x) { return (float)((int)x - 128); }

// What becomes of finished sums: rows `stride` apart, of which `limit` columns are written.
struct Sums {
  Finish finish;
  float* out;
  int64_t stride, limit;
};

void finish_tile(const float* sum, int64_t row, int64_t rows, int64_t column, int64_t columns, const DecodeMatrix& w,
                 const Sums& to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = column; c < column + columns && c < to.limit; c += W) {
      vf x = load(sum + r * COLUMNS * PANEL + c - column);
      if (w.scale) x *= load(w.scale + c);
      if (w.bias) x += load(w.bias + c);
      float* out = to.out + (row + r) * to.stride + c;
      if (to.finish == FINISH_TANH_GELU) x = TanhGelu::value(x);
      if (to.finish == FINISH_ERF_GELU) x = ErfGelu::value(x);
      if (to.finish == FINISH_ADD) x += load(out);
      store_n(out, x, to.limit - c);
    }
}

struct Worker : Attention {
  int64_t F16() const { return round_up(m.F, 16); }
  int64_t split_stride() const { return C16() > F16() ? C16() : F16(); }

  // wte[n, k]
  float weight_of(int64_t n, int64_t k) const {
    const char* wte = m.wte.panels;
    switch (m.weights) {
      case DECODE_F32: return value(element<float>(wte, m.C, n, k));
      case DECODE_BF16: return value(element<bf16>(wte, m.C, n, k));
      case DECODE_INT8: return value(element<uint8_t>(wte, m.C, n, k)) * m.wte.scale[n];
      default: return int4_value(wte, m.levels, m.C, n, k);
    }
  }

  // h = wte[token] + wpe[position]
  void embed(const int64_t* tokens, const int32_t* positions, int64_t rows) const {
    for (int64_t r = first(rows); r < last(rows); ++r) {
      float* h = c.h + r * C16();
      const float* position = m.wpe + positions[r] * m.C;
      memset(h, 0, C16() * sizeof(float));
      for (int64_t k = 0; k < m.C; ++k) h[k] = position[k] + weight_of(tokens[r], k);
    }
  }

  // y = layernorm(h), rows C16 apart. Spare columns: 0, as weight and bias are 0 there.
  void layernorm(const float* h, const float* weight, const float* bias, int64_t rows) const {
    for (int64_t r = first(rows); r < last(rows); ++r) {
      const float* x = h + r * C16();
      float* y = c.y + r * C16();
      vf sum{}, squares{};
      for (int64_t k = 0; k < m.C; k += W) sum += load(x + k);
      const float mean = hsum(sum) / (float)m.C;
      for (int64_t k = 0; k < m.C; k += W) {
        const vf d = load_n(x + k, m.C - k, mean) - mean;
        squares += d * d;
      }
      const float rstd = 1.0f / sqrtf(hsum(squares) / (float)m.C + m.constants[m.L]);
      for (int64_t k = 0; k < C16(); k += W)
        store(y + k, (load(x + k) - mean) * rstd * load(weight + k) + load(bias + k));
      prepare(y, C16(), r, rows);
    }
  }

#if GPT2_INTEGERS
  bool splits() const { return m.weights == DECODE_INT8 || m.weights == DECODE_INT4; }
  int64_t split_groups() const { return ceil_div(split_stride(), INT4_GROUP); }

  // Row r of `rows` in c.split from x, whose width is a multiple of 16. Its scale is NaN where a number of it is none
  // or infinite: as whole numbers these would be others, which nobody had.
  void prepare(const float* x, int64_t width, int64_t r, int64_t rows) const {
    if (!splits()) return;
    vf high{}, none{};
    for (int64_t k = 0; k < width; k += W) {
      const vf of_x = load(x + k);
      high = vmax(high, vmax(of_x, -of_x));
      none += of_x - of_x;  // 0 of finite numbers, NaN of others
    }
    const bool groups = m.weights == DECODE_INT4;
    const float most = (float)(groups ? MOST : most_of(width)), largest = hmax(high) + hsum(none);
    const float inverse = largest > 1e-33f ? most / largest : 0.0f;  // of less it may be infinite: a row of zeros
    const int32_t finite = largest == largest ? -1 : 0;
    const int64_t tile = r / ROWS * ROWS, pitch = 8 * tile_rows(rows - tile);
    int8_t* to = c.split + 2 * tile * split_stride() + 8 * (r - tile);
    int32_t* offset = c.split_offsets + tile * split_groups() + (r - tile);
    vi sums[PARTS] = {}, group{};
    for (int64_t k = 0; k < width; k += W) {
      const vi numbers = nearest(load(x + k) * inverse) & finite;
      store_quads(numbers, to, pitch, sums);
      to += W / 4 * pitch;
      group += numbers;
      if (groups && k % INT4_GROUP + W == INT4_GROUP) {
        *offset = -128 * sum_of(group);
        offset += pitch / 8;
        group = vi{};
      }
    }
    c.split_scales[r] = largest / most;
    if (groups) return;
    for (int i = 0; i < PARTS; ++i) c.split_offsets[PARTS * r + i] = -128 * sum_of(sums[i]);
  }
#else
  bool splits() const { return false; }
  void prepare(const float*, int64_t, int64_t, int64_t) const {}
#endif

  // What a product reads, made from rows that another product or attention left: a meeting and `prepare`.
  void hand_over(const float* x, int64_t width, int64_t rows) const {
    meet();
    if (!splits()) return;
    for (int64_t r = first(rows); r < last(rows); ++r) prepare(x + r * width, width, r, rows);
    meet();
  }

  // A matrix [N, K] times rows of a, as in `product`.
  template <class A>
  void multiply(const A& a, const DecodeMatrix& w, int64_t N, int64_t K, int64_t rows, const Sums& to,
                const char* next) const {
    const int64_t steps = ceil_div(K, A::GROUP), all = ceil_div(N, PANEL);
    const Panels panels{w.panels, A::pitch(steps), LINE, steps};
    int64_t* taken = &team.taken[products % 2];
    if (thread == 0) __atomic_store_n(&team.taken[(products + 1) % 2], 0, __ATOMIC_RELAXED);
    ++products;
    for (Part part{first(all / 2), last(all / 2)}; part.begin < all;) {
      const Part then = claim(taken, all);  // before its turn: what is read next has to be known
      const Stream stream = Stream::to(panels.from(part.end).w, then.begin < all ? panels.from(then.begin).w : next);
      multiply_part(a, panels, stream, part, w, rows, to);
      part = then;
    }
  }

  template <class A>
  void multiply_part(const A& a, const Panels& panels, const Stream& stream, Part part, const DecodeMatrix& w,
                     int64_t rows, const Sums& to) const {
    alignas(64) float sum[ROWS * COLUMNS * PANEL];
    for (int64_t p = part.begin; p < part.end; p += COLUMNS)
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t count = smaller(part.end - p, COLUMNS);
        panel_rows(panels.from(p), stream, a, r, tile_rows(rows - r), count, sum, COLUMNS * PANEL);
        finish_tile(sum, r, smaller(rows - r, ROWS), p * PANEL, count * PANEL, w, to);
      }
  }

  int64_t pitch(int64_t K) const {
    switch (m.weights) {
      case DECODE_F32: return Dense<float>::pitch(K);
      case DECODE_BF16: return Dense<bf16>::pitch(ceil_div(K, GROUP_OF<bf16>));
      case DECODE_INT8: return Dense<uint8_t>::pitch(ceil_div(K, GROUP_OF<uint8_t>));
      default: return int4_pitch(K / INT4_GROUP);
    }
  }
  // Where this thread begins in a matrix [N, K].
  const char* part_of(const DecodeMatrix& w, int64_t N, int64_t K) const {
    return w.panels + first(ceil_div(N, PANEL) / 2) * pitch(K);
  }

  // A matrix [N, K] times `rows` rows of x, `stride` apart; `next` is what the thread reads then.
  void product(const float* x, int64_t stride, const DecodeMatrix& w, int64_t N, int64_t K, int64_t rows,
               const Sums& to, const char* next) const {
    if (m.weights == DECODE_F32)
      multiply(Dense<float>{x, stride}, w, N, K, rows, to, next);
    else if (m.weights == DECODE_BF16)
      multiply(Dense<bf16>{x, stride}, w, N, K, rows, to, next);
#if GPT2_INTEGERS
    else if (m.weights == DECODE_INT8)
      multiply(Split{c.split, c.split_offsets, c.split_scales, split_stride()}, w, N, K, rows, to, next);
    else
      multiply(SplitGroups{c.split, c.split_offsets, c.split_scales, split_stride(), split_groups(), m.levels}, w, N, K,
               rows, to, next);
#else
    else if (m.weights == DECODE_INT8)
      multiply(Dense<uint8_t>{x, stride}, w, N, K, rows, to, next);
    else
      multiply(Grouped{x, stride, m.levels}, w, N, K, rows, to, next);
#endif
  }

  // Moves the newest rows of h and y to the front, in order; returns how many there are.
  int64_t gather(const int32_t* sequences, int64_t rows, int64_t rest) const {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (!newest(sequences, r, rest)) continue;
      if (thread == 0 && r != count) {
        memcpy(c.h + count * C16(), c.h + r * C16(), C16() * sizeof(float));
        memcpy(c.y + count * C16(), c.y + r * C16(), C16() * sizeof(float));
      }
      ++count;
    }
    return count;
  }

  // Rows of a chunk through one layer, `rest` being all that are not yet done; returns how many h has afterwards: the
  // last layer keeps the newest of each sequence alone.
  int64_t layer(const DecodeLayer& l, int64_t index, const int32_t* sequences, const int32_t* positions, int64_t rows,
                int64_t rest) const {
    const int64_t C = m.C, F = m.F, QKV16 = round_up(3 * C, 16);
    const bool is_last = index + 1 == m.L;
    layernorm(c.h, l.ln_1_weight, l.ln_1_bias, rows);
    meet();
    product(c.y, C16(), l.c_attn, 3 * C, C, rows, {FINISH_STORE, c.qkv, QKV16, QKV16},
            attention_of(sequences, rows, index));
    meet();
    attend(sequences, positions, rows, rest, index, part_of(l.attn_proj, C, C));
    if (is_last) {
      meet();
      rows = gather(sequences, rows, rest);
    }
    hand_over(c.y, C16(), rows);
    product(c.y, C16(), l.attn_proj, C, C, rows, {FINISH_ADD, c.h, C16(), C16()}, part_of(l.c_fc, F, C));
    meet();
    layernorm(c.h, l.ln_2_weight, l.ln_2_bias, rows);
    meet();
    product(c.y, C16(), l.c_fc, F, C, rows, {m.erf ? FINISH_ERF_GELU : FINISH_TANH_GELU, c.f, F16(), F16()},
            part_of(l.mlp_proj, C, F));
    hand_over(c.f, F16(), rows);
    product(c.f, F16(), l.mlp_proj, C, F, rows, {FINISH_ADD, c.h, C16(), C16()},
            is_last ? part_of(m.lm_head, m.V, C) : part_of((&l)[1].c_attn, 3 * C, C));
    meet();
    return rows;
  }

  void run(const int64_t* tokens, const int32_t* sequences, const int32_t* positions, int64_t rows,
           float* logits) const {
    for (int64_t begin = 0; begin < rows; begin += c.chunk) {
      const int64_t n = rows - begin < c.chunk ? rows - begin : c.chunk;
      embed(tokens + begin, positions + begin, n);
      int64_t kept = n;
      for (int64_t i = 0; i < m.L; ++i)
        kept = layer(m.layers[i], i, sequences + begin, positions + begin, kept, rows - begin);
      for (int64_t r = 0, i = 0; i < kept; ++r) {
        if (!newest(sequences + begin, r, rows - begin)) continue;
        if (thread == 0) memcpy(c.newest + sequences[begin + r] * C16(), c.h + i * C16(), C16() * sizeof(float));
        ++i;
      }
      meet();
    }
    for (int64_t begin = 0; begin < c.B; begin += c.chunk) {
      const int64_t n = c.B - begin < c.chunk ? c.B - begin : c.chunk;
      layernorm(c.newest + begin * C16(), m.ln_f_weight, m.ln_f_bias, n);
      meet();
      product(c.y, C16(), m.lm_head, m.V, m.C, n, {FINISH_STORE, logits + begin * m.V, m.V, m.V},
              part_of(m.layers[0].c_attn, 3 * m.C, m.C));
      meet();
    }
  }
};

}  // namespace

void decode_step(addr model, addr cache, addr tokens, addr sequences, addr positions, int64_t rows, int64_t first,
                 addr logits, int64_t threads) {
  const DecodeCache& c = *(const DecodeCache*)cache;
  const int32_t* at = positions ? (const int32_t*)positions : c.positions;
  if (!positions)
    for (int64_t b = 0; b < c.B; ++b) c.positions[b] = (int32_t)first - c.starts[b];
  Team team;
  // Where others want the processors too, and where there are more threads than processors, long waits cost most.
  team.patience = threads <= processor_count() ? 20000 : 100;
#pragma omp parallel num_threads((int)threads)
  {
    const Worker worker{{{*(const DecodeModel*)model, c, team, this_thread(), thread_count()}}};
    worker.run((const int64_t*)tokens, (const int32_t*)sequences, at, rows, (float*)logits);
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
