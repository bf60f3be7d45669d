// Rows with many adjacent classes: a few rows at a time, each swept in vectors along its classes. Pass 1 finds
// maximum and mean of the rest, pass 2 sums the exponentials and keeps them in scratch, pass 3 turns them into
// the gradient. The row stays in the cache between passes, so the logits are read once from memory and the
// gradient is written once. Relies on call.h; kernels.cpp relies on it.
#pragma once

#include "call.h"

namespace drsl {
inline namespace DRSL_ISA {

template <int I>
struct Slot {
  static constexpr int kIndex = I;
};
constexpr int kSlots = 4;  // independent accumulators, to cover the latency of an addition

// Rows whose exponentials fit this many elements of scratch are finished together.
constexpr int64_t kBlockElements = 4096;

template <class S>
DRSL_FN int64_t padded(int64_t classes) {
  return (classes + Vec<S>::kLanes - 1) / Vec<S>::kLanes * Vec<S>::kLanes;
}

template <class S>
DRSL_FN int64_t block_rows(int64_t classes) {
  const int64_t fit = kBlockElements / padded<S>(classes);
  return fit < 1 ? 1 : fit > Vec<S>::kLanes ? Vec<S>::kLanes : fit;
}

template <class S, class Full>
DRSL_FN void sweep_whole(int64_t k, int64_t end, Full full) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  for (; k + kSlots * kLanes <= end; k += kSlots * kLanes) {
    full(k, Slot<0>());
    full(k + kLanes, Slot<1>());
    full(k + 2 * kLanes, Slot<2>());
    full(k + 3 * kLanes, Slot<3>());
  }
  for (; k < end; k += kLanes) full(k, Slot<0>());
}

// Visit the classes of a row in vectors: full(k, slot) where all kLanes classes from k on are in the row and
// none is the label, edge(k, n, keep) for the others: n classes from k on, of which those in `keep` are not the
// label.
template <class S, class Full, class Edge>
DRSL_FN void sweep_rest(int64_t classes, int64_t label, Full full, Edge edge) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const int64_t whole = classes / kLanes * kLanes;
  const int64_t block = label / kLanes * kLanes;
  sweep_whole<S>(0, block, full);
  const int64_t in_block = block < whole ? kLanes : classes - block;
  edge(block, in_block, Mask<S>{lane_below<S>(in_block).v & ~lane_is<S>(label - block).v});
  sweep_whole<S>(block + kLanes, whole, full);
  if (whole < classes && whole != block) edge(whole, classes - whole, lane_below<S>(classes - whole));
}

template <class S>
DRSL_FN Vec<S> fold(const Vec<S> (&x)[kSlots]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// M, a rounded mu, and n of the rest. The mean is a sum of shares z_k / n, which cannot overflow.
template <class S>
struct RowTop {
  S max, mean, count;
};

template <class D, class S = Accumulator<D>>
DRSL_PASS RowTop<S> top_of_masked_row(const D* z, int64_t classes, int64_t label, Vec<S> share) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), one(S(1));
  Vec<S> max = lowest, mean = zero, count = zero;
  const auto take = [&](Vec<S> v) {
    const Mask<S> present = v != lowest;
    max = max_(max, v);
    mean = mean + select(present, v, zero) * share;
    count = count + select(present, one, zero);
  };
  sweep_rest<S>(
      classes, label, [&](int64_t k, auto) { take(load(z + k)); },
      [&](int64_t k, int64_t n, Mask<S> keep) { take(select(keep, load_first(z + k, n), lowest)); });
  const S present = reduce_add(count);
  return {reduce_max(max), reduce_add(mean) * (S(classes - 1) / (present > S(1) ? present : S(1))), present};
}

