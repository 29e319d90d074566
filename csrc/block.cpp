// A block of GPT-2 from the kernels that there are (gpt2_fast/ops/block.py has the equations).
//
// Nothing is computed here but widened vectors. What it is for: between two kernels there is no Python, which in a
// small model takes longer than they do.
#include "isa.h"
#include "kernels.h"

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t CHUNKS = 64;  // of rows, each summed alone and then in order; gpt2_fast's PARTIAL_CHUNKS

int64_t chunks_of(int64_t rows) { return smaller(rows, CHUNKS); }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

struct Sizes : BlockSizes {
  int64_t N, D, dtype, wide;  // wide: the dtype of products
  explicit Sizes(const BlockSizes& s)
      : BlockSizes(s), N(s.B * s.T), D(s.C / s.H), dtype(s.m_dtype), wide(s.product_dtype) {}
};

// [rows, columns] by its strides in elements, one of which is 1.
struct Matrix {
  addr data;
  int64_t dtype, rows, columns, down, right;
  Matrix t() const { return {data, dtype, columns, rows, right, down}; }
};

Matrix rows_of(addr data, int64_t dtype, int64_t rows, int64_t columns) {
  return {data, dtype, rows, columns, columns, 1};
}

// A weight [in, out], which lies transposed or not.
Matrix weight_of(addr data, int64_t dtype, int64_t in, int64_t out, bool transposed) {
  return transposed ? rows_of(data, dtype, out, in).t() : rows_of(data, dtype, in, out);
}

// Memory handed out from its beginning; from 0 on, it counts what would be taken.
struct Arena {
  addr at;
  addr take(int64_t bytes) {
    const addr taken = at;
    at += (addr)round_up(bytes, 64);
    return taken;
  }
};

// Vectors of any dtype as the float32 that kernels take.
struct Vectors {
  int64_t dtype;
  Arena* arena;

  addr wide(addr v, int64_t n) const {
    if (dtype == F32 || v == 0) return v;
    float* to = (float*)arena->take(n * (int64_t)sizeof(float));
    GPT2_DISPATCH(dtype, T, {
      for (int64_t i = 0; i < n; i += W) store_n(to + i, load_n((const T*)v + i, n - i), n - i);
    });
    return (addr)to;
  }

  // Where a kernel writes float32 that is to be `v`: narrow() makes it that.
  addr sums(addr v, int64_t n) const { return dtype == F32 ? v : arena->take(n * (int64_t)sizeof(float)); }
  void narrow(addr sums, addr v, int64_t n) const {
    if (dtype == F32) return;
    const float* from = (const float*)sums;
    GPT2_DISPATCH(dtype, T, { for (int64_t i = 0; i < n; i += W) store_n((T*)v + i, load_n(from + i, n - i), n - i); });
  }
};

using Sgemm = void(const char*, const char*, const int64_t*, const int64_t*, const int64_t*, const float*, const float*,
                   const int64_t*, const float*, const int64_t*, const float*, float*, const int64_t*);

struct Products {
  const Sizes& s;
  addr workspace, wide_a, wide_b, wide_c;  // the last three for what is no float32, where a BLAS multiplies

  bool pairs(Matrix a, Matrix b) const { return a.dtype == BF16 && b.dtype == BF16 && s.wide == BF16; }

  // out [a.rows, b.columns] = a @ b + bias, by linear_product or by the BLAS. A matrix or its transpose is contiguous.
  void operator()(Matrix a, Matrix b, addr bias, Matrix out, int64_t finish = FINISH_STORE, addr u = 0) const {
    if (s.sgemm) return by_blas(a, b, bias, out);
    kernels().linear_product(a.data, a.dtype, a.down, a.right, b.data, b.dtype, b.down, b.right, bias, out.data,
                             out.down, u, out.dtype, finish, a.rows, b.columns, a.columns, pairs(a, b),
                             workspace, s.threads);
  }

  // How far apart the lines of a matrix are; of a single one, whose strides may say anything, as a BLAS wants it.
  static int64_t pitch(Matrix x) { return x.right == 1 ? larger(x.down, x.columns) : larger(x.right, x.rows); }

