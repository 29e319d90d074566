// GPT-2 from token ids to logits in one parallel region (gpt2_fast/ops/decode_step.py has the equations).
//
// Threads share each product by its columns, so that every one streams its own part of the weights, and everything
// else by rows or heads; between these the region meets at a barrier. An output's sum runs over its inputs in order,
// in one thread, whatever the number of threads and of rows. Of the last layer, what comes after its keys and values is
// computed for the newest rows alone.
#include "decode_int4.h"
#include "gelu.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t COLUMNS = 4;  // panels whose sums are finished together
constexpr int64_t HEAD_MAX = 128;  // largest D

// Input k of output n of a matrix of K inputs, as stored.
template <class E>
GPT2_INLINE const E& element(const char* panels, int64_t K, int64_t n, int64_t k) {
  constexpr int64_t G = GROUP_OF<E>;
  return ((const E*)panels)[((n / PANEL * ((K + G - 1) / G) + k / G) * PANEL + n % PANEL) * G + k % G];
}
// The value d of D, of a position, in a head's cache: all of a position, or of two, lie together.
template <class E>
GPT2_INLINE E& value_at(char* values, int64_t D, int64_t position, int64_t d) {
  constexpr int64_t G = GROUP_OF<E>;
  return ((E*)values)[(position / G * round_up(D, PANEL) + d) * G + position % G];
}
GPT2_INLINE float value(float x) { return x; }
GPT2_INLINE float value(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
GPT2_INLINE float value(uint8_t x) { return (float)((int)x - 128); }

// What becomes of finished sums.
void finish_tile(const float* sum, int64_t rows, int64_t columns, const float* scale, const float* bias,
                 Finish finish, float* out, int64_t ldo, int64_t limit) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns && c < limit; c += W) {
      vf x = load(sum + r * COLUMNS * PANEL + c);
      if (scale) x *= load(scale + c);
      if (bias) x += load(bias + c);
      float* to = out + r * ldo + c;
      if (finish == FINISH_TANH_GELU) x = TanhGelu::value(x);
      if (finish == FINISH_ERF_GELU) x = ErfGelu::value(x);
      if (finish == FINISH_ADD) x += load(to);
      store_n(to, x, limit - c);
    }
}

// Consecutive new tokens of one sequence.
struct Segment {
  int64_t begin, end;  // rows
};

// One thread's view of a step.
struct Worker {
  const DecodeModel& m;
  const DecodeCache& c;
  int64_t thread, threads;

  int64_t part(int64_t n, int64_t i) const { return n * i / threads; }
  int64_t first(int64_t n) const { return part(n, thread); }
  int64_t last(int64_t n) const { return part(n, thread + 1); }
  int64_t C16() const { return round_up(m.C, 16); }
  int64_t F16() const { return round_up(m.F, 16); }
  int64_t S16() const { return round_up(c.S, 16); }
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

#if defined(__AVX512VNNI__)
  bool splits() const { return m.weights == DECODE_INT8 || m.weights == DECODE_INT4; }
  int64_t split_groups() const { return ceil_div(split_stride(), INT4_GROUP); }

