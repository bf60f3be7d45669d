// A description of one call's work, for the kernels of every device. Plain C++, no torch; compute.cpp fills it in.
#pragma once

#include <stdint.h>

#include "row_loss.h"

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

// What a run of the loss alone can leave for the gradient, so that one pass over the logits writes it: the numbers of
// SavedBlock (csrc/cpu/call.h) for an upstream gradient of 1, field by field: acc (fields, rows). Where the gradient is
// r_k (a + b r_k) the first few are enough.
constexpr int64_t kSavedFields = 8, kFewSavedFields = 4;

// Numbers of a row's statistics in memory, where they are merged with those of other classes: RowStats, U, and U times
// M - nu.
constexpr int64_t kRowStats = 8;

// One call. "acc" below is double for float64 logits, else float. Pointers marked "may be null" are optional.
struct Task {
  DType dtype;
  Truth truth;
  Distance distance;
  Activation activation;
  double q, threshold, scale, margin, smoothing;
  int64_t rows, classes, ignore_index;
  RowLayout layout;

  const void* logits;
  const int64_t* labels;       // (rows,), each in [0, classes) or ignore_index: see scan_labels
  const void* class_weights;   // acc (classes,), may be null: all 1
  bool soft;                   // class_weights is (rows, classes): class probabilities, each times its class weight
  const void* class_margins;   // acc (classes,), may be null: margin for all
  double tau;                  // used where tau_rows is null
  const void* tau_rows;        // acc, may be null: tau of row i at tau_rows[i * tau_stride]
  int64_t tau_stride;          // 0 or 1; on the CPU always 1
  double grad_scale;           // multiplies every row's gradient: 1 / denominator of the mean
  const void* upstream;        // acc, may be null: upstream gradient of row i at upstream[i * upstream_stride]
  int64_t upstream_stride;     // 0 or 1

  // Outputs. Of the loss itself the caller gets the sum over rows back from `run`.
  void* grad;                  // dtype, in `layout`, may be null: then one pass over the logits suffices
  void* loss;                  // acc (rows,), may be null
  void* cross_entropy;         // acc (rows,), may be null
  void* distance_out;          // acc (rows,), may be null
  void* margin_out;            // acc (rows,), may be null
  void* tau_grad;              // acc (rows,), may be null: the derivative of the row's loss by tau

  // On the CPU: written, or with `from_saved` read by a run that writes the gradient and nothing else. May be null.
  void* saved;
  bool from_saved;

  // Where the logits are only some of the classes: acc (rows,), the logits of the labels, which may lie elsewhere, and acc
  // (rows, stats_parts, kRowStats), the statistics of parts of the rest, to be merged. A label outside [0, classes) is none
  // of these classes. May be null; there are no class weights or class margins then.
  const void* label_logits;
  const void* stats;
  int64_t stats_parts;
};

inline int64_t saved_fields(const Task& t) {
  return t.soft || t.smoothing > 0 || needs_moments(t.distance) ? kSavedFields : kFewSavedFields;
}

}  // namespace drsl
