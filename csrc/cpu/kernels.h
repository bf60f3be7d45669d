// What the rest of the project sees of the CPU kernels: a description of the work, and a table of functions for
// the instruction set chosen at run time. Plain C++, no torch; ops.cpp fills in a Task and calls `run`.
#pragma once

#include <stdint.h>

#include "../row_loss.h"

namespace drsl {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Where the rows lie. Row i has the indices of i in a row-major array of shape sizes[0..dims), and starts at the
// dot product of these indices with the strides (in elements). Classes of a row are class_stride apart.
struct RowLayout {
  int dims;
  const int64_t* sizes;
  const int64_t* logits_strides;
  const int64_t* grad_strides;
  int64_t logits_class_stride, grad_class_stride;
};

// One call. "acc" below is double for float64 logits, else float. Pointers marked "may be null" are optional.
struct Task {
  DType dtype;
  Truth truth;
  Distance distance;
  double q, scale, margin, smoothing;
  int64_t rows, classes, ignore_index;
  RowLayout layout;

  const void* logits;
  const int64_t* labels;       // (rows,), each in [0, classes) or ignore_index: see scan_labels
  const void* class_weights;   // acc (classes,), may be null: all 1
  double tau;                  // used where tau_rows is null
  const void* tau_rows;        // acc (rows,), may be null
  double grad_scale;           // multiplies every row's gradient: 1 / denominator of the mean
  const void* upstream;        // acc, may be null: upstream gradient of row i at upstream[i * upstream_stride]
  int64_t upstream_stride;     // 0 or 1

  // Outputs. Of the loss itself the caller gets the sum over rows back from `run`.
  void* grad;                  // dtype, in `layout`, may be null: then one pass over the logits suffices
  void* loss;                  // acc (rows,), may be null
  void* cross_entropy;         // acc (rows,), may be null
  void* distance_out;          // acc (rows,), may be null
  void* margin_out;            // acc (rows,), may be null
  void* tau_grad;              // acc (rows,), may be null: u_y D, the derivative of the row's loss by tau
};

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
  LabelScan (*scan_labels)(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index);
};

// The kernels for the best instruction set that this machine has and this build holds, or for the lesser one
// named in the environment variable DRSL_KERNELS_CPU_CAPABILITY (baseline, avx2, avx512).
const Kernels& kernels();

// Kernels of a given instruction set; null if this build or this machine lacks it. For tests.
const Kernels* kernels_for(const char* name);

}  // namespace drsl
