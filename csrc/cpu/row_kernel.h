// Rows with many adjacent classes, swept in vectors along the classes: a block of rows at a time where several fit the
// first-level cache, a chunk of one row at a time where not even one does. Pass 1 copies the rest of a chunk into scratch
// and finds its maximum and mean, pass 2 turns the copy into exponentials and sums them, pass 3, after the last chunk,
// turns those into the gradient. So the logits are read from memory once, but for terms that need them again in pass 3.
// Relies on call.h; kernels.cpp relies on it.
#pragma once

#include "call.h"

namespace drsl {
inline namespace DRSL_ISA {

constexpr int64_t kChunkElements = 4096;  // of scratch: 16 KB, half of a common first-level cache

template <class S>
DRSL_FN int64_t padded(int64_t classes) {
  return (classes + Vec<S>::kLanes - 1) / Vec<S>::kLanes * Vec<S>::kLanes;
}

template <class S>
DRSL_FN int64_t block_rows(int64_t classes) {
  const int64_t fit = kChunkElements / padded<S>(classes);
  return fit < 1 ? 1 : fit > Vec<S>::kLanes ? Vec<S>::kLanes : fit;
}

// Between rows, or for all of one where it takes several chunks: a gradient needs the exponentials of whole rows.
template <class S>
DRSL_FN int64_t row_stride(int64_t classes, bool grad) {
  return padded<S>(grad || classes < kChunkElements ? classes : kChunkElements);
}

// The rows, and the maximum of each chunk.
template <class S>
DRSL_FN int64_t row_scratch_elements(int64_t classes, bool grad) {
  const int64_t chunks = (classes + kChunkElements - 1) / kChunkElements;
  return block_rows<S>(classes) * row_stride<S>(classes, grad) + chunks * Vec<S>::kLanes;
}

// ---------------------------------------------------------------------------------------------------------
// Sweeps

template <int I>
struct Slot {
  static constexpr int kIndex = I;
};
constexpr int kSlots = 4;  // independent accumulators, to cover the latency of an addition

template <class S>
DRSL_FN Vec<S> fold(const Vec<S> (&x)[kSlots]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// visit(j, slot) for j < count.
template <class Visit>
DRSL_FN void sweep(int64_t count, Visit visit) {
  int64_t j = 0;
  for (; j + kSlots <= count; j += kSlots) {
    visit(j, Slot<0>());
    visit(j + 1, Slot<1>());
    visit(j + 2, Slot<2>());
    visit(j + 3, Slot<3>());
  }
  for (; j < count; ++j) visit(j, Slot<0>());
}

// Visit the n classes of a chunk: full(k, slot) where all kLanes classes from k on are in it and none is the label,
// edge(k, count, keep) for the others: `count` classes from k on, of which those in `keep` are not the label. A label
// that is not in the chunk is any number outside [0, n).
template <class S, class Full, class Edge>
DRSL_FN void sweep_rest(int64_t n, int64_t label, Full full, Edge edge) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const int64_t vectors = n / kLanes, whole = vectors * kLanes;
  const int64_t block = uint64_t(label) < uint64_t(n) ? label / kLanes : n;
  // Arithmetic passes over the label's vector: a loop that ends there is mispredicted in every row.
  sweep(vectors - (block < vectors), [&](int64_t j, auto slot) { full((j + (j >= block)) * kLanes, slot); });
  const auto keep = [&](int64_t k, int64_t count) {
    return Mask<S>{lane_below<S>(count).v & ~lane_is<S>(label - k).v};
  };
  if (block < vectors) edge(block * kLanes, kLanes, keep(block * kLanes, kLanes));
  if (whole < n) edge(whole, n - whole, keep(whole, n - whole));
}

// Lane i: the lanes of part[i] combined; 0 from lane n on.
template <class S, class Combine, class Reduce>
DRSL_FN Vec<S> across_lanes(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n, Combine combine, Reduce reduce) {
  constexpr int kLanes = Vec<S>::kLanes;
  if (n <= kLanes / 4) {  // too few rows for a transpose
    S row[kLanes] = {};
    for (int i = 0; i < n; ++i) row[i] = reduce(part[i]);
    return load(static_cast<const S*>(row));
  }
  Vec<S> square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = i < n ? part[i] : Vec<S>(S(0));
  transpose(square);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) square[i] = combine(square[i], square[i + half]);
  }
  return square[0];
}

template <class S>
DRSL_FN Vec<S> sums_of(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n) {
  return across_lanes(part, n, [](Vec<S> a, Vec<S> b) { return a + b; }, [](Vec<S> x) { return reduce_add(x); });
}