template <class D, class S = Accumulator<D>>
DRSL_PASS RowTop<S> top_of_row(const D* z, int64_t classes, int64_t label) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  const Vec<S> share(S(1) / S(classes > 2 ? classes - 1 : 1));
  Vec<S> max[kSlots] = {lowest, lowest, lowest, lowest}, mean[kSlots] = {zero, zero, zero, zero};
  sweep_rest<S>(
      classes, label,
      [&](int64_t k, auto slot) {
        constexpr int i = decltype(slot)::kIndex;
        const Vec<S> v = load(z + k);
        max[i] = max_(max[i], v);
        mean[i] = mean[i] + v * share;
      },
      [&](int64_t k, int64_t n, Mask<S> keep) {
        const Vec<S> v = load_first(z + k, n);
        max[0] = max_(max[0], select(keep, v, lowest));
        mean[0] = mean[0] + select(keep, v, zero) * share;
      });
  const S total = reduce_add(fold(mean));
  if (!(total > -S(INFINITY))) return top_of_masked_row(z, classes, label, share);  // a class at -inf, or NaN
  return {reduce_max(max_(max_(max[0], max[1]), max_(max[2], max[3]))), total, S(classes - 1)};
}

// A1, A2, and the sums of z_k - mean and of its square. With kKeep the exponentials stay in `exps`; the label's is 0.
template <class Terms, bool kKeep, class D, class S = Accumulator<D>>
DRSL_PASS void sums_of_row(const D* z, int64_t classes, int64_t label, const RowTop<S>& top, S* exps, S (&sums)[4]) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  const Vec<S> shift(top.max == -S(INFINITY) ? S(0) : top.max), mean(top.mean);
  Vec<S> first[kSlots] = {zero, zero, zero, zero}, second[kSlots] = {zero, zero, zero, zero},
         steps[kSlots] = {zero, zero, zero, zero}, squares[kSlots] = {zero, zero, zero, zero};
  const auto take = [&](int64_t k, Vec<S> v, auto slot) {
    constexpr int i = decltype(slot)::kIndex;
    const Vec<S> e = exp_(v - shift);
    first[i] = first[i] + e;
    if constexpr (Terms::kSquares) second[i] = second[i] + e * e;
    if constexpr (Terms::kMoments) {
      const Vec<S> step = select(v != lowest, v - mean, zero);
      steps[i] = steps[i] + step;
      squares[i] = squares[i] + step * step;
    }
    if constexpr (kKeep) store(exps + k, e);
  };
  sweep_rest<S>(
      classes, label, [&](int64_t k, auto slot) { take(k, load(z + k), slot); },
      [&](int64_t k, int64_t n, Mask<S> keep) { take(k, select(keep, load_first(z + k, n), lowest), Slot<0>()); });
  sums[0] = reduce_add(fold(first));
  if constexpr (Terms::kSquares) sums[1] = reduce_add(fold(second));
  if constexpr (Terms::kMoments) {
    sums[2] = reduce_add(fold(steps));
    sums[3] = reduce_add(fold(squares));
  }
}

// U = sum_R u_k and U (M - nu) = sum_R u_k (M - z_k).
template <class D, class S = Accumulator<D>>
DRSL_PASS void weighted_sums_of_row(const D* z, const S* u, int64_t classes, int64_t label, S max, bool soft,
                                    S (&sums)[2]) {
  const Vec<S> zero(S(0)), top(max);
  Vec<S> weight = zero, depth = zero;
  const auto take = [&](Vec<S> v, Vec<S> share) {
    const WeightedShare<S> adds = weighted_share(share, v, top, soft);
    weight = weight + adds.weight;
    depth = depth + adds.depth;
  };
  sweep_rest<S>(
      classes, label, [&](int64_t k, auto) { take(load(z + k), load(u + k)); },
      [&](int64_t k, int64_t n, Mask<S> keep) {
        take(select(keep, load_first(z + k, n), -infinity<Vec<S>>()), select(keep, load_first(u + k, n), zero));
      });
  sums[0] = reduce_add(weight);
  sums[1] = reduce_add(depth);
}

