// What every kernel is given: a DeviceTask with its types resolved, by value, and where row, label, weight and strength
// of a row are found in it. Relies on memory.cuh and launch.h; run.cuh fills it in.
#pragma once

#include "launch.h"
#include "memory.cuh"

namespace drsl {
namespace cuda {

// Which terms a call needs; each combination is compiled by itself.
template <bool kSquaresNeeded, bool kMomentsNeeded, bool kWeightedMeanNeeded, bool kIsTransformed = false>
struct TermSet {
  static constexpr bool kSquares = kSquaresNeeded;  // A2, n, and the coefficient b
  static constexpr bool kMoments = kMomentsNeeded;  // h and V, and the coefficients c and d
  static constexpr bool kWeightedMean = kWeightedMeanNeeded;  // nu and U: smoothing with class weights
  static constexpr bool kTransformed = kIsTransformed;  // another activation than softmax
};

constexpr int kMaxRowDims = 4;

// RowLayout without pointers to the host.
struct Strides {
  int dims;
  int64_t sizes[kMaxRowDims], logits[kMaxRowDims], grad[kMaxRowDims];
  int64_t logits_class, grad_class;
};

struct RowOffsets {
  int64_t logits, grad;  // in elements
};

DRSL_DEVICE RowOffsets row_offsets(const Strides& strides, int64_t row) {
  if (strides.dims == 1) return {row * strides.logits[0], row * strides.grad[0]};
  RowOffsets at{0, 0};
  for (int d = strides.dims - 1; d >= 0; --d) {
    const int64_t rest = row / strides.sizes[d], index = row - rest * strides.sizes[d];
    at.logits += index * strides.logits[d];
    at.grad += index * strides.grad[d];
    row = rest;
  }
  return at;
}

// How a row takes part. An ignored one gives zeros, one with a wrong label NaN.
struct RowLabel {
  int number;  // the class, or -1: no class of this row is a label
  bool counts, wrong;
};

template <class D>
struct Call {
  using S = Accumulator<D>;

  LossParams<S> params;
  int64_t rows, ignore_index;
  int classes;
  Strides strides;

  const D* logits;
  const int64_t* labels;
  const S* label_logits;  // null: among the logits
  const S *class_weights, *class_margins;
  S label_margin;  // m where class_margins is null
  S tau;
  const S* tau_rows;
  int64_t tau_stride;
  const S* upstream;
  int64_t upstream_stride;
  bool skip_unit_upstream;

  D* grad;
  S *loss, *cross_entropy, *distance, *margin, *tau_grad, *stats, *reduced_loss;

  bool mean, denominator_known;
  double* denominator;

  // Between the kernels of a run.
  const double* weight_sums;  // partial sums of the denominator; null: every block finds them from the labels
  int weight_sum_count;
  double* loss_sums;  // one per block
  S* parts;  // statistics of the slices of each row, kSavedStats numbers each
  int parts_per_row;  // how many there are
  int slices, slice_classes;  // how many blocks share a row, and how many classes each of them has, but for the last

  bool packs;  // group kernel: every row starts at a whole pack and ends with one
  int cached_packs;  // block kernel: how much of a row its shared memory holds

  DRSL_DEVICE bool nothing_to_do() const { return skip_unit_upstream && *upstream == S(1); }

  DRSL_DEVICE RowLabel label(int64_t row) const {
    const int64_t y = labels[row];
    const bool counts = y != ignore_index, here = uint64_t(y) < uint64_t(classes);
    return {counts && here ? int(y) : -1, counts, counts && !here && !label_logits};
  }

  // The weights u_k of the classes of a row.
  DRSL_DEVICE const S* weights_of_row(int64_t row) const {
    return class_weights + (params.soft ? row * classes : int64_t(0));
  }

  // u_y; a wrong label counts like one of weight 1.
  DRSL_DEVICE S weight(int64_t row, const RowLabel& y) const {
    return class_weights && y.number >= 0 ? weights_of_row(row)[y.number] : S(1);
  }

  // m of a row; that of one without a class does not matter.
  DRSL_DEVICE S margin_of(const RowLabel& y) const {
    return class_margins && y.number >= 0 ? class_margins[y.number] : label_margin;
  }

  // What a row counts for in the mean.
  DRSL_DEVICE S share_of_mean(int64_t row, const RowLabel& y) const { return params.soft ? S(1) : weight(row, y); }

  DRSL_DEVICE S strength(int64_t row) const { return tau_rows ? tau_rows[row * tau_stride] : tau; }

  DRSL_DEVICE S upstream_of(int64_t row) const { return upstream ? upstream[row * upstream_stride] : S(1); }
};

}  // namespace cuda
}  // namespace drsl