template <class S>
DRSL_FN Vec<S> maxima_of(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n) {
  return across_lanes(part, n, [](Vec<S> a, Vec<S> b) { return max_(a, b); }, [](Vec<S> x) { return reduce_max(x); });
}

// ---------------------------------------------------------------------------------------------------------
// Passes over a chunk of one row; what they return is still spread over the lanes

template <class S>
struct TopParts {
  Vec<S> max, sum;
};

// Pass 1: the chunk to `kept`, with -inf for the label and behind the end; its maximum and sum.
template <class D, class S = Accumulator<D>>
DRSL_PASS TopParts<S> take_chunk(const D* z, int64_t n, int64_t label, S* kept) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  Vec<S> max[kSlots] = {lowest, lowest, lowest, lowest}, sum[kSlots] = {zero, zero, zero, zero};
  sweep_rest<S>(
      n, label,
      [&](int64_t k, auto slot) {
        constexpr int i = decltype(slot)::kIndex;
        const Vec<S> v = load(z + k);
        max[i] = max_(max[i], v);
        sum[i] = sum[i] + v;
        store(kept + k, v);
      },
      [&](int64_t k, int64_t count, Mask<S> keep) {
        const Vec<S> v = load_first(z + k, count), rest = select(keep, v, lowest);
        max[0] = max_(max[0], rest);
        sum[0] = sum[0] + select(keep, v, zero);
        store(kept + k, rest);
      });
  return {max_(max_(max[0], max[1]), max_(max[2], max[3])), fold(sum)};
}

template <class S>
struct SumParts {
  Vec<S> exps, exps2, steps, squares;  // of e_k, e_k^2, z_k - mean, (z_k - mean)^2
};

// Pass 2: e_k = exp(z_k - shift) in place of the copies, and the sums. Meanwhile the memory can fetch what pass 1 reads
// next, and make room for what pass 3 writes: it would be idle otherwise, and both passes would wait for it.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_PASS SumParts<S> sum_chunk(S* kept, int64_t vectors, S shift_of_row, S mean_of_row, const D* next, const D* grad) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), shift(shift_of_row), mean(mean_of_row);
  Vec<S> exps[kSlots] = {zero, zero, zero, zero}, exps2[kSlots] = {zero, zero, zero, zero},
         steps[kSlots] = {zero, zero, zero, zero}, squares[kSlots] = {zero, zero, zero, zero};
  sweep(vectors, [&](int64_t j, auto slot) {
    constexpr int i = decltype(slot)::kIndex;
    S* const at = kept + j * Vec<S>::kLanes;
    const Vec<S> v = load(static_cast<const S*>(at)), e = exp_of_fall(v - shift);
    prefetch(next + j * Vec<S>::kLanes);
    if constexpr (kGrad) prefetch_to_write(grad + j * Vec<S>::kLanes);
    exps[i] = exps[i] + e;
    if constexpr (Terms::kSquares) exps2[i] = exps2[i] + e * e;
    if constexpr (Terms::kMoments) {
      const Vec<S> step = select(v != lowest, v - mean, zero);
      steps[i] = steps[i] + step;
      squares[i] = squares[i] + step * step;
    }
    if constexpr (kGrad) store(at, e);
  });
  return {fold(exps), fold(exps2), fold(steps), fold(squares)};
}

