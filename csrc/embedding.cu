// The embedding on CUDA: embedding_body.h over threads. Compiled by nvcc at build time, or by NVRTC at first use.
//
// A warp takes a row (forward) or a chunk of sorted entries (backward), and each of its threads eight neighbouring
// columns at a time. No shared memory, no float atomics, no trap: a row with an index outside its table becomes
// NaN and the first one to be found is recorded in `fault`, which the host reads when it next synchronises.
#include "embedding_body.h"

namespace gpt2 {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef __CUDACC__  // the tests compile this file for the CPU as well, and bring their own
static __device__ __forceinline__ float float_of_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
static __device__ __forceinline__ uint16_t half_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// To nearest even; a NaN gives the NaN that the instruction gives.
static __device__ __forceinline__ uint16_t bfloat_of_float(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
static __device__ __forceinline__ float to_float(f16 x) { return float_of_half(x.bits); }

static __device__ __forceinline__ void from_float(float x, float& to) { to = x; }
static __device__ __forceinline__ void from_float(float x, bf16& to) { to.bits = bfloat_of_float(x); }
static __device__ __forceinline__ void from_float(float x, f16& to) { to.bits = half_of_float(x); }

struct Mask {
  uint64_t key;
  uint32_t threshold, site;
  float scale;
};

// Eight columns. WHOLE: rows are multiples of eight columns and every pointer is 16-byte aligned, so that they
// move as one or two 16-byte words.
template <bool WHOLE>
struct Tile {
  using Mask = gpt2::Mask;
  static constexpr int COLS = 8;
  float v[COLS];

  template <class T>
  struct alignas(16) Packed {
    T v[COLS];
  };

  static __device__ __forceinline__ Tile splat(float x) {
    Tile tile;
    for (int i = 0; i < COLS; ++i) tile.v[i] = x;
    return tile;
  }
  static __device__ __forceinline__ Tile zero() { return splat(0.0f); }

  template <class T>
  static __device__ __forceinline__ Tile load(const T* p, int64_t n) {
    Tile tile;
    if (WHOLE) {
      Packed<T> packed = *(const Packed<T>*)p;
      for (int i = 0; i < COLS; ++i) tile.v[i] = to_float(packed.v[i]);
    } else {
      for (int i = 0; i < COLS; ++i) tile.v[i] = i < n ? to_float(p[i]) : 0.0f;
    }
    return tile;
  }

  template <class T>
  __device__ __forceinline__ void store(T* p, int64_t n) const {
    Packed<T> packed;
    for (int i = 0; i < COLS; ++i) from_float(v[i], packed.v[i]);
    if (WHOLE) {
      *(Packed<T>*)p = packed;
    } else {
      for (int i = 0; i < COLS; ++i)
        if (i < n) p[i] = packed.v[i];
    }
  }

  __device__ __forceinline__ void add(const Tile& other) {
    for (int i = 0; i < COLS; ++i) v[i] += other.v[i];
  }

  __device__ __forceinline__ void drop(const Mask& mask, int64_t row, int64_t col) {
    const PhiloxBlock block = philox4x32(mask.key, (uint32_t)(col >> 3), (uint32_t)row, 0, mask.site);
    for (int i = 0; i < COLS; ++i) v[i] = block.number(i) >= mask.threshold ? v[i] * mask.scale : 0.0f;
  }
};

template <class Arguments>
static __device__ __forceinline__ Mask mask_of(const Arguments& a) {
  return {a.rng ? *a.rng : 0, (uint32_t)a.threshold, (uint32_t)a.site, (float)a.scale};
}

static __device__ __forceinline__ void record_fault(const EmbeddingForward& a, EmbeddingIndex index,
                                                    const EmbeddingRows& at, int64_t row) {
  int64_t* fault = a.fault;
  if (atomicCAS((unsigned long long*)fault, 0ull, 1ull) != 0ull) return;
  fault[1] = index;
  fault[2] = index == TOKEN ? at.token : index == POSITION ? at.position : at.type;
  fault[3] = index == POSITION ? a.n_positions : a.vocab;
  fault[4] = row;
}

// Grid: x over groups of blockDim.y rows. Block: (32, rows).
template <class W, class O, bool WHOLE>
static __device__ __forceinline__ void forward(const EmbeddingForward& a) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  EmbeddingRows at;
  const EmbeddingIndex outside = embedding_locate(a, row, at);
  if (outside != IN_RANGE) {
    if (threadIdx.x == 0) record_fault(a, outside, at, row);
    const Tile<WHOLE> nan = Tile<WHOLE>::splat(__uint_as_float(0x7fffffffu));
    for (int64_t col = threadIdx.x * 8; col < a.C; col += blockDim.x * 8)
      nan.store((O*)a.out + embedding_offset(row, a.C, col), a.C - col);
    return;
  }
  const Mask mask = mask_of(a);
  for (int64_t col = threadIdx.x * 8; col < a.C; col += blockDim.x * 8)
    embedding_forward_tile<Tile<WHOLE>, W, O>(a, at, mask, row, col);
}

// Grid: x over groups of blockDim.y chunks, y over 32 * 8 columns. Block: (32, chunks).
template <class G, class W, bool WHOLE>
static __device__ __forceinline__ void reduce(const EmbeddingBackward& a) {
  const int64_t chunk = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t col = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (chunk * a.chunk >= a.entries || col >= a.C) return;
  embedding_reduce_chunk<Tile<WHOLE>, G, W>(a, mask_of(a), chunk, col);
}

// The same grid.
template <class W, bool WHOLE>
static __device__ __forceinline__ void finish(const EmbeddingBackward& a) {
  const int64_t chunk = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t col = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (chunk * a.chunk >= a.entries || col >= a.C) return;
  embedding_finish_chunk<Tile<WHOLE>, W>(a, chunk, col);
}

}  // namespace gpt2

