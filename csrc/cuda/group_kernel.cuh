// Rows with few classes: a group of neighbouring lanes holds a whole row in registers, so the logits are read once and
// the gradient is written once. Relies on row.cuh; run.cuh launches it in one of the shapes of plan.h.
#pragma once

#include "plan.h"
#include "row.cuh"

namespace drsl {
namespace cuda {

// Where the E classes of a lane lie in a row of at most L * E classes: pack by pack, the packs of the L lanes side by
// side, or (where rows are not whole packs) class by class, the classes of the L lanes side by side.
template <class D, int L, int E>
struct LaneClasses {
  static constexpr int kWidth = E < kPackWidth<D> ? E : kPackWidth<D>;
  static constexpr int kPacks = E / kWidth;
  int first, step;

  DRSL_DEVICE LaneClasses(int lane, bool packs) : first(packs ? lane * kWidth : lane), step(packs ? 1 : L) {}
  DRSL_DEVICE int at(int pack, int i) const { return first + pack * (L * kWidth) + i * step; }
};

// The logits of this lane, -inf beyond the row and for a row that is not read.
template <class D, int L, int E, class S = Accumulator<D>>
DRSL_DEVICE void load_row(const Call<D>& call, const LaneClasses<D, L, E>& lane, const D* row, bool reads, S (&z)[E]) {
  constexpr int W = LaneClasses<D, L, E>::kWidth;
  DRSL_UNROLL
  for (int pack = 0; pack < lane.kPacks; ++pack) {
    DRSL_UNROLL
    for (int i = 0; i < W; ++i) z[pack * W + i] = -infinity<S>();
    if (call.packs) {
      const int k = lane.at(pack, 0);
      if (reads && k < call.classes) Pack<D, W>::load(row + k).widened(z + pack * W);
    } else {
      DRSL_UNROLL
      for (int i = 0; i < W; ++i) {
        const int k = lane.at(pack, i);
        if (reads && k < call.classes) z[pack * W + i] = load_one(row + k * call.strides.logits_class);
      }
    }
  }
}

// Statistics of the rest from the logits of all lanes of the group. Unless kMoments needs the logits again, `z` holds
// their exponentials afterwards.
template <class Terms, class D, int L, int E, class S = Accumulator<D>>
DRSL_DEVICE Part<S> group_stats(const Call<D>& call, const LaneClasses<D, L, E>& lane, int label,
                                const S* class_weights, S (&z)[E]) {
  constexpr int W = LaneClasses<D, L, E>::kWidth;
  const S lowest = -infinity<S>();
  const S share = S(1) / S(call.classes > 2 ? call.classes - 1 : 1);
  transform<Terms>(z);
  S max = lowest, count = 0, mean = 0;  // a sum of shares z_k / n cannot overflow
  DRSL_UNROLL
  for (int i = 0; i < E; ++i) {
    if (lane.at(i / W, i % W) == label) z[i] = lowest;
    max = max_(max, z[i]);
    if constexpr (Terms::kSquares) count += z[i] == lowest ? S(0) : S(1);
    if constexpr (Terms::kMoments) mean += z[i] == lowest ? S(0) : z[i] * share;
  }
  max = group_max<L>(max);
  if constexpr (Terms::kSquares) count = group_sum<L>(count);
  if constexpr (Terms::kMoments) mean = group_sum<L>(mean) / (share * (count > S(1) ? count : S(1)));

  const S shift = max == lowest ? S(0) : max;
  S sum = 0, sum2 = 0, steps = 0, squares = 0, weight = 0, weighted_depth = 0;
  DRSL_UNROLL
  for (int i = 0; i < E; ++i) {
    const S e = row_exp(z[i] - shift);
    sum += e;
    if constexpr (Terms::kSquares) sum2 += e * e;
    if constexpr (Terms::kMoments) {
      const bool present = z[i] != lowest;
      const S step = present ? z[i] - mean : S(0);
      steps += step;
      squares += step * step;
      if constexpr (Terms::kWeightedMean) {
        const int k = lane.at(i / W, i % W);
        const bool weighs = present || (call.params.soft && k != label && k < call.classes);
        const S u = weighs ? class_weights[k] : S(0);
        weight += u;
        weighted_depth += present ? u * (max - z[i]) : masked_depth(u, call.params.soft);
      }
    } else {
      z[i] = e;
    }
  }
  Part<S> part = empty_part<S>();
  part.stats.max = max;
  part.stats.count = count;
  part.stats.sum_exp = group_sum<L>(sum);
  if constexpr (Terms::kSquares) part.stats.sum_exp2 = group_sum<L>(sum2);
  if constexpr (Terms::kMoments) {
    // The sum of the deviations from a rounded mean corrects the rounding.
    const S deviations = group_sum<L>(steps), mean_of_them = deviations / (count > S(1) ? count : S(1));
    const S drift = abs_(deviations) < infinity<S>() ? mean_of_them : S(0);  // it may overflow
    part.stats.depth = count == S(0) ? S(0) : (max - mean) - drift;
    const S spread = group_sum<L>(squares);
    part.stats.variance = spread == infinity<S>() ? spread : spread - deviations * drift;
  }
  if constexpr (Terms::kWeightedMean) {
    part.weight = group_sum<L>(weight);
    part.weighted_depth = group_sum<L>(weighted_depth);
  }
  return part;
}

template <class Terms, class D, int L, int E, class S = Accumulator<D>>
DRSL_DEVICE void store_gradient(const Call<D>& call, const LaneClasses<D, L, E>& lane, int label,
                                const RowGrad<S>& coefficients, const S* class_weights, const S (&z)[E], D* row) {
  constexpr int W = LaneClasses<D, L, E>::kWidth;
  DRSL_UNROLL
  for (int pack = 0; pack < lane.kPacks; ++pack) {
    S g[W];
    DRSL_UNROLL
    for (int i = 0; i < W; ++i) {
      const S x = z[pack * W + i], e = Terms::kMoments ? row_exp(x - coefficients.shift) : x;
      const int k = lane.at(pack, i);
      S u = 0;
      if constexpr (Terms::kWeightedMean) u = k < call.classes ? class_weights[k] : S(0);
      const S others = gradient<Terms>(coefficients, x, e, u, call.params.soft) * slope_at<Terms>(x);
      g[i] = k == label ? coefficients.label : others;
    }
    if (call.packs) {
      const int k = lane.at(pack, 0);
      if (k < call.classes) Pack<D, W>::narrowed(g).store(row + k);
    } else {
      DRSL_UNROLL
      for (int i = 0; i < W; ++i) {
        const int k = lane.at(pack, i);
        if (k < call.classes) store_one(row + k * call.strides.grad_class, g[i]);
      }
    }
  }
}

template <class D, class Terms, int L, int E>
__global__ void __launch_bounds__(group_threads(sizeof(Accumulator<D>), E, Terms::kMoments, Terms::kWeightedMean), 1)
    group_kernel(const __grid_constant__ Call<D> call) {
  using S = Accumulator<D>;
  if (call.nothing_to_do()) return;
  const S scale = S(1 / batch_denominator(call));
  const int lane_number = int(threadIdx.x) % L;
  const LaneClasses<D, L, E> lane(lane_number, call.packs);
  const int64_t block_rows = blockDim.x / L;
  double loss_sum = 0;
  // All threads stay until the last row of the block: their shuffles wait for each other.
  for (int64_t first = blockIdx.x * block_rows; first < call.rows; first += gridDim.x * block_rows) {
    const int64_t row = first + threadIdx.x / L;
    const bool exists = row < call.rows;
    const RowLabel y = exists ? call.label(row) : RowLabel{-1, false, false};
    const RowOffsets at = row_offsets(call.strides, exists ? row : 0);
    const D* const logits = call.logits + at.logits;
    S z[E];
    load_row<D, L, E>(call, lane, logits, y.counts, z);
    const S label_logit =
        y.number >= 0 ? transformed<Terms>(load_one(logits + y.number * call.strides.logits_class)) : S(NAN);
    const S* const class_weights = call.weights_of_row(exists ? row : 0);
    const Part<S> rest = group_stats<Terms, D, L, E>(call, lane, y.number, class_weights, z);
    if (!exists) continue;
    const RowGrad<S> coefficients =
        finish_row<Terms>(call, row, y, label_logit, rest, scale, lane_number == 0, loss_sum);
    if (call.grad) {
      store_gradient<Terms, D, L, E>(call, lane, y.number, coefficients, class_weights, z, call.grad + at.grad);
    }
  }
  reduce_loss(call, loss_sum);
}

}  // namespace cuda
}  // namespace drsl
