// Losses of another activation than softmax: a block of rows is transformed into scratch, the kernels run on that, and
// what they find is the gradient but for the slope of the transformation. The block stays in the cache, so the logits
// come from memory once. Relies on row_kernel.h (for the size and padding of a block) and tiles.h; kernels.cpp relies
// on it.
#pragma once

#include "row_kernel.h"
#include "tiles.h"

namespace drsl {
inline namespace DRSL_ISA {

template <class S>
struct TransformedLogit {
  Vec<S> u, slope;
};

// sigsoftmax_logit and sigsoftmax_slope, which share an exponential.
template <class S>
DRSL_FN TransformedLogit<S> sigsoftmax(Vec<S> z) {
  const Vec<S> tail = exp_(-abs_(z)), one(S(1));
  const Mask<S> above = z > Vec<S>(S(0));
  return {select(above, z, z + z) - log1p_(tail), one + select(above, tail, one) / (one + tail)};
}

// Where rows and classes of a block in scratch lie: class by class, the rows side by side, or row by row.
struct BlockStrides {
  int64_t rows, row, cls;
};

template <class S>
DRSL_FN BlockStrides block_strides(int64_t classes, bool tiles) {
  if (tiles) return {Vec<S>::kLanes, 1, Vec<S>::kLanes};
  return {block_rows<S>(classes), padded<S>(classes), 1};
}

// A row of z as u and, with kGrad, slopes.
template <bool kGrad, class D, class S = Accumulator<D>>
DRSL_PASS void transform_row(const D* z, int64_t classes, S* u, S* slopes) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  for (int64_t k = 0; k < classes; k += kLanes) {
    const int64_t n = classes - k < kLanes ? classes - k : kLanes;
    const TransformedLogit<S> x = sigsoftmax<S>(n == kLanes ? load(z + k) : load_first(z + k, n));
    store(u + k, x.u);  // the row is padded
    if constexpr (kGrad) store(slopes + k, x.slope);
  }
}

template <class D, class S = Accumulator<D>>
DRSL_PASS void write_times_slopes(const S* grads, const S* slopes, int64_t classes, D* out) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  for (int64_t k = 0; k < classes; k += kLanes) {
    const int64_t n = classes - k < kLanes ? classes - k : kLanes;
    const Vec<S> g = load(grads + k) * load(slopes + k);
    if (n == kLanes) store(out + k, g);
    else store_first(out + k, g, n);
  }
}

// The task of rows first .. first + n - 1, with everything that it has per row but logits and gradient.
template <class S>
Task rows_from(const Task& t, int64_t first, int64_t n) {
  const auto in = [](const void* p, int64_t at) { return p ? static_cast<const S*>(p) + at : nullptr; };
  const auto out = [](void* p, int64_t at) { return p ? static_cast<S*>(p) + at : nullptr; };
  Task rows = t;
  rows.rows = n;
  rows.labels = t.labels + first;
  if (t.soft) rows.class_weights = in(t.class_weights, first * t.classes);
  rows.tau_rows = in(t.tau_rows, first);
  rows.upstream = in(t.upstream, first * t.upstream_stride);
  rows.loss = out(t.loss, first);
  rows.cross_entropy = out(t.cross_entropy, first);
  rows.distance_out = out(t.distance_out, first);
  rows.margin_out = out(t.margin_out, first);
  rows.tau_grad = out(t.tau_grad, first);
  return rows;
}

// What a thread holds of a block: transformed logits, and for a gradient their slopes and the gradient by them.
template <class S>
DRSL_FN int64_t block_elements(const Task& t, const BlockStrides& block) {
  const int64_t matrix = block.rows * (block.cls == 1 ? block.row : t.classes);
  return (t.grad ? 3 : 1) * matrix;
}

// The task of such a block whose logits and gradient lie at `block`.
template <class S>
struct TransformedTask {
  Task task;
  int64_t size, step;

  TransformedTask(const Task& t, int64_t first, int64_t n, const BlockStrides& block, S* scratch)
      : task(rows_from<S>(t, first, n)), size(n), step(block.row) {
    const int64_t matrix = block_elements<S>(t, block) / (t.grad ? 3 : 1);
    task.activation = Activation::softmax;
    task.dtype = sizeof(S) == 8 ? DType::float64 : DType::float32;
    task.logits = scratch;
    task.grad = t.grad ? scratch + 2 * matrix : nullptr;
    task.layout = {1, &size, &step, &step, block.cls, block.cls};
  }
  TransformedTask(const TransformedTask&) = delete;

  S* logits() const { return const_cast<S*>(static_cast<const S*>(task.logits)); }
  S* grads() const { return static_cast<S*>(task.grad); }
  S* slopes() const { return task.grad ? logits() + (grads() - logits()) / 2 : nullptr; }
};

// A block class by class: `run` computes the loss of a task.
template <bool kGrad, class D, class Run, class S = Accumulator<D>>
DRSL_FN double transformed_tile(const Call<D>& call, int64_t first, const TransformedTask<S>& block, Run run) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  const int64_t n = block.size;
  int64_t offsets[kLanes], grad_offsets[kLanes];
  row_offsets(t.layout, first, n, offsets, grad_offsets);
  S *const u = block.logits(), *const slopes = block.slopes();
  read_tile(call.logits, offsets, n, t.classes, t.layout.logits_class_stride, u, [&](int64_t c, Vec<S> z) {
    const TransformedLogit<S> x = sigsoftmax<S>(z);
    store(u + c * kLanes, x.u);
    if constexpr (kGrad) store(slopes + c * kLanes, x.slope);
  });
  const double loss = run(block.task);
  if constexpr (kGrad) {
    const Mask<S> valid = block_labels<S>(call, first, n).valid;  // an ignored row may hold NaN
    const S* const grads = block.grads();
    write_tile(call.grad, grad_offsets, n, t.classes, t.layout.grad_class_stride, [&](int64_t c) {
      const Vec<S> g = load(grads + c * kLanes), slope = load(static_cast<const S*>(slopes) + c * kLanes);
      return select(valid, g * slope, Vec<S>(S(0)));
    });
  }
  return loss;
}

// A block row by row.
template <bool kGrad, class D, class Run, class S = Accumulator<D>>
DRSL_FN double transformed_rows(const Call<D>& call, int64_t first, const TransformedTask<S>& block, Run run) {
  const Task& t = call.task;
  int64_t offsets[Vec<S>::kLanes], grad_offsets[Vec<S>::kLanes];
  row_offsets(t.layout, first, block.size, offsets, grad_offsets);
  for (int64_t i = 0; i < block.size; ++i) {
    if (call.ignored(first + i)) continue;
    S* const slopes = kGrad ? block.slopes() + i * block.step : nullptr;
    transform_row<kGrad>(call.logits + offsets[i], t.classes, block.logits() + i * block.step, slopes);
  }
  const double loss = run(block.task);
  if constexpr (kGrad) {
    for (int64_t i = 0; i < block.size; ++i) {
      D* const out = call.grad + grad_offsets[i];
      if (call.ignored(first + i)) memset(static_cast<void*>(out), 0, t.classes * sizeof(D));
      else write_times_slopes(block.grads() + i * block.step, block.slopes() + i * block.step, t.classes, out);
    }
  }
  return loss;
}

}  // namespace DRSL_ISA
}  // namespace drsl
