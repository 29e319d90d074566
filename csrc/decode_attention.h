// The attention of a decode step: rows of new tokens against the keys and values of their sequences.
#pragma once

#include "decode_thread.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t HEAD_MAX = 128;  // largest D

// Input k of output n of a matrix of K inputs, as stored; or the key k of K, of position n.
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

// Consecutive new tokens of one sequence.
struct Segment {
  int64_t begin, end;  // rows
};

struct Attention : Thread {
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
};

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
