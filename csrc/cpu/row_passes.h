// Passes over adjacent classes of one row, in vectors. What they sum up is still spread over the lanes. Relies on call.h and
// sweeps.h; row_kernel.h and part_kernel.h rely on it.
#pragma once

#include "call.h"
#include "sweeps.h"

namespace drsl {
inline namespace DRSL_ISA {

template <class S>
struct TopParts {
  Vec<S> max, sum;
};

// Pass 1; a copy has -inf for the label and behind the end.
template <bool kCopies, class D, class S = Accumulator<D>>
DRSL_PASS TopParts<S> take_chunk(const D* z, int64_t n, int64_t label, S* copy) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  Slots<S> max(lowest), sum(zero);
  sweep_rest<S>(
      n, label,
      [&](int64_t k, auto slot) {
        constexpr int i = decltype(slot)::kIndex;
        const Vec<S> v = load(z + k);
        max[i] = max_(max[i], v);
        sum[i] = sum[i] + v;
        if constexpr (kCopies) store(copy + k, v);
      },
      [&](int64_t k, int64_t count, Mask<S> keep) {
        const Vec<S> v = load_first(z + k, count), rest = select(keep, v, lowest);
        max[0] = max_(max[0], rest);
        sum[0] = sum[0] + select(keep, v, zero);
        if constexpr (kCopies) store(copy + k, rest);
      });
  return {max.max(), sum.sum()};
}

// What the other passes read of a chunk: the logits, or their copy, in which nothing is left to pass over.
template <class S>
struct Chunk {
  const S* z;
  int64_t n, label;
};

template <class S>
struct SumParts {
  Vec<S> exps, exps2, steps, squares;  // of e_k, e_k^2, z_k - mean, (z_k - mean)^2
};

// Pass 2: e_k = exp(z_k - shift), with kGrad to `exps_out`, and the sums. Meanwhile the memory can fetch what pass 1 reads
// next, and make room for the gradient that will be written: it would be idle otherwise, and both would wait for it.
template <class Terms, bool kGrad, bool kCopies, class D, class S = Accumulator<D>>
DRSL_PASS SumParts<S> sum_chunk(const Chunk<S>& chunk, S shift_of_row, S mean_of_row, S* exps_out, const D* next,
                                const D* to_write) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), shift(shift_of_row), mean(mean_of_row);
  Slots<S> exps(zero), exps2(zero), steps(zero), squares(zero);
  const auto take = [&](int64_t k, Vec<S> v, auto slot) {
    constexpr int i = decltype(slot)::kIndex;
    const Vec<S> e = exp_of_fall(v - shift);
    prefetch(next + k);
    if constexpr (kGrad) prefetch_to_write(to_write + k);
    exps[i] = exps[i] + e;
    if constexpr (Terms::kSquares) exps2[i] = exps2[i] + e * e;
    if constexpr (Terms::kMoments) {
      const Vec<S> step = select(v != lowest, v - mean, zero);
      steps[i] = steps[i] + step;
      squares[i] = squares[i] + step * step;
    }
    return e;
  };
  const S* const z = chunk.z;
  const auto full = [&](int64_t k, auto slot) {
    const Vec<S> e = take(k, load(z + k), slot);
    if constexpr (kGrad) store(exps_out + k, e);
  };
  const auto edge = [&](int64_t k, int64_t count, Mask<S> keep) {
    const Vec<S> e = take(k, select(keep, load_first(z + k, count), lowest), Slot<0>());
    if constexpr (kGrad) store_first(exps_out + k, e, count);
  };
  if constexpr (kCopies) sweep(chunk.n / Vec<S>::kLanes, [&](int64_t j, auto slot) { full(j * Vec<S>::kLanes, slot); });
  else sweep_rest<S>(chunk.n, chunk.label, full, edge);
  return {exps.sum(), exps2.sum(), steps.sum(), squares.sum()};
}