// Pass 3. `fall` takes the exponentials from the chunk's maximum to the row's. The label's element is for the caller.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_PASS void write_gradient(const D* z, const S* u, D* grad, int64_t n, const S* exps, const BlockGrad<S>& block,
                              int lane, S fall, bool soft) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const Vec<S> a(block.a.v[lane] * fall), b(block.b.v[lane] * fall * fall), c(block.c.v[lane]);
  const Vec<S> offset(block.offset.v[lane]), max(block.max.v[lane]), smooth(block.smooth.v[lane]);
  const Vec<S> masked(soft ? block.smooth.v[lane] : S(0));
  const auto gradient = [&](Vec<S> e, Vec<S> v, Vec<S> weight) {
    Vec<S> g = e * a;
    if constexpr (Terms::kSquares) g = e * (a + b * e);
    if constexpr (Terms::kMoments) {
      Vec<S> step = c * (v - max) + offset;
      Vec<S> at_masked(S(0));
      if constexpr (Terms::kWeightedMean) {
        step = step - smooth * weight;
        at_masked = -(masked * weight);
      }
      g = g + select(v != -infinity<Vec<S>>(), step, at_masked);
    }
    return g;
  };
  const auto whole = [&](int64_t k) {
    const Vec<S> e = load(exps + k);
    if constexpr (Terms::kWeightedMean) return gradient(e, load(z + k), load(u + k));
    else if constexpr (Terms::kMoments) return gradient(e, load(z + k), e);
    else return gradient(e, e, e);
  };
  const auto part = [&](int64_t k, int64_t count) {
    const Vec<S> e = load_first(exps + k, count);
    Vec<S> v = e, weight = e;
    if constexpr (Terms::kMoments) v = load_first(z + k, count);
    if constexpr (Terms::kWeightedMean) weight = load_first(u + k, count);
    store_first(grad + k, gradient(e, v, weight), count);
  };
  const int64_t vectors = n / kLanes;
  sweep(vectors, [&](int64_t j, auto) { store(grad + j * kLanes, whole(j * kLanes)); });
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
    Vec<S> weights[kSlots] = {zero, zero, zero, zero}, depths[kSlots] = {zero, zero, zero, zero};
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
    weight.add(fold(weights));
    depth.add(fold(depths));
  }
  sums[0] = reduce_add(weight.total());
  sums[1] = reduce_add(depth.total());
}

// ---------------------------------------------------------------------------------------------------------
// Blocks of rows, one row per lane

// Rows first .. first + rows - 1, where they lie, and how far behind a class is the one that takes its place next.
template <class D>
struct Block {
  using S = Accumulator<D>;
  int64_t first, rows, stride, ahead;  // stride: between the rows' copies
  int64_t offsets[Vec<S>::kLanes], grad_offsets[Vec<S>::kLanes];

  Block(const Task& t, int64_t first, int64_t rows)
      : first(first), rows(rows), stride(row_stride<S>(t.classes, t.grad != nullptr)) {
    row_offsets(t.layout, first, rows, offsets, grad_offsets);
    const int64_t step = rows > 1 ? offsets[1] - offsets[0] : t.classes;
    ahead = t.classes > kChunkElements ? kChunkElements : rows * step;
  }
};

// M, a rounded mu, and n of a chunk of each row.
template <class S>
struct ChunkTops {
  Vec<S> max, mean, count;
};

// Where a class is at -inf. A sum of shares z_k / n cannot overflow.
template <class S>
DRSL_PASS void top_of_masked(const S* kept, int64_t vectors, int lane, ChunkTops<S>& tops) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), one(S(1));
  const S classes = tops.count.v[lane] > S(1) ? tops.count.v[lane] : S(1);
  const Vec<S> share(S(1) / classes);
  Vec<S> mean = zero, present = zero;
  for (int64_t j = 0; j < vectors; ++j) {
    const Vec<S> v = load(kept + j * Vec<S>::kLanes);
    mean = mean + select(v != lowest, v, zero) * share;
    present = present + select(v != lowest, one, zero);
  }
  const S count = reduce_add(present);
  tops.mean.v[lane] = reduce_add(mean) * (classes / (count > S(1) ? count : S(1)));
  tops.count.v[lane] = count;
}

// Pass 1 over classes at .. at + width - 1.
template <class D, class S = Accumulator<D>>
DRSL_PASS ChunkTops<S> take_chunks(const Call<D>& call, const Block<D>& block, int64_t at, int64_t width, S* kept) {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> max[kLanes], sum[kLanes];
  S count[kLanes] = {};
  for (int i = 0; i < block.rows; ++i) {
    max[i] = sum[i] = Vec<S>(S(0));
    if (call.ignored(block.first + i)) continue;
    const int64_t label = call.task.labels[block.first + i] - at;
    const TopParts<S> top = take_chunk(call.logits + block.offsets[i] + at, width, label, kept + i * block.stride);
    max[i] = top.max;
    sum[i] = top.sum;
    count[i] = S(width - (uint64_t(label) < uint64_t(width)));
  }
  const Vec<S> total = sums_of(sum, block.rows), others = load(static_cast<const S*>(count)), one(S(1));
  ChunkTops<S> tops{maxima_of(max, block.rows), total / select(others > one, others, one), others};
  const Mask<S> odd{~(abs_(total) < infinity<Vec<S>>()).v};  // a class at -inf, an overflow, or NaN
  if (any(odd)) {
    for (int i = 0; i < block.rows; ++i) {
      if (odd.v[i]) top_of_masked(kept + i * block.stride, padded<S>(width) / kLanes, i, tops);
    }
  }
  return tops;
}

