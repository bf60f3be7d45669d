// Chooses the CPU kernels at run time. Compiled without instruction-set flags, with DRSL_HAVE_AVX2 and
// DRSL_HAVE_AVX512 defined where the build holds those kernels. Relies on the tables of kernels.cpp.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace drsl {

namespace baseline {
extern const Kernels kTable;
}
#if defined(DRSL_HAVE_AVX2)
namespace avx2 {
extern const Kernels kTable;
}
#endif
#if defined(DRSL_HAVE_AVX512)
namespace avx512 {
extern const Kernels kTable;
}
#endif

const Kernels* kernels_for(const char* name) {
#if defined(DRSL_HAVE_AVX512)
  if (!strcmp(name, "avx512")) {
    const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return runs ? &avx512::kTable : nullptr;
  }
#endif
#if defined(DRSL_HAVE_AVX2)
  if (!strcmp(name, "avx2")) {
    // Every processor with AVX2 and FMA converts half precision (F16C) as well.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::kTable : nullptr;
  }
#endif
  return strcmp(name, "baseline") ? nullptr : &baseline::kTable;
}

static const Kernels& choose() {
  static const char* const kBestFirst[] = {"avx512", "avx2", "baseline"};
  const char* wanted = getenv("DRSL_KERNELS_CPU_CAPABILITY");
  if (wanted && *wanted) {
    if (const Kernels* found = kernels_for(wanted)) return *found;
    fprintf(stderr,
            "drsl_kernels: DRSL_KERNELS_CPU_CAPABILITY=%s is not available here (known: avx512, avx2, baseline); "
            "choosing by processor\n",
            wanted);
  }
  for (const char* name : kBestFirst) {
    if (const Kernels* found = kernels_for(name)) return *found;
  }
  return baseline::kTable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace drsl
