// What the rest of the project sees of the CPU kernels: a table of functions for the instruction set chosen at run
// time. Plain C++, no torch; compute.cpp fills in a Task, on_cpu.cpp calls `run`.
#pragma once

#include <stdint.h>

#include "../task.h"

namespace drsl {

struct LabelScan {
  int64_t counted;    // labels that are not ignore_index
  bool out_of_range;  // some label is neither ignore_index nor in [0, classes)
};

struct Kernels {
  const char* name;
  // Bytes of scratch that `run` needs, 64-byte aligned.
  int64_t (*scratch_bytes)(const Task&);
  // Process rows [begin, end); returns the sum of their losses. Different ranges may run on different threads.
  double (*run)(const Task&, int64_t begin, int64_t end, void* scratch);
  // Write statistics of rows [begin, end), acc (rows, kRowStats), for Task::stats; the scratch is that of `run` without a
  // gradient. Classes are adjacent, and the activation is softmax.
  void (*row_stats)(const Task&, int64_t begin, int64_t end, void* scratch, void* out);
  LabelScan (*scan_labels)(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index);
};

// The kernels for the best instruction set that this machine has and this build holds, or for the lesser one
// named in the environment variable DRSL_KERNELS_CPU_CAPABILITY (baseline, avx2, avx512).
const Kernels& kernels();

// Kernels of a given instruction set; null if this build or this machine lacks it. For tests.
const Kernels* kernels_for(const char* name);

}  // namespace drsl
