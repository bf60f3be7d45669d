// Rows of which only some classes are here, the others being on other processes or devices: statistics of these classes,
// and, from those of all of them, the loss and the gradient by these. Relies on row_kernel.h; kernels.cpp relies on it.
#pragma once

#include "row_kernel.h"

namespace drsl {
inline namespace DRSL_ISA {

// The statistics of rows first .. first + n - 1, n <= block_rows, row by row.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_FN void stats_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, S* out) {
  const Task& t = call.task;
  const int64_t chunks = (t.classes + kChunkElements - 1) / kChunkElements;
  const Block<D, sizeof(D) != sizeof(S)> block(call, first, n, scratch + chunks * Vec<S>::kLanes);
  const RowSums<S> sums = sum_block<Terms, false>(call, block, scratch);
  const RowStats<Vec<S>>& s = sums.stats;
  const Vec<S> numbers[kRowStats] = {s.max,      s.sum_exp, s.sum_exp2,       s.depth,
                                     s.variance, s.count,   sums.rest_weight, sums.rest_weight * sums.rest_depth};
  for (int64_t i = 0; i < n; ++i) {
    const bool ignored = call.ignored(first + i);
    for (int j = 0; j < kRowStats; ++j) out[(first + i) * kRowStats + j] = ignored ? S(0) : numbers[j].v[i];
  }
}

// Statistics of a part of the rest, of rows first .. first + n - 1.
template <class S>
DRSL_FN RowStats<Vec<S>> read_stats(const CallInfo<S>& call, int64_t first, int64_t n, int64_t part) {
  const Task& t = call.task;
  S numbers[kRowStats][Vec<S>::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const S* const row = static_cast<const S*>(t.stats) + ((first + i) * t.stats_parts + part) * kRowStats;
    for (int j = 0; j < kRowStats; ++j) numbers[j][i] = row[j];
  }
  const auto lanes = [&](int j) { return load(static_cast<const S*>(numbers[j])); };
  return {lanes(0), lanes(1), lanes(2), lanes(3), lanes(4), lanes(5)};
}

// Loss and gradient of rows first .. first + n - 1, n <= kLanes, from the statistics of whole rows.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_FN void row_block_from_stats(const Call<D>& call, int64_t first, int64_t n, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  RowStats<Vec<S>> stats = read_stats<S>(call, first, n, 0);
  for (int64_t part = 1; part < t.stats_parts; ++part) stats = merge(stats, read_stats<S>(call, first, n, part));
  const Vec<S> label_logit = read_rows<S>(t.label_logits, first, n);
  const BlockGrad<S> grads = finish_block<S>(call, first, n, block_labels<S>(call, first, n), stats, label_logit,
                                             stats.count, stats.depth, sum);
  if constexpr (!kGrad) return;
  int64_t offsets[kLanes], grad_offsets[kLanes];
  row_offsets(t.layout, first, n, offsets, grad_offsets);
  for (int64_t i = 0; i < n; ++i) {
    D* const grad = call.grad + grad_offsets[i];
    if (call.ignored(first + i)) {
      memset(static_cast<void*>(grad), 0, t.classes * sizeof(D));
      continue;
    }
    const S shift = stats.max.v[i] == -infinity<S>() ? S(0) : stats.max.v[i];
    write_gradient<Terms, false>(call.logits + offsets[i], static_cast<const S*>(nullptr), grad, t.classes,
                                 static_cast<const S*>(nullptr), shift, grads, i, S(1), false);
    const int64_t label = t.labels[first + i];
    if (uint64_t(label) < uint64_t(t.classes)) store_one(grad + label, grads.label.v[i]);
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
