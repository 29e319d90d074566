// Picks the widest instruction set that both this build and this processor have.
#include <string.h>

#include "kernels.h"

namespace gpt2 {

extern const Kernels kernels_baseline;
#ifdef GPT2_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef GPT2_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef GPT2_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool (*supported)();
};

#ifdef GPT2_HAVE_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif
#ifdef GPT2_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef GPT2_HAVE_AVX512BF16
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

// Widest first.
const Isa isas[] = {
#ifdef GPT2_HAVE_AVX512BF16
    {"avx512bf16", &kernels_avx512bf16, has_avx512bf16},
#endif
#ifdef GPT2_HAVE_AVX512
    {"avx512", &kernels_avx512, has_avx512},
#endif
#ifdef GPT2_HAVE_AVX2
    {"avx2", &kernels_avx2, has_avx2},
#endif
    {"baseline", &kernels_baseline, [] { return true; }},
};

const Isa* widest() {
  for (const Isa& isa : isas)
    if (isa.supported()) return &isa;
  return nullptr;
}

const Isa*& active() {
  static const Isa* isa = widest();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *active()->table; }
const char* isa_name() { return active()->name; }

bool set_isa(const char* name) {
  for (const Isa& isa : isas) {
    if (strcmp(isa.name, name) == 0 && isa.supported()) {
      active() = &isa;
      return true;
    }
  }
  return false;
}

}  // namespace gpt2
