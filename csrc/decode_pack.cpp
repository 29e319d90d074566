// A matrix as the decode step reads it: panels of 16 outputs in float32, bfloat16, int8 or int4
// (gpt2_fast/ops/packed_weights.py and packed_int4.py, whose numbers these are). A lane is an output.
#include "decode_int4.h"
#include "kernels.h"
#include "transpose.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int BLOCK = INT4_GROUP;  // inputs that are in float32 together

// Inputs of the outputs of a panel: [vector of outputs][input].
using Block = vf[PV][BLOCK];

template <class T>
struct Matrix {
  const T* at;
  int64_t N, K, by_output, by_input;

  // Inputs k, k + 1 ... of outputs n, n + 1 ...; zero outside of the matrix.
  void read(int64_t n, int64_t k, Block& block) const {
    for (int v = 0; v < PV; ++v)
      for (int i = 0; i < BLOCK; i += W) {
        const int64_t outputs = N - n - v * W, inputs = K - k - i;
        const T* corner = at + (n + v * W) * by_output + (k + i) * by_input;
        vf x[W];
        for (int j = 0; j < W; ++j) {
          const int64_t along = by_output == 1 ? outputs : inputs, across = by_output == 1 ? inputs : outputs;
          x[j] = j < across && along > 0 ? load_n(corner + j * (by_output == 1 ? by_input : by_output), along) : vf{};
        }
        if (by_output != 1) transpose(x);
        for (int j = 0; j < W; ++j) block[v][i + j] = x[j];
      }
  }
};

// The bits of bfloat16, to nearest even. NaN stays NaN, and subnormal numbers what they are.
GPT2_INLINE vu bf16_bits(vf x) {
  const vu u = as<vu>(x), nan = as<vu>(x != x);
  return (nan & 0x7fc0u) | (~nan & ((u + 0x7fffu + (u >> 16 & 1u)) >> 16));
}

// How a number is written into the low bits of a word, GROUP of them in each.
struct Float32 {
  static constexpr int GROUP = 1;
  vu operator()(vf x, int) const { return as<vu>(x); }
};

struct Bfloat16 {
  static constexpr int GROUP = 2;
  vu operator()(vf x, int) const { return bf16_bits(x); }
};

struct Int8 {
  static constexpr int GROUP = 4;
  vf scale[PV];

  vu operator()(vf x, int v) const {
    const vf q = x / scale[v], number = select(q == q, q, vf{});
    constexpr float TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for fractions
    const vf whole = vmin(vmax(number, splat(-127.0f)), splat(127.0f)) + TO_WHOLE - TO_WHOLE;
    return as<vu>(__builtin_convertvector(whole + 128.0f, vi));
  }
};

template <class Code, class T>
void pack_lines(const Matrix<T>& matrix, int64_t n, const Code& code, char* line) {
  constexpr int G = Code::GROUP;
  Block block;
  for (int64_t k = 0; k < matrix.K; k += BLOCK) {
    matrix.read(n, k, block);
    for (int i = 0; i < BLOCK && k + i < matrix.K; i += G, line += LINE)
      for (int v = 0; v < PV; ++v) {
        vu word = code(block[v][i], v);
        for (int j = 1; j < G; ++j) word |= code(block[v][i + j], v) << (32 / G * j);
        memcpy(line + v * sizeof(vu), &word, sizeof(vu));
      }
  }
}

// The scales of a panel: largest magnitude / 127, 1 where all are zero. NaN and inf stay in them.
template <class T>
Int8 int8_scales(const Matrix<T>& matrix, int64_t n) {
  Block block;
  vf largest[PV] = {};
  vi nan[PV] = {};
  for (int64_t k = 0; k < matrix.K; k += BLOCK) {
    matrix.read(n, k, block);
    for (int v = 0; v < PV; ++v)
      for (int i = 0; i < BLOCK; ++i) {
        const vf x = block[v][i];
        nan[v] |= x != x;
        largest[v] = vmax(vmax(x, -x), largest[v]);
      }
  }
  Int8 code;
  for (int v = 0; v < PV; ++v) {
    const vf scale = select(largest[v] == vf{}, splat(1.0f), largest[v] / 127.0f);
    code.scale[v] = select(nan[v], splat(NAN), scale);
  }
  return code;
}

// Sums are float64, in which the product of a weight and a level is exact.
typedef double vd __attribute__((vector_size(8 * W)));
typedef int64_t vl __attribute__((vector_size(8 * W)));

struct Rounding {
  float level[16], meeting[15];  // meeting[i]: from where level[i + 1] is nearer than level[i]

  explicit Rounding(const int8_t* levels) {
    for (int i = 0; i < 16; ++i) level[i] = levels[i];
    for (int i = 0; i < 15; ++i) meeting[i] = (level[i] + level[i + 1]) / 2;
  }
};

