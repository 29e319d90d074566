// Vectors of floats whose width follows the instruction set this file is compiled for.
//
// Each kernel source is compiled once per instruction set, with GPT2_ISA naming it, and everything lives in
// namespace gpt2::GPT2_ISA. Kernel sources include no C++ standard library header with inline functions:
// the linker would keep one copy of such a function, possibly the AVX-512 one, for all instruction sets.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef GPT2_ISA
#error "GPT2_ISA names the instruction set"
#endif

#define GPT2_INLINE static inline __attribute__((always_inline))
// For what is long and not hot: inlined everywhere it would be most of the build's time.
#define GPT2_OUT_OF_LINE static __attribute__((noinline, unused))

namespace gpt2 {
using addr = uintptr_t;  // a raw device or host address, as Python passes it

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

namespace GPT2_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

GPT2_INLINE int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }
GPT2_INLINE int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }
GPT2_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

GPT2_INLINE vf splat(float x) { return x - vf{}; }

// Bit casts between vectors of the same size.
template <class To, class From>
GPT2_INLINE To as(From x) {
  To r;
  static_assert(sizeof(To) == sizeof(From), "same size");
  memcpy(&r, &x, sizeof(r));
  return r;
}

GPT2_INLINE vf select(vi mask, vf a, vf b) { return as<vf>((mask & as<vi>(a)) | (~mask & as<vi>(b))); }

// Loads and stores are unaligned, and to and from float32.
GPT2_INLINE vf load(const float* p) {
  vf r;
  memcpy(&r, p, sizeof(r));
  return r;
}
GPT2_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }

GPT2_INLINE vf load(const bf16* p) {
  // GCC widens a vector in halves that it then joins; one instruction does it.
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  memcpy(&h, p, sizeof(h));
  return as<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
// Round to nearest even; NaN stays NaN (quiet).
#if defined(__AVX512BF16__)
// Of a subnormal number this instruction makes zero.
GPT2_INLINE void store(bf16* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
GPT2_INLINE void store(bf16* p, vf x) {
  vu u = as<vu>(x);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  __m512i bits = _mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bits));
#else
  vu nan = as<vu>(x != x);
  vh h = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vh);
  memcpy(p, &h, sizeof(h));
#endif
}
#endif

#if defined(__AVX512F__)
GPT2_INLINE vf load(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
GPT2_INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
GPT2_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
GPT2_INLINE void store(f16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
GPT2_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa * 2^-24, exact in float32
    float f = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
GPT2_INLINE uint16_t float_to_half(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal in half: let the float adder round at bit 2^-24
    float f;
    memcpy(&f, &a, 4);
    f += 0.5f;
    memcpy(&a, &f, 4);
    return (uint16_t)(sign | (a - 0x3f000000));
  }
  a += 0xc8000fff + ((a >> 13) & 1);
  return (uint16_t)(sign | (a >> 13));
}
GPT2_OUT_OF_LINE vf load(const f16* p) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = half_to_float(p[i].bits);
  return r;
}
GPT2_OUT_OF_LINE void store(f16* p, vf x) {
  for (int i = 0; i < W; ++i) p[i].bits = float_to_half(x[i]);
}
#endif

// The first n < W elements, n > 0; the rest read as `fill` and are not written.
#if defined(__AVX512F__)
GPT2_INLINE __mmask16 lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }

GPT2_INLINE vf load_tail(const float* p, int64_t n, float fill = 0.0f) {
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes(n), p);
}
template <class T>
GPT2_INLINE vf load_tail(const T* p, int64_t n, float fill = 0.0f) {
  T buffer[W];
  _mm256_storeu_si256((__m256i*)buffer, _mm256_maskz_loadu_epi16(lanes(n), p));
  return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes(n), (__m512)load(buffer));
}
GPT2_INLINE void store_tail(float* p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)x); }
template <class T>
GPT2_INLINE void store_tail(T* p, vf x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  _mm256_mask_storeu_epi16(p, lanes(n), _mm256_loadu_si256((const __m256i*)buffer));
}
#else
template <class T>
GPT2_OUT_OF_LINE vf load_tail(const T* p, int64_t n, float fill = 0.0f) {
  T buffer[W];
  memset(buffer, 0, sizeof(buffer));
  memcpy(buffer, p, n * sizeof(T));
  vf r = load(buffer);
  for (int i = (int)n; i < W; ++i) r[i] = fill;
  return r;
}
template <class T>
GPT2_OUT_OF_LINE void store_tail(T* p, vf x, int64_t n) {
  T buffer[W];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}
#endif

// Vector load and store of n > 0 elements, all W of them where there are that many.
template <class T>
GPT2_INLINE vf load_n(const T* p, int64_t n, float fill = 0.0f) {
  return n >= W ? load(p) : load_tail(p, n, fill);
}
template <class T>
GPT2_INLINE void store_n(T* p, vf x, int64_t n) {
  if (n >= W)
    store(p, x);
  else
    store_tail(p, x, n);
}

// x as T holds it.
template <class T>
GPT2_INLINE vf rounded(vf x) {
  T buffer[W];
  store(buffer, x);
  return load(buffer);
}

