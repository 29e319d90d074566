// Picks the widest instruction set that both this build and this processor have.
#include <string.h>
#if defined(GPT2_HAVE_AMX) || defined(GPT2_HAVE_AVXVNNI)
#include <cpuid.h>
#endif
#ifdef GPT2_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace gpt2 {

extern const Kernels kernels_baseline;
#ifdef GPT2_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef GPT2_HAVE_AVXVNNI
extern const Kernels kernels_avxvnni;
#endif
#ifdef GPT2_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef GPT2_HAVE_AVX512VNNI
extern const Kernels kernels_avx512vnni;
#endif
#ifdef GPT2_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif
#ifdef GPT2_HAVE_AMX
extern const Kernels kernels_amx;
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
#ifdef GPT2_HAVE_AVXVNNI
bool has_avxvnni() {
  unsigned eax = 0, ebx, ecx, edx;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif
#ifdef GPT2_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef GPT2_HAVE_AVX512VNNI
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#ifdef GPT2_HAVE_AVX512BF16
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef GPT2_HAVE_AMX
// Linux hands out the tile registers on demand: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA, for the whole process.
bool has_amx() {
  unsigned eax, ebx, ecx, edx = 0;
  const bool has_leaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool has_tiles = has_leaf && (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has_avx512bf16() && has_tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

// Widest first.
const Isa isas[] = {
#ifdef GPT2_HAVE_AMX
    {"amx", &kernels_amx, has_amx},
#endif
#ifdef GPT2_HAVE_AVX512BF16
    {"avx512bf16", &kernels_avx512bf16, has_avx512bf16},
#endif
#ifdef GPT2_HAVE_AVX512VNNI
    {"avx512vnni", &kernels_avx512vnni, has_avx512vnni},
#endif
#ifdef GPT2_HAVE_AVX512
    {"avx512", &kernels_avx512, has_avx512},
#endif
#ifdef GPT2_HAVE_AVXVNNI
    {"avxvnni", &kernels_avxvnni, has_avxvnni},
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
