// Rows with many adjacent classes, swept in vectors along the classes: a block of rows at a time where several fit the
// caches near the processor, a chunk of one row at a time where not even one does. Pass 1 finds the maximum and mean of a
// chunk's rest, pass 2 writes exponentials and sums them, pass 3, after the last chunk, turns those into the gradient. The
// exponentials of long rows stand where the gradient will. Those of shorter rows, and of 16-bit formats, which would round
// them, stand in scratch, to which pass 1 copies the rest: nothing is left to pass over then. So the logits come from memory
// once, but for terms that need them again in pass 3. The passes are in row_passes.h, on which this relies; part_kernel.h,
// kernels.cpp and activation.h rely on it.
#pragma once

#include "row_passes.h"

namespace drsl {
inline namespace DRSL_ISA {

constexpr int64_t kChunkElements = 8192;  // 32 KB of float
constexpr int64_t kCopiedClasses = 2048;  // longer rows of an exact format are not copied

// A gradient that takes the place of the logits must not hold exponentials while they are still read.
template <class D>
DRSL_FN bool use_copies(const Task& t) {
  return sizeof(D) != sizeof(Accumulator<D>) || t.classes <= kCopiedClasses || t.grad == t.logits;
}

template <class S>
DRSL_FN int64_t padded(int64_t classes) {
  return (classes + Vec<S>::kLanes - 1) / Vec<S>::kLanes * Vec<S>::kLanes;
}

template <class S>
DRSL_FN int64_t block_rows(int64_t classes) {
  const int64_t fit = kChunkElements / padded<S>(classes < 1 ? 1 : classes);
  return fit < 1 ? 1 : fit > Vec<S>::kLanes ? Vec<S>::kLanes : fit;
}

// Between copies of rows, or for all of one where it takes several chunks: a gradient needs the exponentials of whole rows.
template <class S>
DRSL_FN int64_t copy_stride(int64_t classes, bool grad) {
  return padded<S>(grad || classes < kChunkElements ? classes : kChunkElements);
}

// The maximum of each chunk, and copies of a block of rows.
template <class S>
DRSL_FN int64_t row_scratch_elements(int64_t classes, bool grad, bool copies) {
  const int64_t chunks = (classes + kChunkElements - 1) / kChunkElements;
  return chunks * Vec<S>::kLanes + (copies ? block_rows<S>(classes) * copy_stride<S>(classes, grad) : 0);
}

DRSL_FN int64_t chunk_width(int64_t classes, int64_t at) {
  return classes - at < kChunkElements ? classes - at : kChunkElements;
}

// Rows first .. first + rows - 1, where they lie, and how far behind a class is the one that takes its place next.
template <class D, bool kCopies>
struct Block {
  using S = Accumulator<D>;
  const Call<D>& call;
  int64_t first, rows, ahead, grad_ahead;
  int64_t offsets[Vec<S>::kLanes], grad_offsets[Vec<S>::kLanes];
  S* copies;

  Block(const Call<D>& call, int64_t first, int64_t rows, S* copies)
      : call(call), first(first), rows(rows), copies(copies) {
    const Task& t = call.task;
    row_offsets(t.layout, first, rows, offsets, grad_offsets);
    const bool chunks = t.classes > kChunkElements;
    ahead = chunks ? kChunkElements : rows * (rows > 1 ? offsets[1] - offsets[0] : t.classes);
    grad_ahead = chunks ? kChunkElements : rows * (rows > 1 ? grad_offsets[1] - grad_offsets[0] : t.classes);
  }

  const D* logits(int64_t i, int64_t at) const { return call.logits + offsets[i] + at; }
  int64_t label(int64_t i, int64_t at) const { return call.task.labels[first + i] - at; }
  S* copy(int64_t i, int64_t at) const {
    return copies + i * copy_stride<S>(call.task.classes, call.grad) + (call.grad ? at : 0);
  }
  // Classes at .. at + width - 1 of row i, for passes after the first.
  Chunk<S> chunk(int64_t i, int64_t at, int64_t width) const {
    if constexpr (kCopies) return {copy(i, at), padded<S>(width), -1};
    else return {logits(i, at), width, label(i, at)};
  }
  S* exps(int64_t i, int64_t at) const {
    if constexpr (kCopies) return copy(i, at);
    else return call.grad + grad_offsets[i] + at;
  }
};

// M, a rounded mu, and n of a chunk of each row.
template <class S>
struct ChunkTops {
  Vec<S> max, mean, count;
};

// Where a class is at -inf. A sum of shares z_k / n cannot overflow.
template <class S>
DRSL_PASS void top_of_masked(const Chunk<S>& chunk, int lane, ChunkTops<S>& tops) {
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), one(S(1));
  const S classes = tops.count.v[lane] > S(1) ? tops.count.v[lane] : S(1);
  const Vec<S> share(S(1) / classes);
  Vec<S> mean = zero, present = zero;
  const auto take = [&](Vec<S> v) {
    mean = mean + select(v != lowest, v, zero) * share;
    present = present + select(v != lowest, one, zero);
  };
  const S* const z = chunk.z;
  sweep_rest<S>(
      chunk.n, chunk.label, [&](int64_t k, auto) { take(load(z + k)); },
      [&](int64_t k, int64_t count, Mask<S> keep) { take(select(keep, load_first(z + k, count), lowest)); });
  const S count = reduce_add(present);
  tops.mean.v[lane] = reduce_add(mean) * (classes / (count > S(1) ? count : S(1)));
  tops.count.v[lane] = count;
}

// Pass 1 over classes at .. at + width - 1.
template <class D, bool kCopies, class S = Accumulator<D>>
DRSL_PASS ChunkTops<S> take_chunks(const Call<D>& call, const Block<D, kCopies>& block, int64_t at, int64_t width) {
  constexpr int kLanes = Vec<S>::kLanes;
  Vec<S> max[kLanes], sum[kLanes];
  S count[kLanes] = {};
  for (int i = 0; i < block.rows; ++i) {
    max[i] = sum[i] = Vec<S>(S(0));
    if (call.ignored(block.first + i)) continue;
    const int64_t label = block.label(i, at);
    S* const copy = kCopies ? block.copy(i, at) : nullptr;
    const TopParts<S> top = take_chunk<kCopies>(block.logits(i, at), width, label, copy);
    max[i] = top.max;
    sum[i] = top.sum;
    count[i] = S(width - (uint64_t(label) < uint64_t(width)));
  }
  const Vec<S> total = sums_of(sum, block.rows), others = load(static_cast<const S*>(count)), one(S(1));
  ChunkTops<S> tops{maxima_of(max, block.rows), total / select(others > one, others, one), others};
  const Mask<S> odd{~(abs_(total) < infinity<Vec<S>>()).v};  // a class at -inf, an overflow, or NaN
  if (any(odd)) {
    for (int i = 0; i < block.rows; ++i) {
      if (odd.v[i]) top_of_masked(block.chunk(i, at, width), i, tops);
    }
  }
  return tops;
}

// Pass 2 over the same classes. A NaN in a row, which need not show in its exponentials, shows in its mean.
template <class Terms, bool kGrad, class D, bool kCopies, class S = Accumulator<D>>
DRSL_PASS RowStats<Vec<S>> sum_chunks(const Call<D>& call, const Block<D, kCopies>& block, const ChunkTops<S>& tops,
                                      int64_t at, int64_t width) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Vec<S> zero(S(0)), shift = select(tops.max == -infinity<Vec<S>>(), zero, tops.max);
  Vec<S> exps[kLanes], exps2[kLanes], steps[kLanes], squares[kLanes];
  for (int i = 0; i < block.rows; ++i) {
    exps[i] = exps2[i] = steps[i] = squares[i] = zero;
    if (call.ignored(block.first + i)) continue;
    const D* const next = block.logits(i, at) + block.ahead;
    const D* const to_write = kGrad ? call.grad + block.grad_offsets[i] + at + (kCopies ? 0 : block.grad_ahead) : next;
    const SumParts<S> parts = sum_chunk<Terms, kGrad, kCopies>(block.chunk(i, at, width), shift.v[i], tops.mean.v[i],
                                                               kGrad ? block.exps(i, at) : nullptr, next, to_write);
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

// What the classes of a block of rows sum up to. U and M - nu are those of the weights, or n and h without weights.
template <class S>
struct RowSums {
  RowStats<Vec<S>> stats;
  Vec<S> rest_weight, rest_depth;
};

// Passes 1 and 2. The maximum of every chunk goes to `chunk_max`.
template <class Terms, bool kGrad, bool kCopies, class D, class S = Accumulator<D>>
DRSL_FN RowSums<S> sum_block(const Call<D>& call, const Block<D, kCopies>& block, S* chunk_max) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  RowStats<Vec<S>> stats = empty_stats<Vec<S>>();
  for (int64_t at = 0; at < t.classes; at += kChunkElements) {
    const int64_t width = chunk_width(t.classes, at);
    const ChunkTops<S> tops = take_chunks(call, block, at, width);
    store(chunk_max + at / kChunkElements * kLanes, tops.max);
    const RowStats<Vec<S>> part = sum_chunks<Terms, kGrad>(call, block, tops, at, width);
    stats = at == 0 ? part : merge(stats, part);
  }
  if constexpr (!Terms::kWeightedMean) return {stats, stats.count, stats.depth};
  S weight[kLanes] = {}, depth[kLanes] = {};
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.first + i;
    if (call.ignored(row)) continue;
    S u[2];
    weighted_sums_of_row(block.logits(i, 0), call.weights_of_row(row), t.classes, t.labels[row], stats.max.v[i], t.soft,
                         u);
    weight[i] = u[0];
    depth[i] = u[0] == S(0) ? u[1] : u[1] / u[0];
  }
  return {stats, load(static_cast<const S*>(weight)), load(static_cast<const S*>(depth))};
}