// Two blocks a multiprocessor at least: left to itself ptxas spills on sm_100 to fit four.
#define GPT2_BOUNDS __launch_bounds__(256, 2)

// embedding_forward_<tables>_<out>, embedding_reduce_<grad>_<table>, embedding_finish_<table>; with _whole, for
// rows of whole tiles, aligned.
#define GPT2_PAIR(a_name, A, b_name, B) \
  GPT2_PAIR_OF(a_name, A, b_name, B, , false) \
  GPT2_PAIR_OF(a_name, A, b_name, B, _whole, true)
#define GPT2_PAIR_OF(a_name, A, b_name, B, suffix, WHOLE) \
  extern "C" __global__ void GPT2_BOUNDS \
      embedding_forward_##a_name##_##b_name##suffix(gpt2::EmbeddingForward a) { \
    gpt2::forward<A, B, WHOLE>(a); \
  } \
  extern "C" __global__ void GPT2_BOUNDS \
      embedding_reduce_##a_name##_##b_name##suffix(gpt2::EmbeddingBackward a) { \
    gpt2::reduce<A, B, WHOLE>(a); \
  }
#define GPT2_FINISH(name, T, suffix, WHOLE) \
  extern "C" __global__ void GPT2_BOUNDS embedding_finish_##name##suffix(gpt2::EmbeddingBackward a) { \
    gpt2::finish<T, WHOLE>(a); \
  }
#define GPT2_TABLE(name, T) \
  GPT2_PAIR(name, T, name, T) \
  GPT2_FINISH(name, T, , false) \
  GPT2_FINISH(name, T, _whole, true)

GPT2_TABLE(float32, float)
GPT2_TABLE(bfloat16, gpt2::bf16)
GPT2_TABLE(float16, gpt2::f16)
GPT2_PAIR(float32, float, bfloat16, gpt2::bf16)
GPT2_PAIR(float32, float, float16, gpt2::f16)
GPT2_PAIR(bfloat16, gpt2::bf16, float32, float)
GPT2_PAIR(float16, gpt2::f16, float32, float)
