// What the two CPU kernels share: a Task with its types resolved, and the step from the statistics of a block of
// rows (one row per lane) to their losses, outputs and gradient coefficients. Relies on memory.h.
#pragma once

#include "kernels.h"
#include "memory.h"

// A pass over many elements: a function of its own, so that each is compiled once for all kernels that share it.
#define DRSL_PASS __attribute__((noinline))

namespace drsl {
inline namespace DRSL_ISA {

// Which terms a call needs; each combination is compiled by itself.
template <bool kSquaresNeeded, bool kMomentsNeeded, bool kWeightedMeanNeeded>
struct TermSet {
  static constexpr bool kSquares = kSquaresNeeded;            // A2, and the coefficient b
  static constexpr bool kMoments = kMomentsNeeded;            // V, and the coefficients c and d
  static constexpr bool kWeightedMean = kWeightedMeanNeeded;  // nu and U: smoothing with class weights
};

// What does not depend on the storage format of the logits; S is the type of the statistics.
template <class S>
struct CallInfo {
  explicit CallInfo(const Task& t)
      : params{t.truth, t.distance, S(t.q), S(t.threshold), S(t.scale), S(t.smoothing), t.soft},
        task(t),
        class_weights(static_cast<const S*>(t.class_weights)),
        class_margins(static_cast<const S*>(t.class_margins)),
        tau_rows(static_cast<const S*>(t.tau_rows)),
        upstream(static_cast<const S*>(t.upstream)) {}

  LossParams<S> params;
  const Task& task;
  const S* class_weights;
  const S* class_margins;
  const S* tau_rows;
  const S* upstream;

  bool ignored(int64_t row) const { return task.labels[row] == task.ignore_index; }
  const S* weights_of_row(int64_t row) const { return class_weights + (task.soft ? row * task.classes : 0); }
};

template <class D>
struct Call : CallInfo<Accumulator<D>> {
  explicit Call(const Task& t)
      : CallInfo<Accumulator<D>>(t), logits(static_cast<const D*>(t.logits)), grad(static_cast<D*>(t.grad)) {}

  const D* logits;
  D* grad;
};

// Offsets, in elements, of rows first .. first + n - 1 in the logits and in their gradient.
DRSL_FN void row_offsets(const RowLayout& layout, int64_t first, int64_t n, int64_t* logits, int64_t* grad) {
  if (layout.dims == 1) {
    for (int64_t i = 0; i < n; ++i) {
      logits[i] = (first + i) * layout.logits_strides[0];
      grad[i] = (first + i) * layout.grad_strides[0];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = first + i, at = 0, grad_at = 0;
    for (int d = layout.dims - 1; d >= 0; --d) {
      const int64_t index = rest % layout.sizes[d];
      rest /= layout.sizes[d];
      at += index * layout.logits_strides[d];
      grad_at += index * layout.grad_strides[d];
    }
    logits[i] = at;
    grad[i] = grad_at;
  }
}

// Sum of row losses, in double whatever the lanes: the order of additions does not depend on the threads.
template <class S>
struct LossSum {
  using Wide = typename Vec<S>::Wide;
  Wide lanes = {};

  DRSL_FN void add(Vec<S> loss) { lanes += __builtin_convertvector(loss.v, Wide); }
  double total() const {
    double sum = 0;
    for (int i = 0; i < Vec<S>::kLanes; ++i) sum += lanes[i];
    return sum;
  }
};

// A sum that keeps what its additions round off: its error does not grow with their number. Infinities go through.
template <class S>
struct ExactSum {
  Vec<S> sum, low;

  DRSL_FN void add(Vec<S> x) {
    const Vec<S> next = sum + x, x_seen = next - sum;
    low = low + ((sum - (next - x_seen)) + (x - x_seen));
    sum = next;
  }
  DRSL_FN Vec<S> total() const { return sum + select(abs_(low) < infinity<Vec<S>>(), low, Vec<S>(S(0))); }
};

// Gradient of a block of rows, each row in its lane, scaled: with e_k = exp(z_k - M),
//   k != y:  e_k (a + b e_k) + c (z_k - max) + offset - smooth u_k        k == y:  label
template <class S>
struct BlockGrad {
  Vec<S> a, b, c, offset, max, smooth, label;
};

template <class S>
DRSL_FN BlockGrad<S> quiet(const BlockGrad<S>& g) {
  return {quiet(g.a), quiet(g.b), quiet(g.c), quiet(g.offset), quiet(g.max), quiet(g.smooth), quiet(g.label)};
}

// h and V of a row's rest from its deviations from a rounded mean: their sum corrects the rounding.
template <class V>
struct Moments {
  V depth, variance;
};

template <class V>
DRSL_FN Moments<V> corrected_moments(V max, V mean, V deviations, V squares, V count) {
  const V n = select(count > V(1), count, V(1));
  const V drift = select(abs_(deviations) < infinity<V>(), deviations / n, V(0));  // it may overflow
  return {(max - mean) - drift, select(squares == infinity<V>(), squares, squares - deviations * drift)};
}

template <class S>
DRSL_FN Vec<S> read_rows(const void* rows, int64_t first, int64_t n) {
  return load_first(static_cast<const S*>(rows) + first, n);
}

template <class S>
DRSL_FN void write_rows(void* rows, int64_t first, int64_t n, Vec<S> x) {
  if (rows) store_first(static_cast<S*>(rows) + first, x, n);
}

template <class S>
DRSL_FN Vec<S> upstream_of(const CallInfo<S>& call, int64_t first, int64_t n) {
  if (!call.upstream) return Vec<S>(S(1));
  return call.task.upstream_stride ? read_rows<S>(call.upstream, first, n) : Vec<S>(*call.upstream);
}

// The labels of rows first .. first + n - 1, one per lane; lanes that hold no row that counts have label 0.
template <class S>
struct BlockLabels {
  typename Vec<S>::Bits number;
  Mask<S> valid;
};

template <class S>
DRSL_FN BlockLabels<S> block_labels(const CallInfo<S>& call, int64_t first, int64_t n) {
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t ignore = call.task.ignore_index;
  const int64_t* labels = call.task.labels + first;
  int64_t filled[kLanes];
  if (n < kLanes) {
    for (int i = 0; i < kLanes; ++i) filled[i] = i < n ? labels[i] : ignore;
    labels = filled;
  }
  using Labels = LaneTypes<double>::Bits;  // of int64, so that float takes two of them
  using Part = typename LaneTypes<S>::LabelPart;
  constexpr int kParts = kLanes / Vec<double>::kLanes;
  Part number[kParts], valid[kParts];
  for (int i = 0; i < kParts; ++i) {
    Labels part;
    memcpy(&part, labels + i * Vec<double>::kLanes, sizeof(part));
    const Labels counts = part != ignore;
    number[i] = __builtin_convertvector(part & counts, Part);
    valid[i] = __builtin_convertvector(counts, Part);
  }
  BlockLabels<S> result;
  memcpy(&result.number, number, sizeof(number));
  memcpy(&result.valid.v, valid, sizeof(valid));
  return result;
}

// u_y of rows first .. first + n - 1.
template <class S>
DRSL_FN Vec<S> label_weights(const CallInfo<S>& call, int64_t first, int64_t n, const BlockLabels<S>& labels) {
  if (!call.class_weights) return Vec<S>(S(1));
  S weight[Vec<S>::kLanes] = {};
  for (int i = 0; i < n; ++i) weight[i] = call.weights_of_row(first + i)[labels.number[i]];
  return load(static_cast<const S*>(weight));
}

// m of rows first .. first + n - 1.
template <class S>
DRSL_FN Vec<S> label_margins(const CallInfo<S>& call, int64_t n, const BlockLabels<S>& labels) {
  if (!call.class_margins) return Vec<S>(S(call.task.margin));
  S margin[Vec<S>::kLanes] = {};
  for (int i = 0; i < n; ++i) margin[i] = call.class_margins[labels.number[i]];
  return load(static_cast<const S*>(margin));
}

// What a class of weight u and logit v adds to U and to sum u_k (M - z_k). A masked one is left out, but a probability
// of one counts and costs infinitely much.
template <class S>
struct WeightedShare {
  Vec<S> weight, depth;
};

template <class S>
DRSL_FN WeightedShare<S> weighted_share(Vec<S> u, Vec<S> v, Vec<S> max, bool soft) {
  const Vec<S> zero(S(0));
  const Mask<S> present = v != -infinity<Vec<S>>();
  const Vec<S> masked = soft ? select(u == zero, zero, u * infinity<Vec<S>>()) : zero;
  return {soft ? u : select(present, u, zero), select(present, u * (max - v), masked)};
}

// `saved` of a task, for rows first .. first + n - 1.
template <class S, class Visit>
DRSL_FN void visit_saved(const Task& t, int64_t first, BlockGrad<S>& block, Vec<S>& shift, Visit visit) {
  Vec<S>* const fields[] = {&shift,   &block.a,      &block.b,   &block.label,
                            &block.c, &block.offset, &block.max, &block.smooth};
  for (int64_t i = 0; i < saved_fields(t); ++i) visit(static_cast<S*>(t.saved) + i * t.rows + first, *fields[i]);
}

template <class S>
struct SavedBlock {
  BlockGrad<S> grad;
  Vec<S> shift;
};

// As they were saved, times the upstream gradient.
template <class S>
DRSL_PASS SavedBlock<S> load_saved(const CallInfo<S>& call, int64_t first, int64_t n) {
  const Task& t = call.task;
  const Vec<S> zero(S(0));
  SavedBlock<S> saved{{zero, zero, zero, zero, zero, zero, zero}, zero};
  BlockGrad<S>& block = saved.grad;
  visit_saved(t, first, block, saved.shift, [&](const S* field, Vec<S>& x) { x = load_first(field, n); });
  const Vec<S> scale = upstream_of(call, first, n);
  Vec<S>* const scaled[] = {&block.a, &block.b, &block.label, &block.c, &block.offset, &block.smooth};
  for (Vec<S>* x : scaled) *x = *x * scale;
  return saved;
}

// Losses, outputs and gradient coefficients of rows first .. first + n - 1. Lanes of ignored rows give zeros.
// rest_weight and rest_depth are U and M - nu; where the call has no class weights they are n and h.
template <class S>
DRSL_PASS BlockGrad<S> finish_block(const CallInfo<S>& call, int64_t first, int64_t n, const BlockLabels<S>& labels,
                                    const RowStats<Vec<S>>& stats, const Vec<S>& label_logit, const Vec<S>& rest_weight,
                                    const Vec<S>& rest_depth, LossSum<S>& sum) {
  const Task& t = call.task;
  const Vec<S> zero(S(0)), one(S(1));
  const Mask<S> valid = labels.valid;
  const Vec<S> weight = label_weights(call, first, n, labels);
  const Vec<S> tau = call.tau_rows ? read_rows<S>(call.tau_rows, first, n) : Vec<S>(S(t.tau));

  const RowInput<Vec<S>> in{label_logit, label_margins(call, n, labels), tau, weight, rest_weight, rest_depth};
  const RowLoss<Vec<S>> row = row_loss(call.params, stats, in);
  const Vec<S> loss = select(valid, row.loss, zero);
  sum.add(loss);
  write_rows(t.loss, first, n, loss);
  write_rows(t.cross_entropy, first, n, select(valid, row.cross_entropy, zero));
  write_rows(t.distance_out, first, n, select(valid, row.distance, zero));
  write_rows(t.margin_out, first, n, select(valid, row.margin, zero));
  write_rows(t.tau_grad, first, n, select(valid, row.tau_slope, zero));

  const Vec<S> scale = Vec<S>(S(t.grad_scale)) * upstream_of(call, first, n);
  const Vec<S> per_sum = one / select(stats.sum_exp == zero, one, stats.sum_exp);
  // Where c is 0 the moments do not count, even if they overflowed.
  const Mask<S> flat = row.c == zero;
  const Vec<S> smooth = row.smooth * scale;
  const Vec<S> d = (call.class_weights ? row.d : row.d + row.smooth) * scale;  // without class weights u_k = 1
  BlockGrad<S> block{row.a * scale * per_sum,
                     row.b * scale * per_sum * per_sum,
                     row.c * scale,
                     select(flat, zero, row.c * scale * stats.depth) - d,
                     select(flat, zero, stats.max),
                     smooth,
                     row.label * scale};
  if (t.saved && !t.from_saved) {
    Vec<S> shift = select(stats.max == -infinity<Vec<S>>(), zero, stats.max);
    visit_saved(t, first, block, shift, [&](S* field, Vec<S> x) { store_first(field, x, n); });
  }
  return block;
}

}  // namespace DRSL_ISA
}  // namespace drsl