// Rows first .. first + n - 1, n <= block_rows.
template <class Terms, bool kGrad, bool kCopies, class D, class S = Accumulator<D>>
DRSL_FN void row_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  const int64_t chunks = (t.classes + kChunkElements - 1) / kChunkElements;
  S* const chunk_max = scratch;
  const Block<D, kCopies> block(call, first, n, scratch + chunks * kLanes);
  const RowSums<S> sums = sum_block<Terms, kGrad>(call, block, chunk_max);
  const RowStats<Vec<S>>& stats = sums.stats;

  S label_logit[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    if (!call.ignored(first + i)) label_logit[i] = load_one(block.logits(i, t.labels[first + i]));
  }
  const BlockGrad<S> grads =
      finish_block<S>(call, first, n, block_labels<S>(call, first, n), stats, load(static_cast<const S*>(label_logit)),
                      sums.rest_weight, sums.rest_depth, sum);
  if constexpr (!kGrad) return;

  for (int i = 0; i < n; ++i) {
    D* const grad = call.grad + block.grad_offsets[i];
    if (call.ignored(first + i)) {
      memset(static_cast<void*>(grad), 0, t.classes * sizeof(D));
      continue;
    }
    const D* const z = call.logits + block.offsets[i];
    const S* const u = Terms::kWeightedMean ? call.weights_of_row(first + i) : nullptr;
    for (int64_t at = 0; at < t.classes; at += kChunkElements) {
      S fall(1);
      if (t.classes > kChunkElements) {
        fall = exp_(-drop(load(static_cast<const S*>(chunk_max) + at / kChunkElements * kLanes), stats.max)).v[i];
      }
      write_gradient<Terms, true>(z + at, u ? u + at : u, grad + at, chunk_width(t.classes, at), block.exps(i, at),
                                  S(0), grads, i, fall, t.soft);
    }
    store_one(grad + t.labels[first + i], grads.label.v[i]);
  }
}

// The gradient of rows first .. first + n - 1, n <= kLanes, from what an earlier run saved.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_FN void row_block_from_saved(const Call<D>& call, int64_t first, int64_t n) {
  const Task& t = call.task;
  int64_t offsets[Vec<S>::kLanes], grad_offsets[Vec<S>::kLanes];
  row_offsets(t.layout, first, n, offsets, grad_offsets);
  const SavedBlock<S> saved = load_saved<S>(call, first, n);
  for (int i = 0; i < n; ++i) {
    D* const grad = call.grad + grad_offsets[i];
    if (call.ignored(first + i)) {
      memset(static_cast<void*>(grad), 0, t.classes * sizeof(D));
      continue;
    }
    const S* const u = Terms::kWeightedMean ? call.weights_of_row(first + i) : nullptr;
    write_gradient<Terms, false>(call.logits + offsets[i], u, grad, t.classes, static_cast<const S*>(nullptr),
                                 saved.shift.v[i], saved.grad, i, S(1), t.soft);
    store_one(grad + t.labels[first + i], saved.grad.label.v[i]);
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
