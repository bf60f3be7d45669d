// Runs the tests of one instruction set (test_simd.cpp) where the processor has it; 77 tells CTest "skipped".
// Compiled without that set's flags, so that nothing here needs them.
#include <stdio.h>

#include "cpu/kernels.h"

int run_simd_tests();

int main() {
  if (drsl::kernels_for(DRSL_TESTED_ISA)) return run_simd_tests();
  printf("skipped: this processor lacks %s\n", DRSL_TESTED_ISA);
  return 77;
}
