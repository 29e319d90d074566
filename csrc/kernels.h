// Every kernel of the extension: name and parameters, one entry each. bindings.cpp exposes the whole list to
// Python and table.cpp fills one table of function pointers per instruction set, so a new kernel is an entry
// here and its source. Python hands arguments over by these names, and the types are held at the call:
// f32, f64, i32, i64, i8, u8: a contiguous tensor of that dtype; addr: a contiguous tensor of any; strided: a tensor of
// any dtype and strides. All of them are on the CPU, and 0 where Python has None. X_dtype is the code (isa.h) of
// tensor X's. A struct of GPT2_GROUP_LIST stands for its members: with a name, Drop dropout, for dropout_key and so on;
// without one, BlockSizes, for B and so on, by their own names.
#pragma once

#include <stdint.h>

namespace gpt2 {
using addr = uintptr_t;
using strided = addr;
using f32 = addr;
using f64 = addr;
using i32 = addr;
using i64 = addr;
using i8 = addr;
using u8 = addr;

// The members of a struct that Python fills in stand once, in a list; each takes 8 bytes, or is such a struct.
#define GPT2_MEMBER(type, name) \
  type name; \
  static_assert(sizeof(type) % 8 == 0, #name " must take 8 bytes");
#define GPT2_STRUCT(name, MEMBERS) \
  struct name { \
    MEMBERS(GPT2_MEMBER) \
  };

// What is dropped at one site: see gpt2_fast/ops/runtime/philox.py. key: of one int64, 0 where nothing is dropped.
#define GPT2_DROP(M) M(i64, key) M(int64_t, threshold) M(double, scale) M(int64_t, site)
GPT2_STRUCT(Drop, GPT2_DROP)
}  // namespace gpt2

// The structs that parameters may be.
#define GPT2_GROUP_LIST(GROUP) \
  GROUP(Drop, GPT2_DROP) \
  GPT2_BLOCK_GROUPS(GROUP)

#define GPT2_KERNEL_LIST(KERNEL) \
  GPT2_EMBEDDING_KERNELS(KERNEL) \
  GPT2_ADD_LAYERNORM_KERNELS(KERNEL) \
  GPT2_MLP_KERNELS(KERNEL) \
  GPT2_ATTENTION_KERNELS(KERNEL) \
  GPT2_ATTENTION_DECODE_KERNELS(KERNEL) \
  GPT2_DECODE_STEP_KERNELS(KERNEL) \
  GPT2_DECODE_PACK_KERNELS(KERNEL) \
  GPT2_LINEAR_KERNELS(KERNEL) \
  GPT2_LINEAR_CROSS_ENTROPY_KERNELS(KERNEL) \
  GPT2_ADAMW_KERNELS(KERNEL) \
  GPT2_DRAW_KERNELS(KERNEL) \
  GPT2_DECODE_TOKENS_KERNELS(KERNEL) \
  GPT2_BLOCK_KERNELS(KERNEL)

#include "embedding.h"
#include "add_layernorm.h"
#include "mlp.h"
#include "attention.h"
#include "attention_decode.h"
#include "decode_step.h"
#include "decode_pack.h"
#include "linear.h"
#include "linear_cross_entropy.h"
#include "adamw.h"
#include "draw.h"
#include "decode_tokens.h"
#include "block.h"

namespace gpt2 {
// A kernel as a declaration, in the namespace of an instruction set.
#define GPT2_DECLARE(name, params) void name params;

struct Kernels {
#define GPT2_SLOT(name, params) void(*name) params;
  GPT2_KERNEL_LIST(GPT2_SLOT)
#undef GPT2_SLOT
};

// The table of the instruction set in use, and its name.
const Kernels& kernels();
const char* isa_name();
// Chooses by name ("baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"); false when this
// processor or build does not have it.
bool set_isa(const char* name);
}  // namespace gpt2