// Sum and maximum over the lanes, in a fixed order.
GPT2_OUT_OF_LINE float hsum(vf x) {
  float s[W];
  memcpy(s, &x, sizeof(s));
  for (int w = W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) s[i] += s[i + w];
  return s[0];
}
GPT2_OUT_OF_LINE float hmax(vf x) {
  float s[W];
  memcpy(s, &x, sizeof(s));
  for (int w = W / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) s[i] = s[i] > s[i + w] ? s[i] : s[i + w];
  return s[0];
}
// As maxps and minps have it: b where either is NaN.
#if defined(__AVX512F__)
GPT2_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
GPT2_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
GPT2_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
GPT2_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
GPT2_INLINE vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
GPT2_INLINE vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
GPT2_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
GPT2_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
#endif

GPT2_INLINE vf vsqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = sqrtf(x[i]);
  return r;
#endif
}

#if defined(__AVX512BF16__)
constexpr int PAIR = 2;  // bfloat16 that one instruction multiplies and adds in a lane
#else
constexpr int PAIR = 1;
#endif

// sum += a * b, lanes of float32 (G = 1) or of pairs of bfloat16 (G = 2), of which a lane's two products are added.
template <int G>
GPT2_INLINE void add_lanes(vf& sum, vf a, vf b) {
#if defined(__AVX512BF16__)
  // The intrinsic makes g++ 12 copy its accumulators.
  if (G == 2)
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  else
#endif
    sum += a * b;
}

// a * b + c, one instruction where there is one. Of the expression, compilers decide that loop by loop (g++ 13 keeps a
// lone chain of sums apart and fuses several), so where loops of different shapes must agree to the bit they call this.
GPT2_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// exp(r) for |r| <= log(2) / 2: the Cephes expf polynomial.
GPT2_INLINE vf exp_reduced(vf r) {
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// exp, to about one unit in the last place, after a Cody-Waite reduction.
// Below -87.3 the result is 0, above 88.7 it is the largest power the exponent holds (inf).
#if defined(__AVX512F__)
GPT2_INLINE vf vexp(vf x) {
  // Neither bound touches a NaN: min returns its second operand then, and "not less" is true.
  vf clamped = vmin(splat(88.72283f), x);
  __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
  vf n = (vf)_mm512_roundscale_ps((__m512)(clamped * 1.44269504088896341f),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)exp_reduced(r), (__m512)n);
}
#else
GPT2_INLINE vf vexp(vf x) {
  vf clamped = vmin(vmax(x, splat(-87.33654f)), splat(88.72283f));
  vf t = clamped * 1.44269504088896341f;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  vf n = (t + 12582912.0f) - 12582912.0f;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // 2^n in two halves so that n = 128 does not overflow the exponent field early.
  vi k = __builtin_convertvector(n, vi);
  vi k1 = k >> 1, k2 = k - k1;
  vf y = exp_reduced(r) * as<vf>((k1 + 127) << 23) * as<vf>((k2 + 127) << 23);
  y = select(x < -87.33654f, vf{}, y);
  return select(x != x, x, y);
}
#endif

// Row-wise parallel loops: `GPT2_PARALLEL_FOR(i, n) { ... }` with a static schedule, so that which thread
// does what is a function of the sizes alone.
#define GPT2_PRAGMA(x) _Pragma(#x)
#define GPT2_PARALLEL_FOR(i, n) \
  GPT2_PRAGMA(omp parallel for schedule(static)) \
  for (int64_t i = 0; i < (n); ++i)

// Of a parallel region: which thread this is, how many there are, and where all of them meet.
#ifdef _OPENMP
GPT2_INLINE int64_t this_thread() { return omp_get_thread_num(); }
GPT2_INLINE int64_t thread_count() { return omp_get_num_threads(); }
GPT2_INLINE int64_t processor_count() { return omp_get_num_procs(); }  // that this process may use
#else
GPT2_INLINE int64_t this_thread() { return 0; }
GPT2_INLINE int64_t thread_count() { return 1; }
GPT2_INLINE int64_t processor_count() { return 1; }
#endif
static inline void meet() {
#pragma omp barrier
}
// Of a loop that waits for another thread.
GPT2_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// sums[c] = partial[0][c] + partial[1][c] + ..., for the columns of rows `stride` apart.
static inline void sum_partials(const float* partial, int64_t chunks, int64_t stride, float* sums, int64_t C) {
  GPT2_PARALLEL_FOR(block, (C + W - 1) / W) {
    int64_t c = block * W, n = C - c;
    vf sum = {};
    for (int64_t k = 0; k < chunks; ++k) sum += load_n(partial + k * stride + c, n);
    store_n(sums + c, sum, n);
  }
}

// Runs `body` with T bound to the element type that `dtype` names.
#define GPT2_DISPATCH(dtype, T, ...) \
  do { \
    if ((dtype) == F32) { \
      using T = float; \
      __VA_ARGS__; \
    } else if ((dtype) == BF16) { \
      using T = bf16; \
      __VA_ARGS__; \
    } else { \
      using T = f16; \
      __VA_ARGS__; \
    } \
  } while (0)

}  // namespace GPT2_ISA
}  // namespace gpt2