template <class Terms, class D, class S = Accumulator<D>>
DRSL_PASS void write_gradient(const D* z, const S* u, D* grad, int64_t classes, int64_t label, const S* exps,
                              const BlockGrad<S>& block, int lane) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const Vec<S> a(block.a.v[lane]), b(block.b.v[lane]), c(block.c.v[lane]);
  const Vec<S> offset(block.offset.v[lane]), max(block.max.v[lane]), smooth(block.smooth.v[lane]);
  const auto gradient = [&](Vec<S> e, Vec<S> v, Vec<S> weight) {
    Vec<S> g = e * a;
    if constexpr (Terms::kSquares) g = e * (a + b * e);
    if constexpr (Terms::kMoments) {
      Vec<S> step = c * (v - max) + offset;
      if constexpr (Terms::kWeightedMean) step = step - smooth * weight;
      g = g + select(v != -infinity<Vec<S>>(), step, Vec<S>(S(0)));
    }
    return g;
  };
  const int64_t whole = classes / kLanes * kLanes;
  sweep_whole<S>(0, whole, [&](int64_t k, auto) {
    const Vec<S> e = load(exps + k);
    if constexpr (Terms::kWeightedMean) store(grad + k, gradient(e, load(z + k), load(u + k)));
    else if constexpr (Terms::kMoments) store(grad + k, gradient(e, load(z + k), e));
    else store(grad + k, gradient(e, e, e));
  });
  if (const int64_t n = classes - whole; n > 0) {
    const Vec<S> e = load_first(exps + whole, n), v = load_first(z + whole, n);
    Vec<S> weight = e;
    if constexpr (Terms::kWeightedMean) weight = load_first(u + whole, n);
    store_first(grad + whole, gradient(e, v, weight), n);
  }
  store_one(grad + label, block.label.v[lane]);
}

// Rows first .. first + n - 1, n <= block_rows.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_FN void row_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  int64_t offsets[kLanes], grad_offsets[kLanes];
  row_offsets(t.layout, first, n, offsets, grad_offsets);

  S max[kLanes] = {}, mean[kLanes] = {}, count[kLanes] = {}, label_logit[kLanes] = {};
  S sum_exp[kLanes] = {}, sum_exp2[kLanes] = {}, steps[kLanes] = {}, squares[kLanes] = {};
  S weight[kLanes] = {}, weighted_depth[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    if (call.ignored(first + i)) continue;
    const D* z = call.logits + offsets[i];
    const int64_t label = t.labels[first + i];
    const RowTop<S> top = top_of_row(z, t.classes, label);
    S sums[4] = {};
    sums_of_row<Terms, kGrad>(z, t.classes, label, top, scratch + i * padded<S>(t.classes), sums);
    max[i] = top.max;
    mean[i] = top.mean;
    count[i] = top.count;
    label_logit[i] = load_one(z + label);
    sum_exp[i] = sums[0];
    sum_exp2[i] = sums[1];
    steps[i] = sums[2];
    squares[i] = sums[3];
    if constexpr (Terms::kWeightedMean) {
      S u[2];
      weighted_sums_of_row(z, call.weights_of_row(first + i), t.classes, label, top.max, t.soft, u);
      weight[i] = u[0];
      weighted_depth[i] = u[0] == S(0) ? u[1] : u[1] / u[0];
    }
  }

  const auto lanes = [](const S(&x)[kLanes]) { return load(static_cast<const S*>(x)); };
  const Moments<Vec<S>> moments =
      corrected_moments(lanes(max), lanes(mean), lanes(steps), lanes(squares), lanes(count));
  const RowStats<Vec<S>> stats{lanes(max),    lanes(sum_exp),   lanes(sum_exp2),
                               moments.depth, moments.variance, lanes(count)};
  const BlockGrad<S> block = finish_block<S>(call, first, n, block_labels<S>(call, first, n), stats, lanes(label_logit),
                                             Terms::kWeightedMean ? lanes(weight) : stats.count,
                                             Terms::kWeightedMean ? lanes(weighted_depth) : stats.depth, sum);

  if constexpr (kGrad) {
    for (int i = 0; i < n; ++i) {
      D* grad = call.grad + grad_offsets[i];
      if (call.ignored(first + i)) {
        memset(static_cast<void*>(grad), 0, t.classes * sizeof(D));
        continue;
      }
      write_gradient<Terms>(call.logits + offsets[i], call.weights_of_row(first + i), grad, t.classes,
                            t.labels[first + i], scratch + i * padded<S>(t.classes), block, i);
    }
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