  // A BLAS counts by columns, so out^T = b^T a^T. Its sizes are 32 or 64 bits wide: these numbers are the same in both.
  void by_blas(Matrix a, Matrix b, addr bias, Matrix out) const {
    const int64_t m = b.columns, n = a.rows, k = a.columns;
    const int64_t ldb = pitch(b), lda = pitch(a);
    const float one = 1.0f, beta = bias ? 1.0f : 0.0f;
    float* c = out.dtype == F32 ? (float*)out.data : (float*)wide_c;
    if (bias) GPT2_PARALLEL_FOR(i, n) { memcpy(c + i * m, (const void*)bias, m * sizeof(float)); }
    ((Sgemm*)s.sgemm)(b.right == 1 ? "n" : "t", a.right == 1 ? "n" : "t", &m, &n, &k, &one, widened(b, wide_b), &ldb,
                    widened(a, wide_a), &lda, &beta, c, &m);
    if (out.dtype != F32) GPT2_DISPATCH(out.dtype, T, { copied(c, (T*)out.data, m * n); });
  }

  static const float* widened(Matrix x, addr to) {
    if (x.dtype == F32) return (const float*)x.data;
    GPT2_DISPATCH(x.dtype, T, { copied((const T*)x.data, (float*)to, x.rows * x.columns); });
    return (const float*)to;
  }

  template <class From, class To>
  static void copied(const From* from, To* to, int64_t n) {
    constexpr int64_t STEP = 64 * W;
    GPT2_PARALLEL_FOR(i, ceil_div(n, STEP)) {
      for (int64_t c = i * STEP; c < smaller(n, (i + 1) * STEP); c += W)
        store_n(to + c, load_n(from + c, n - c), n - c);
    }
  }

  // The floats of the largest matrix that a product of a pass reads or writes.
  static int64_t largest(const Sizes& s) { return larger(s.N, s.C) * larger(s.F, 3 * s.C); }

  // Takes what the products of a pass need beside their operands.
  static Products take(const Sizes& s, bool backward, Arena& arena) {
    const int64_t wide = s.sgemm && s.dtype != F32 ? largest(s) * (int64_t)sizeof(float) : 0;
    Products p{s, 0, 0, 0, 0};
    p.workspace = arena.take(s.sgemm ? 0 : workspace_of(s, backward));
    p.wide_a = arena.take(wide), p.wide_b = arena.take(wide), p.wide_c = arena.take(wide);
    return p;
  }

  static int64_t workspace_bytes(int64_t M, int64_t N, int64_t K, bool pairs, int64_t threads) {
    int64_t bytes = 0;
    kernels().linear_workspace(M, N, K, pairs, threads, (addr)&bytes);
    return bytes;
  }

  // Of the largest of a pass's products.
  static int64_t workspace_of(const Sizes& s, bool backward) {
    const int64_t shapes[4][2] = {{s.C, 3 * s.C}, {s.C, s.C}, {s.C, s.F}, {s.F, s.C}};
    int64_t most = 0;
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t in = shapes[i / 2][0], out = shapes[i / 2][1];
      const bool pairs = i % 2;
      auto bytes = [&](int64_t M, int64_t N, int64_t K) { return workspace_bytes(M, N, K, pairs, s.threads); };
      most = larger(most, backward ? larger(bytes(s.N, in, out), larger(bytes(in, out, s.N), bytes(out, in, s.N)))
                                   : bytes(s.N, out, in));
    }
    return most;
  }
};

// Dropout of the sum before each LayerNorm, and of attention.
struct Drops {
  Drop first, attention, second;
  explicit Drops(const BlockOptions& o) : first(o.dropout), attention(o.dropout), second(o.dropout) {
    if (o.attn_threshold == 0) attention.key = 0;
    attention.threshold = o.attn_threshold, attention.scale = o.attn_scale;
    attention.site += 1, second.site += 2;
  }
};

