// The table of one instruction set's kernels.
#include "kernels.h"

#define GPT2_JOIN(a, b) a##b
#define GPT2_NAME(a, b) GPT2_JOIN(a, b)

namespace gpt2 {
namespace GPT2_ISA {
#define GPT2_DECLARE(name, params) void name params;
GPT2_KERNEL_LIST(GPT2_DECLARE)
#undef GPT2_DECLARE
}  // namespace GPT2_ISA

extern const Kernels GPT2_NAME(kernels_, GPT2_ISA);
const Kernels GPT2_NAME(kernels_, GPT2_ISA) = {
#define GPT2_ENTRY(name, params) &GPT2_ISA::name,
    GPT2_KERNEL_LIST(GPT2_ENTRY)
#undef GPT2_ENTRY
};
}  // namespace gpt2
