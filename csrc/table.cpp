// The table of one instruction set's kernels. A set that only some sources are built for (setup.py: PARTIAL) names
// those sources' kernels in GPT2_OWN_KERNELS; the others are found, by name, in the set it is based on, and that one's
// in the one before (GPT2_ROOT_ISA, which has them all).
#include "kernels.h"

#define GPT2_JOIN(a, b) a##b
#define GPT2_NAME(a, b) GPT2_JOIN(a, b)

namespace gpt2 {
#ifdef GPT2_OWN_KERNELS
namespace GPT2_ROOT_ISA {
GPT2_KERNEL_LIST(GPT2_DECLARE)
}
#ifdef GPT2_BASE_KERNELS
namespace GPT2_BASE_ISA {
using namespace GPT2_ROOT_ISA;
GPT2_BASE_KERNELS(GPT2_DECLARE)
}  // namespace GPT2_BASE_ISA
#endif
namespace GPT2_ISA {
using namespace GPT2_BASE_ISA;
GPT2_OWN_KERNELS(GPT2_DECLARE)
}  // namespace GPT2_ISA
#else
namespace GPT2_ISA {
GPT2_KERNEL_LIST(GPT2_DECLARE)
}
#endif

extern const Kernels GPT2_NAME(kernels_, GPT2_ISA);
const Kernels GPT2_NAME(kernels_, GPT2_ISA) = {
#define GPT2_ENTRY(name, params) &GPT2_ISA::name,
    GPT2_KERNEL_LIST(GPT2_ENTRY)
#undef GPT2_ENTRY
};
}  // namespace gpt2