// The code and the level that are nearest to x / scale; of 0 / 0, which is not compared, the first.
GPT2_INLINE vu nearest_code(const Rounding& levels, vf x, vf scale) {
  const vf q = x / scale;
  vi code = {};
#pragma GCC unroll 15
  for (int i = 0; i < 15; ++i) code -= q >= levels.meeting[i];
  return as<vu>(code);
}

GPT2_INLINE vf nearest_level(const Rounding& levels, vf x, vf scale) {
  const vf q = x / scale;
  vf level = splat(levels.level[0]);
#pragma GCC unroll 15
  for (int i = 0; i < 15; ++i) level = select(q >= levels.meeting[i], splat(levels.level[i + 1]), level);
  return level;
}

// The scale of a group whose weights are finite, rounded to bfloat16. The largest weight is taken for the last level
// and then for the first, and each time the nearest levels decide the scale of least squared error; the better stays.
GPT2_OUT_OF_LINE vf best_scale(const Rounding& levels, const vf (&x)[BLOCK]) {
  vf high = x[0], low = x[0];
  for (int i = 1; i < BLOCK; ++i) high = vmax(x[i], high), low = vmin(x[i], low);
  const vf largest = select(-low > high, low, high);
  vf best = largest;
  vd least = INFINITY - vd{};
  for (int end = 15; end >= 0; end -= 15) {
    const vf first = largest / levels.level[end];
    vd products = {}, error = {};
    vf squares = {};  // exact: whole numbers below 2^24
    for (int i = 0; i < BLOCK; ++i) {
      const vf level = nearest_level(levels, x[i], first);
      products += __builtin_convertvector(x[i], vd) * __builtin_convertvector(level, vd);
      squares += level * level;
    }
    const vf fitted = __builtin_convertvector(products / __builtin_convertvector(squares, vd), vf);
    const vf scale = as<vf>(bf16_bits(fitted) << 16);
    for (int i = 0; i < BLOCK; ++i) {
      const vd level = __builtin_convertvector(nearest_level(levels, x[i], scale), vd);
      const vd off = level * __builtin_convertvector(scale, vd) - __builtin_convertvector(x[i], vd);
      error += off * off;
    }
    const vl better = error < least;
    least = better ? error : least;
    best = select(__builtin_convertvector(better, vi), scale, best);
  }
  return best;
}

template <class T>
void pack_int4(const Matrix<T>& matrix, int64_t n, const Rounding& levels, char* panel) {
  Block block;
  for (int64_t k = 0; k < matrix.K; k += BLOCK) {
    const int64_t group = k / BLOCK, odd = group % 2;
    char* scales = panel + group / 2 * (1 + 2 * INT4_LINES) * LINE;
    char* lines = scales + (1 + odd * INT4_LINES) * LINE;
    matrix.read(n, k, block);
    for (int v = 0; v < PV; ++v) {
      const vf(&x)[BLOCK] = block[v];
      vf zero = {};  // NaN where a weight is not finite
      for (int i = 0; i < BLOCK; ++i) zero += x[i] - x[i];
      const vf scale = best_scale(levels, x);
      const vh bits = __builtin_convertvector(bf16_bits(select(zero == zero, scale, splat(NAN))), vh);
      memcpy(scales + odd * LINE / 2 + v * sizeof(vh), &bits, sizeof(vh));
      for (int l = 0; l < INT4_LINES; ++l) {
        vu word = {};
        for (int i = 0; i < 8; ++i) word |= nearest_code(levels, x[8 * l + i], scale) << (i < 4 ? 8 * i : 8 * i - 28);
        memcpy(lines + l * LINE + v * sizeof(vu), &word, sizeof(vu));
      }
    }
  }
}

}  // namespace

void decode_pack(addr matrix, int64_t N, int64_t K, int64_t by_output, int64_t by_input, int64_t weights, addr levels,
                 addr panels, addr scale, int64_t matrix_dtype) {
  const int64_t group = weights == DECODE_F32 ? 1 : weights == DECODE_BF16 ? 2 : 4;
  const int64_t pitch = weights == DECODE_INT4 ? int4_pitch(K / INT4_GROUP) : ceil_div(K, group) * LINE;
  const Rounding of((const int8_t*)levels);
  GPT2_DISPATCH(matrix_dtype, T, {
    const Matrix<T> from{(const T*)matrix, N, K, by_output, by_input};
    GPT2_PARALLEL_FOR(p, ceil_div(N, PANEL)) {
      const int64_t n = p * PANEL;
      char* panel = (char*)panels + p * pitch;
      if (weights == DECODE_F32) {
        pack_lines(from, n, Float32(), panel);
      } else if (weights == DECODE_BF16) {
        pack_lines(from, n, Bfloat16(), panel);
      } else if (weights == DECODE_INT8) {
        const Int8 code = int8_scales(from, n);
        for (int v = 0; v < PV; ++v)
          if (n + v * W < N) store_n((float*)scale + n + v * W, code.scale[v], N - n - v * W);
        pack_lines(from, n, code, panel);
      } else {
        pack_int4(from, n, of, panel);
      }
    }
  });
}

}  // namespace GPT2_ISA
}  // namespace gpt2