// What forward keeps, as block.h lays it out.
struct Kept : BlockKept {
  addr y, qkv, attended, u, lse, mean_1, rstd_1, mean_2, rstd_2;
  Kept(const Sizes& s, const BlockKept& memory) : BlockKept(memory) {
    const int64_t rows = s.N * s.C * size_of(s.dtype), column = s.N * (int64_t)sizeof(float);
    y = kept, qkv = y + rows, attended = qkv + 3 * rows, u = attended + rows;
    lse = statistics, mean_1 = lse + s.H * column;
    rstd_1 = mean_1 + column, mean_2 = rstd_1 + column, rstd_2 = mean_2 + column;
  }
};

// Scratch of forward. What is attended, projected, is gone before f is made; f is u before its GELU where they are of
// one dtype.
struct ForwardScratch {
  addr n, u, f, a;
  Arena rest;
  ForwardScratch(const Sizes& s, addr begin) : rest{begin} {
    const int64_t size = size_of(s.dtype), N = s.N;
    n = rest.take(N * s.C * size_of(s.wide));
    a = f = rest.take(N * larger(s.F, s.C) * size);
    u = s.dtype == s.wide ? f : rest.take(N * s.F * size_of(s.wide));
  }
  // In float32, each from a line on: four vectors of LayerNorms, and biases of 3 C, C, F and C.
  static int64_t vectors(const Sizes& s) { return (4 * s.C + 5 * s.C + s.F) * 4 + 16 * 64; }
};

// Scratch of backward. df and then du, where they are of one dtype, and then dqkv; n, then dn, dout and dy.
struct BackwardScratch {
  addr wide_1, du, wide_2, da, partial, dq;
  Arena rest;
  static int64_t groups(const Sizes& s) { return ceil_div(s.T, ATTENTION_KEY_GROUP); }
  BackwardScratch(const Sizes& s, addr begin, bool drops) : rest{begin} {
    const int64_t size = size_of(s.dtype), wide = size_of(s.wide), N = s.N;
    wide_1 = rest.take(N * larger(s.F, 3 * s.C) * size);
    du = s.wide == s.dtype ? wide_1 : rest.take(N * s.F * wide);
    wide_2 = rest.take(N * s.C * larger(size, wide));
    da = drops ? rest.take(N * s.C * size) : 0;
    partial = rest.take(chunks_of(N) * larger(s.F, 3 * s.C) * (int64_t)sizeof(float));
    // Too few heads to keep the threads busy: the keys of a head are shared out, each leaving its own part of dq.
    const bool shared = groups(s) > 1 && s.B * s.H < 2 * s.threads;
    dq = shared ? rest.take(s.B * s.H * groups(s) * s.T * round_up(s.D, 16) * (int64_t)sizeof(float)) : 0;
  }
  // In float32, each from a line on: three vectors of LayerNorms, and the gradients of four and of all biases.
  static int64_t vectors(const Sizes& s) { return (12 * s.C + s.F) * 4 + 16 * 64; }
};

struct Backward {
  const Sizes& s;
  const BlockOptions& options;
  const BlockWeights& weights;
  const Kept& kept;
  const BackwardScratch& scratch;
  const Products& product;
  const Vectors& vectors;

  Matrix rows(addr data, int64_t columns, int64_t dtype) const { return rows_of(data, dtype, s.N, columns); }

  // x^T dy, laid out as the weight is, and the sum of dy's rows.
  void parameters(Matrix x, Matrix dy, BlockLinear to) const {
    const int64_t in = x.columns, out = dy.columns;
    if (to.weight && options.transposed) product(dy.t(), x, 0, rows_of(to.weight, s.dtype, out, in));
    if (to.weight && !options.transposed) product(x.t(), dy, 0, rows_of(to.weight, s.dtype, in, out));
    if (to.bias) kernels().column_sum(dy.data, scratch.partial, chunks_of(s.N), to.bias, s.N, out, dy.dtype, s.dtype);
  }

  Matrix weight(addr data, int64_t in, int64_t out) const {
    return weight_of(data, s.dtype, in, out, options.transposed);
  }