// Pass 2 over the copies of pass 1. A NaN in a row, which need not show in its exponentials, shows in its mean.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_PASS RowStats<Vec<S>> sum_chunks(const Call<D>& call, const Block<D>& block, const ChunkTops<S>& tops, int64_t at,
                                      int64_t width, S* kept) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Vec<S> zero(S(0)), shift = select(tops.max == -infinity<Vec<S>>(), zero, tops.max);
  Vec<S> exps[kLanes], exps2[kLanes], steps[kLanes], squares[kLanes];
  for (int i = 0; i < block.rows; ++i) {
    exps[i] = exps2[i] = steps[i] = squares[i] = zero;
    if (call.ignored(block.first + i)) continue;
    const D* const next = call.logits + block.offsets[i] + at + block.ahead;
    const D* const grad = kGrad ? call.grad + block.grad_offsets[i] + at : next;
    const SumParts<S> parts = sum_chunk<Terms, kGrad>(kept + i * block.stride, padded<S>(width) / kLanes, shift.v[i],
                                                      tops.mean.v[i], next, grad);
    exps[i] = parts.exps;
    exps2[i] = parts.exps2;
    steps[i] = parts.steps;
    squares[i] = parts.squares;
  }
  Moments<Vec<S>> moments{zero, zero};
  if constexpr (Terms::kMoments) {
    moments =
        corrected_moments(tops.max, tops.mean, sums_of(steps, block.rows), sums_of(squares, block.rows), tops.count);
    moments.depth = select(tops.count == zero, zero, moments.depth);  // as in empty_stats: not -inf
  }
  return {tops.max,
          sums_of(exps, block.rows) + (tops.mean - tops.mean),
          Terms::kSquares ? sums_of(exps2, block.rows) : zero,
          moments.depth,
          moments.variance,
          tops.count};
}

// Rows first .. first + n - 1, n <= block_rows.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_FN void row_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  const Block<D> block(t, first, n);
  S* const chunk_max = scratch + block_rows<S>(t.classes) * block.stride;
  const auto width_at = [&](int64_t at) { return t.classes - at < kChunkElements ? t.classes - at : kChunkElements; };

  RowStats<Vec<S>> stats = empty_stats<Vec<S>>();
  for (int64_t at = 0; at < t.classes; at += kChunkElements) {
    S* const kept = scratch + (kGrad ? at : 0);
    const ChunkTops<S> tops = take_chunks(call, block, at, width_at(at), kept);
    store(chunk_max + at / kChunkElements * kLanes, tops.max);
    const RowStats<Vec<S>> part = sum_chunks<Terms, kGrad>(call, block, tops, at, width_at(at), kept);
    stats = at == 0 ? part : merge(stats, part);
  }

  S label_logit[kLanes] = {}, weight[kLanes] = {}, weighted_depth[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    if (call.ignored(first + i)) continue;
    const D* const z = call.logits + block.offsets[i];
    label_logit[i] = load_one(z + t.labels[first + i]);
    if constexpr (Terms::kWeightedMean) {
      S u[2];
      weighted_sums_of_row(z, call.weights_of_row(first + i), t.classes, t.labels[first + i], stats.max.v[i], t.soft,
                           u);
      weight[i] = u[0];
      weighted_depth[i] = u[0] == S(0) ? u[1] : u[1] / u[0];
    }
  }
  const auto lanes = [](const S(&x)[kLanes]) { return load(static_cast<const S*>(x)); };
  const BlockGrad<S> grads = finish_block<S>(call, first, n, block_labels<S>(call, first, n), stats, lanes(label_logit),
                                             Terms::kWeightedMean ? lanes(weight) : stats.count,
                                             Terms::kWeightedMean ? lanes(weighted_depth) : stats.depth, sum);
  if constexpr (!kGrad) return;

  for (int i = 0; i < n; ++i) {
    D* const grad = call.grad + block.grad_offsets[i];
    if (call.ignored(first + i)) {
      memset(static_cast<void*>(grad), 0, t.classes * sizeof(D));
      continue;
    }
    const D* const z = call.logits + block.offsets[i];
    const S* const u = call.weights_of_row(first + i);
    for (int64_t at = 0; at < t.classes; at += kChunkElements) {
      const Vec<S> fall = exp_(-drop(load(static_cast<const S*>(chunk_max) + at / kChunkElements * kLanes), stats.max));
      write_gradient<Terms>(z + at, u + at, grad + at, width_at(at), scratch + i * block.stride + at, grads, i,
                            fall.v[i], t.soft);
    }
    store_one(grad + t.labels[first + i], grads.label.v[i]);
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