// Pass 3. `fall` takes the exponentials from the chunk's maximum to the row's. Without kExps they are not in memory, but
// computed, of the fall from `shift`. The label's element is for the caller.
template <class Terms, bool kExps, class D, class S = Accumulator<D>>
DRSL_PASS void write_gradient(const D* z, const S* u, D* grad, int64_t n, const S* exps, S shift_of_row,
                              const BlockGrad<S>& block, int lane, S fall, bool soft) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const Vec<S> shift(shift_of_row);
  const auto row = [&](S x) { return quiet(Vec<S>(x)); };
  const Vec<S> a = row(block.a.v[lane] * fall), b = row(block.b.v[lane] * fall * fall), c = row(block.c.v[lane]);
  const Vec<S> offset = row(block.offset.v[lane]), max = row(block.max.v[lane]), smooth = row(block.smooth.v[lane]);
  const auto gradient = [&](Vec<S> e, Vec<S> v, Vec<S> weight) {
    Vec<S> g = e * a;
    if constexpr (Terms::kSquares) g = e * (a + b * e);
    if constexpr (Terms::kMoments) {
      Vec<S> step = c * (v - max) + offset;
      Vec<S> at_masked(S(0));
      if constexpr (Terms::kWeightedMean) {
        step = step - smooth * weight;
        if (soft) at_masked = -(smooth * weight);
      }
      g = g + select(v != -infinity<Vec<S>>(), step, at_masked);
    }
    return g;
  };
  const auto whole = [&](int64_t k) {
    Vec<S> e;
    if constexpr (kExps) e = load(exps + k);
    else e = exp_of_fall(load(z + k) - shift);
    if constexpr (Terms::kWeightedMean) return gradient(e, load(z + k), quiet(load(u + k)));
    else if constexpr (Terms::kMoments) return gradient(e, load(z + k), e);
    else return gradient(e, e, e);
  };
  const auto part = [&](int64_t k, int64_t count) {
    Vec<S> e;
    if constexpr (kExps) e = load_first(exps + k, count);
    else e = exp_of_fall(load_first(z + k, count) - shift);
    Vec<S> v = e, weight = e;
    if constexpr (Terms::kMoments) v = load_first(z + k, count);
    if constexpr (Terms::kWeightedMean) weight = load_first(u + k, count);
    store_first(grad + k, gradient(e, v, weight), count);
  };
  const int64_t vectors = n / kLanes;
  int64_t j = 0;
  for (; j + kGroup <= vectors; j += kGroup) {
    for (int64_t k = j * kLanes; k < (j + kGroup) * kLanes; k += 2 * kLanes) {
      store_two_quiet(grad + k, whole(k), whole(k + kLanes));
    }
  }
  for (; j < vectors; ++j) store(grad + j * kLanes, whole(j * kLanes));
  if (vectors * kLanes < n) part(vectors * kLanes, n - vectors * kLanes);
}

// U = sum_R u_k and U (M - nu) = sum_R u_k (M - z_k), of a whole row.
template <class D, class S = Accumulator<D>>
DRSL_PASS void weighted_sums_of_row(const D* z, const S* u, int64_t classes, int64_t label, S max, bool soft,
                                    S (&sums)[2]) {
  constexpr int64_t kSummed = 4 * kSlots * Vec<S>::kLanes;  // equal weights round in one direction, so not too many
  const Vec<S> zero(S(0)), top(max);
  ExactSum<S> weight = {}, depth = {};
  for (int64_t at = 0; at < classes; at += kSummed) {
    Slots<S> weights(zero), depths(zero);
    const auto take = [&](Vec<S> v, Vec<S> share, int slot) {
      const WeightedShare<S> adds = weighted_share(share, v, top, soft);
      weights[slot] = weights[slot] + adds.weight;
      depths[slot] = depths[slot] + adds.depth;
    };
    const int64_t width = classes - at < kSummed ? classes - at : kSummed;
    sweep_rest<S>(
        width, label - at,
        [&](int64_t k, auto slot) { take(load(z + at + k), load(u + at + k), decltype(slot)::kIndex); },
        [&](int64_t k, int64_t n, Mask<S> keep) {
          take(select(keep, load_first(z + at + k, n), -infinity<Vec<S>>()),
               select(keep, load_first(u + at + k, n), zero), 0);
        });
    weight.add(weights.sum());
    depth.add(depths.sum());
  }
  sums[0] = reduce_add(weight.total());
  sums[1] = reduce_add(depth.total());
}

}  // namespace DRSL_ISA
}  // namespace drsl