  // dn in scratch.wide_2 from dm.
  void mlp(addr dm, addr ln_weight, addr ln_bias, BlockLinear fc, BlockLinear proj) const {
    const auto& k = kernels();
    const int64_t N = s.N;
    if (proj.weight) k.gelu(kept.u, scratch.wide_1, N, s.F, s.dtype, options.erf);
    parameters(rows(scratch.wide_1, s.F, s.dtype), rows(dm, s.C, s.dtype), proj);
    product(rows(dm, s.C, s.dtype), weight(weights.mlp_proj_weight, s.F, s.C).t(), 0,
            rows(scratch.wide_1, s.F, s.dtype));
    const addr sums = vectors.sums(fc.bias, s.F);
    k.bias_gelu_backward(scratch.wide_1, kept.u, scratch.du, scratch.partial, chunks_of(N), sums, N, s.F, s.wide,
                         s.dtype, options.erf);
    vectors.narrow(sums, fc.bias, s.F);
    if (fc.weight) {
      k.add_layernorm_normalize(kept.h_out, ln_weight, ln_bias, kept.mean_2, kept.rstd_2, scratch.wide_2, N, s.C,
                                s.dtype, s.wide);
      parameters(rows(scratch.wide_2, s.C, s.wide), rows(scratch.du, s.F, s.wide), {fc.weight, 0});
    }
    product(rows(scratch.du, s.F, s.wide), weight(weights.c_fc_weight, s.C, s.F).t(), 0,
            rows(scratch.wide_2, s.C, s.wide));
  }

  // dy in scratch.wide_2 from da.
  void attention(addr da, addr segments, BlockLinear attn, BlockLinear proj, const Drop& drop) const {
    const Matrix a = rows(da, s.C, s.dtype), dout = rows(scratch.wide_2, s.C, s.dtype);
    parameters(rows(kept.attended, s.C, s.dtype), a, proj);
    product(a, weight(weights.attn_proj_weight, s.C, s.C).t(), 0, dout);
    kernels().attention_backward(dout.data, kept.qkv, kept.attended, kept.lse, segments, scratch.wide_1, scratch.dq,
                                 s.B, s.T, s.H, s.D, options.scale, s.dtype, drop);
    const Matrix dqkv = rows(scratch.wide_1, 3 * s.C, s.dtype);
    parameters(rows(kept.y, s.C, s.dtype), dqkv, attn);
    product(dqkv, weight(weights.c_attn_weight, s.C, 3 * s.C).t(), 0, dout);
  }

  // Of a LayerNorm and the sum before it; dx 0 where it is dresidual.
  void layernorm(addr dy, int64_t dy_dtype, addr dh, addr h, addr weight, addr mean, addr rstd, addr dx, addr dresidual,
                 BlockVectors to, Drop drop) const {
    if (!dx) drop.key = 0;
    const addr of_weight = vectors.sums(to.weight, s.C), of_bias = vectors.sums(to.bias, s.C);
    kernels().add_layernorm_backward(dy, dh, h, weight, mean, rstd, dx, dresidual, scratch.partial, chunks_of(s.N),
                                     of_weight, of_bias, s.N, s.C, s.dtype, s.dtype, dy_dtype, drop);
    vectors.narrow(of_weight, to.weight, s.C);
    vectors.narrow(of_bias, to.bias, s.C);
  }
};

}  // namespace

void block_scratch(BlockSizes sizes, bool backward, bool drops, addr bytes) {
  const Sizes s(sizes);
  Arena arena = backward ? BackwardScratch(s, 0, drops).rest : ForwardScratch(s, 0).rest;
  Products::take(s, backward, arena);
  arena.take(backward ? BackwardScratch::vectors(s) : ForwardScratch::vectors(s));
  *(int64_t*)bytes = (int64_t)arena.at;
}