  // Row r of `rows` in c.split from x, whose width is a multiple of 16.
  void prepare(const float* x, int64_t width, int64_t r, int64_t rows) const {
    if (!splits()) return;
    vf high{};
    for (int64_t k = 0; k < width; k += W) high = vmax(high, vmax(load(x + k), -load(x + k)));
    const float largest = hmax(high), inverse = largest > 0.0f ? 16256.0f / largest : 0.0f;
    const int64_t tile = r / ROWS * ROWS, pitch = 8 * tile_rows(rows - tile);
    int8_t* to = c.split + 2 * tile * split_stride() + 8 * (r - tile);
    int32_t* offset = c.split_offsets + tile * split_groups() + (r - tile);
    __m512i hi_sum = _mm512_setzero_si512(), lo_sum = hi_sum;
    for (int64_t k = 0; k < width; k += W) {
      const __m512i q = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
      const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
      const __m512i lo = _mm512_sub_epi32(q, _mm512_slli_epi32(hi, 7));
      hi_sum = _mm512_add_epi32(hi_sum, hi);
      lo_sum = _mm512_add_epi32(lo_sum, lo);
      // Four times a quad of hi and the same of lo.
      const __m128i hi_quads = _mm512_cvtepi32_epi8(hi), lo_quads = _mm512_cvtepi32_epi8(lo);
      const __m128i first = _mm_unpacklo_epi32(hi_quads, lo_quads), second = _mm_unpackhi_epi32(hi_quads, lo_quads);
      _mm_storel_pd((double*)to, (__m128d)first);
      _mm_storeh_pd((double*)(to + pitch), (__m128d)first);
      _mm_storel_pd((double*)(to + 2 * pitch), (__m128d)second);
      _mm_storeh_pd((double*)(to + 3 * pitch), (__m128d)second);
      to += 4 * pitch;
      if (m.weights == DECODE_INT4 && k % INT4_GROUP + W == INT4_GROUP) {
        *offset = -128 * (128 * _mm512_reduce_add_epi32(hi_sum) + _mm512_reduce_add_epi32(lo_sum));
        offset += pitch / 8;
        hi_sum = lo_sum = _mm512_setzero_si512();
      }
    }
    c.split_scales[r] = largest / 16256.0f;
    if (m.weights == DECODE_INT4) return;
    c.split_offsets[2 * r] = -128 * _mm512_reduce_add_epi32(hi_sum);
    c.split_offsets[2 * r + 1] = -128 * _mm512_reduce_add_epi32(lo_sum);
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

  template <class A>
  void multiply(const A& a, const DecodeMatrix& w, int64_t N, int64_t K, int64_t rows, Finish finish, float* out,
                int64_t ldo, int64_t limit, const char* next) const {
    const int64_t steps = ceil_div(K, A::GROUP), count_of_all = ceil_div(N, PANEL);
    const Panels panels{w.panels, A::pitch(steps), LINE, steps};
    const Stream stream = Stream::to(panels.from(last(count_of_all)).w, next);
    alignas(64) float sum[ROWS * COLUMNS * PANEL];
    for (int64_t p = first(count_of_all); p < last(count_of_all); p += COLUMNS) {
      const int64_t count = smaller(last(count_of_all) - p, COLUMNS), column = p * PANEL;
      for (int64_t r = 0; r < rows; r += ROWS) {
        panel_rows(panels.from(p), stream, a, r, tile_rows(rows - r), count, sum, COLUMNS * PANEL);
        finish_tile(sum, rows - r < ROWS ? rows - r : ROWS, count * PANEL, w.scale ? w.scale + column : nullptr,
                    w.bias ? w.bias + column : nullptr, finish, out + r * ldo + column, ldo, limit - column);
      }
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
    return w.panels + first(ceil_div(N, PANEL)) * pitch(K);
  }

  // out (rows ldo apart, `limit` columns) from x [rows, stride] and a matrix [N, K]; `next` is what the thread reads then.
  void product(const float* x, int64_t stride, const DecodeMatrix& w, int64_t N, int64_t K, int64_t rows,
               Finish finish, float* out, int64_t ldo, int64_t limit, const char* next) const {
    if (m.weights == DECODE_F32)
      multiply(Dense<float>{x, stride}, w, N, K, rows, finish, out, ldo, limit, next);
    else if (m.weights == DECODE_BF16)
      multiply(Dense<bf16>{x, stride}, w, N, K, rows, finish, out, ldo, limit, next);
#if defined(__AVX512VNNI__)
    else if (m.weights == DECODE_INT8)
      multiply(Split{c.split, c.split_offsets, c.split_scales, split_stride()}, w, N, K, rows, finish, out, ldo, limit,
               next);
    else
      multiply(SplitGroups{c.split, c.split_offsets, c.split_scales, split_stride(), split_groups(), m.levels}, w, N, K,
               rows, finish, out, ldo, limit, next);
#else
    else if (m.weights == DECODE_INT8)
      multiply(Dense<uint8_t>{x, stride}, w, N, K, rows, finish, out, ldo, limit, next);
    else
      multiply(Grouped{x, stride, m.levels}, w, N, K, rows, finish, out, ldo, limit, next);
#endif
  }

  // A head's keys and values in the cache.
  template <class E>
  char* keys_of(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t slot = (layer * c.B + sequence) * m.H + head;
    return c.keys + slot * S16() * round_up(m.D, GROUP_OF<E>) * (int64_t)sizeof(E);
  }
  template <class E>
  char* values_of(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t slot = (layer * c.B + sequence) * m.H + head;
    return c.values + slot * S16() * round_up(m.D, PANEL) * (int64_t)sizeof(E);
  }

  // Queries at `position` and after, rows of qkv: scores, softmax and values of one head.
  template <class E>
  void attend_tile(const float* q, int64_t position, int64_t rows, const char* keys, const char* values, float scale,
                   float* out, const char* next) const {
    const int64_t D = m.D, G = GROUP_OF<E>, seen = position + rows, S = S16();
    float* scores = c.scores + thread * ROWS * S;
    const int64_t key_steps = ceil_div(D, G), key_panels = ceil_div(seen, PANEL), value_panels = ceil_div(D, PANEL);
    const Panels of_keys{keys, key_steps * LINE, LINE, key_steps};
    const Panels of_values{values, LINE, value_panels * LINE, ceil_div(seen, G)};
    panel_rows(of_keys, Stream::to(of_keys.from(key_panels).w, values), Dense<E>{q, round_up(3 * m.C, 16)}, 0,
               tile_rows(rows), key_panels, scores, S);
    float inverse[ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * S;
      const int64_t own = position + r + 1;
      for (int64_t j = own; j < round_up(seen, PANEL); ++j) row[j] = -INFINITY;
      vf high = splat(-INFINITY), sum{};
      for (int64_t j = 0; j < round_up(seen, PANEL); j += W) high = vmax(load(row + j), high);
      const float top = hmax(high);
      for (int64_t j = 0; j < round_up(seen, PANEL); j += W) {
        const vf x = vexp((load(row + j) - top) * scale);
        sum += x;
        store(row + j, x);
      }
      inverse[r] = 1.0f / hsum(sum);
    }
    alignas(64) float sums[ROWS * HEAD_MAX];
    panel_rows<false>(of_values, Stream::to(values + of_values.steps * of_values.line, next), Dense<E>{scores, S}, 0,
                      tile_rows(rows), value_panels, sums, HEAD_MAX);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < D; d += W)
        store_n(out + r * C16() + d, load(sums + r * HEAD_MAX + d) * inverse[r], D - d);
  }

  // Stores the keys and values of a segment for one head, then attends to them from its rows `from` on.
  template <class E>
  void attend_segment(Segment s, int64_t from, const int32_t* sequences, const int32_t* positions, int64_t head,
                      int64_t layer, const char* next) const {
    const int64_t D = m.D, C = m.C, stride = round_up(3 * C, 16);
    char* keys = keys_of<E>(layer, sequences[s.begin], head);
    char* values = values_of<E>(layer, sequences[s.begin], head);
    const float* qkv = c.qkv + head * D;
    for (int64_t r = s.begin; r < s.end; ++r) {
      const float* row = qkv + r * stride;
      E key[HEAD_MAX], value[HEAD_MAX];
      for (int64_t d = 0; d < D; d += W) {
        store(key + d, load_n(row + C + d, D - d));
        store(value + d, load_n(row + 2 * C + d, D - d));
      }
      for (int64_t d = 0; d < D; ++d) {
        const_cast<E&>(element<E>(keys, D, positions[r], d)) = key[d];
        value_at<E>(values, D, positions[r], d) = value[d];
      }
    }
    for (int64_t r = from; r < s.end; r += ROWS)
      attend_tile<E>(qkv + r * stride, positions[r], smaller(s.end - r, ROWS), keys, values, m.constants[layer],
                     c.y + r * C16() + head * D, next);
  }

  // y = attention of the rows of qkv, whose keys and values the cache takes first. In the last layer only the newest
  // rows of sequences are needed further on. `next` is what the thread reads then.
  template <class E>
  void attend_as(const int32_t* sequences, const int32_t* positions, int64_t rows, int64_t rest, int64_t layer,
                 const char* next) const {
    int64_t segments = 0, task = 0;
    for (int64_t r = 0; r < rows; ++r) segments += r == 0 || sequences[r] != sequences[r - 1];
    const int64_t begin = first(segments * m.H), end = last(segments * m.H);
    for (Segment s{0, 0}; s.begin < rows; s.begin = s.end) {
      while (s.end < rows && sequences[s.end] == sequences[s.begin]) ++s.end;
      for (int64_t head = 0; head < m.H; ++head, ++task) {
        if (task < begin || task >= end) continue;
        const int64_t from = layer + 1 < m.L ? s.begin : newest(sequences, s.end - 1, rest) ? s.end - 1 : s.end;
        const bool is_last = task + 1 == end, same = head + 1 < m.H;
        const char* then = is_last ? next : keys_of<E>(layer, sequences[same ? s.begin : s.end], same ? head + 1 : 0);
        attend_segment<E>(s, from, sequences, positions, head, layer, then);
      }
    }
  }
  void attend(const int32_t* sequences, const int32_t* positions, int64_t rows, int64_t rest, int64_t layer,
              const char* next) const {
    if (m.weights == DECODE_F32)
      attend_as<float>(sequences, positions, rows, rest, layer, next);
    else
      attend_as<bf16>(sequences, positions, rows, rest, layer, next);
  }
  // Where this thread's attention begins to read, as far as one row a sequence goes.
  const char* attention_of(const int32_t* sequences, int64_t rows, int64_t layer) const {
    const int64_t task = first(rows * m.H);
    if (task == rows * m.H) return c.keys;
    return m.weights == DECODE_F32 ? keys_of<float>(layer, sequences[task / m.H], task % m.H)
                                   : keys_of<bf16>(layer, sequences[task / m.H], task % m.H);
  }

  // Whether row r, of the `rest` that are not yet done, is the last of its sequence.
  static bool newest(const int32_t* sequences, int64_t r, int64_t rest) {
    return r + 1 == rest || sequences[r + 1] != sequences[r];
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
    product(c.y, C16(), l.c_attn, 3 * C, C, rows, FINISH_STORE, c.qkv, QKV16, QKV16,
            attention_of(sequences, rows, index));
    meet();
    attend(sequences, positions, rows, rest, index, part_of(l.attn_proj, C, C));
    if (is_last) {
      meet();
      rows = gather(sequences, rows, rest);
    }
    hand_over(c.y, C16(), rows);
    product(c.y, C16(), l.attn_proj, C, C, rows, FINISH_ADD, c.h, C16(), C16(), part_of(l.c_fc, F, C));
    meet();
    layernorm(c.h, l.ln_2_weight, l.ln_2_bias, rows);
    meet();
    product(c.y, C16(), l.c_fc, F, C, rows, m.erf ? FINISH_ERF_GELU : FINISH_TANH_GELU, c.f, F16(), F16(),
            part_of(l.mlp_proj, C, F));
    hand_over(c.f, F16(), rows);
    product(c.f, F16(), l.mlp_proj, C, F, rows, FINISH_ADD, c.h, C16(), C16(),
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
      product(c.y, C16(), m.lm_head, m.V, m.C, n, FINISH_STORE, logits + begin * m.V, m.V, m.V,
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
#pragma omp parallel num_threads((int)threads)
  {
    const Worker worker{*(const DecodeModel*)model, c, this_thread(), thread_count()};
    worker.run((const int64_t*)tokens, (const int32_t*)sequences, at, rows, (float*)logits);
  }
}

}  // namespace GPT2_ISA
}  // namespace gpt2