void block_forward(addr m, addr h, addr segments, BlockWeights w, BlockBiases b, addr m_out, BlockKept memory,
                   addr scratch_, BlockSizes sizes, BlockOptions options, bool save, double ln_1_eps, double ln_2_eps) {
  const Sizes s(sizes);
  const Kept kept(s, memory);
  ForwardScratch scratch(s, scratch_);
  const Products product = Products::take(s, false, scratch.rest);
  const Vectors v{s.dtype, &scratch.rest};
  const auto& k = kernels();
  const int64_t N = s.N, C = s.C, F = s.F, dtype = s.dtype;
  auto rows = [N](addr data, int64_t columns, int64_t of) { return rows_of(data, of, N, columns); };
  auto weight = [&](addr data, int64_t in, int64_t out) {
    return weight_of(data, dtype, in, out, options.transposed);
  };
  Drops drops(options);
  if (!h) drops.first.key = 0;  // the stream is m, and nothing is added to it

  k.add_layernorm_forward(m, h, v.wide(w.ln_1_weight, C), v.wide(b.ln_1_bias, C), kept.y, h ? kept.h_mid : 0,
                          kept.mean_1, kept.rstd_1, N, C, ln_1_eps, dtype, dtype, dtype, drops.first);
  product(rows(kept.y, C, dtype), weight(w.c_attn_weight, C, 3 * C), v.wide(b.c_attn_bias, 3 * C),
          rows(kept.qkv, 3 * C, dtype));
  k.attention_forward(kept.qkv, kept.attended, kept.lse, segments, s.B, s.T, s.H, s.D, options.scale, dtype,
                      drops.attention);
  product(rows(kept.attended, C, dtype), weight(w.attn_proj_weight, C, C), v.wide(b.attn_proj_bias, C),
          rows(scratch.a, C, dtype));
  k.add_layernorm_forward(scratch.a, h ? kept.h_mid : m, v.wide(w.ln_2_weight, C), v.wide(w.ln_2_bias, C), scratch.n,
                          kept.h_out, kept.mean_2, kept.rstd_2, N, C, ln_2_eps, dtype, dtype, s.wide, drops.second);
  const addr fc_bias = v.wide(b.c_fc_bias, F);
  const Matrix n = rows(scratch.n, C, s.wide), fc = weight(w.c_fc_weight, C, F), f = rows(scratch.f, F, dtype);
  if (s.sgemm) {
    product(n, fc, 0, rows(scratch.u, F, F32));
    k.bias_gelu_forward(scratch.u, fc_bias, save ? kept.u : 0, f.data, N, F, F32, dtype, options.erf);
  } else {
    product(n, fc, fc_bias, f, options.erf ? FINISH_ERF_GELU : FINISH_TANH_GELU, save ? kept.u : 0);
  }
  product(f, weight(w.mlp_proj_weight, F, C), v.wide(b.mlp_proj_bias, C), rows(m_out, C, dtype));
}

void block_backward(addr dm_out, addr dh_out, addr segments, BlockWeights w, BlockKept memory, addr dm, addr dh,
                    BlockGradients to, addr scratch_, BlockSizes sizes, BlockOptions options) {
  const Sizes s(sizes);
  const Kept kept(s, memory);
  const Drops drops(options);
  BackwardScratch scratch(s, scratch_, options.dropout.key != 0);
  const Products product = Products::take(s, true, scratch.rest);
  const Vectors vectors{s.dtype, &scratch.rest};
  const Backward backward{s, options, w, kept, scratch, product, vectors};

  const addr ln_2 = vectors.wide(w.ln_2_weight, s.C), da = scratch.da ? scratch.da : dh;
  backward.mlp(dm_out, ln_2, vectors.wide(w.ln_2_bias, s.C), to.dc_fc, to.dmlp_proj);
  // From here on dh holds the gradient of the stream between the halves.
  backward.layernorm(scratch.wide_2, s.wide, dh_out, kept.h_out, ln_2, kept.mean_2, kept.rstd_2, scratch.da, dh,
                     to.dln_2, drops.second);
  backward.attention(da, segments, to.dc_attn, to.dattn_proj, drops.attention);
  backward.layernorm(scratch.wide_2, s.dtype, dh, kept.h_mid, vectors.wide(w.ln_1_weight, s.C), kept.mean_1,
                     kept.rstd_1, dm, dh, to.dln_1, drops.first);
}

}  // namespace GPT2_ISA
}  // namespace gpt2
