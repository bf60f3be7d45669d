// Rows with few classes, or with classes that are not adjacent in memory: a tile of kLanes rows at a time, one
// row per lane, held class by class in scratch. Vectors then run across rows, so ten classes cost ten vectors
// for sixteen rows, and no step reduces across lanes. Relies on call.h; kernels.cpp relies on it.
#pragma once

#include "call.h"

namespace drsl {
inline namespace DRSL_ISA {

// How the rows of a tile lie in memory.
enum class TileShape { adjacent_classes, adjacent_rows, scattered };

template <class S>
DRSL_FN TileShape tile_shape(const int64_t* offsets, int64_t n, int64_t class_stride) {
  if (class_stride == 1) return TileShape::adjacent_classes;
  bool adjacent = n == Vec<S>::kLanes;
  for (int64_t i = 1; i < n; ++i) adjacent &= offsets[i] == offsets[0] + i;
  return adjacent ? TileShape::adjacent_rows : TileShape::scattered;
}

// visit(first class, number of classes) for squares of kLanes classes that cover a row. The last one reaches back over
// classes that are done already, since a part of a vector costs more than a whole one; fewer classes are one part.
template <class S, class Visit>
DRSL_FN void sweep_squares(int64_t classes, Visit visit) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  if (classes < kLanes) return visit(int64_t(0), classes);
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) visit(c, kLanes);
  if (classes % kLanes) visit(classes - kLanes, kLanes);
}

// Memory -> scratch: tile[c * kLanes + lane] = logit of class c in row `lane`; 0 in lanes from n on.
template <class D, class S = Accumulator<D>>
DRSL_PASS void load_tile(const D* base, const int64_t* offsets, int64_t n, int64_t classes, int64_t stride, S* tile) {
  constexpr int kLanes = Vec<S>::kLanes;
  switch (tile_shape<S>(offsets, n, stride)) {
    case TileShape::adjacent_classes:
      sweep_squares<S>(classes, [&](int64_t c, int64_t width) {
        Vec<S> square[kLanes];
        const auto row = [&](int i) { return base + offsets[i] + c; };
        if (n < kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = i < n ? load_first(row(i), width) : Vec<S>(S(0));
        } else if (width < kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = load_first(row(i), width);
        } else {
          for (int i = 0; i < kLanes; ++i) square[i] = load(row(i));
        }
        transpose(square);
        for (int j = 0; j < width; ++j) store(tile + (c + j) * kLanes, square[j]);
      });
      return;
    case TileShape::adjacent_rows:
      for (int64_t c = 0; c < classes; ++c) store(tile + c * kLanes, load(base + offsets[0] + c * stride));
      return;
    case TileShape::scattered:
      for (int64_t c = 0; c < classes; ++c) {
        for (int i = 0; i < kLanes; ++i) {
          tile[c * kLanes + i] = i < n ? load_one(base + offsets[i] + c * stride) : S(0);
        }
      }
  }
}

// Scratch -> memory, the way back.
template <class D, class S = Accumulator<D>>
DRSL_PASS void store_tile(D* base, const int64_t* offsets, int64_t n, int64_t classes, int64_t stride, const S* tile) {
  constexpr int kLanes = Vec<S>::kLanes;
  switch (tile_shape<S>(offsets, n, stride)) {
    case TileShape::adjacent_classes:
      sweep_squares<S>(classes, [&](int64_t c, int64_t width) {
        Vec<S> square[kLanes];
        const auto row = [&](int i) { return base + offsets[i] + c; };
        for (int j = 0; j < kLanes; ++j) square[j] = j < width ? load(tile + (c + j) * kLanes) : Vec<S>(S(0));
        transpose(square);
        if (width < kLanes) {
          for (int i = 0; i < n; ++i) store_first(row(i), square[i], width);
        } else {
          for (int i = 0; i < n; ++i) store(row(i), square[i]);
        }
      });
      return;
    case TileShape::adjacent_rows:
      for (int64_t c = 0; c < classes; ++c) store(base + offsets[0] + c * stride, load(tile + c * kLanes));
      return;
    case TileShape::scattered:
      for (int64_t c = 0; c < classes; ++c) {
        for (int i = 0; i < n; ++i) store_one(base + offsets[i] + c * stride, tile[c * kLanes + i]);
      }
  }
}

// What pass 1 finds in a tile. Afterwards the tile holds -inf in place of each row's label.
template <class S>
struct TileTop {
  Vec<S> max, mean, count, label_logit;
};

template <class S>
DRSL_FN TileTop<S> top_of_tile(S* tile, int64_t classes, Mask<S> (*is_label)(int64_t, typename Vec<S>::Bits),
                               typename Vec<S>::Bits labels) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), one(S(1));
  const S others = S(classes > 2 ? classes - 1 : 1);
  const Vec<S> share(S(1) / others);
  Vec<S> max = lowest, mean = zero, label_logit = zero;  // a sum of shares z_k / n cannot overflow
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<S> v = load(static_cast<const S*>(tile) + c * kLanes);
    const Mask<S> is = is_label(c, labels);
    label_logit = select(is, v, label_logit);
    mean = mean + select(is, zero, v) * share;
    const Vec<S> rest = select(is, lowest, v);
    max = max_(max, rest);
    store(tile + c * kLanes, rest);
  }
  Vec<S> count(S(classes - 1));
  if (any(Mask<S>{~(mean > lowest).v})) {  // a class at -inf, or NaN
    mean = count = zero;
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<S> v = load(static_cast<const S*>(tile) + c * kLanes);
      const Mask<S> present = v != lowest;
      mean = mean + select(present, v, zero) * share;
      count = count + select(present, one, zero);
    }
    mean = mean * (Vec<S>(others) / select(count > one, count, one));
  }
  return {max, mean, count, label_logit};
}

// Lines to fetch, a class at a time: of the tile that is next, and of this tile's gradient.
struct TileLines {
  const char *next, *grad;
  int64_t next_step, grad_step;
};

template <class D>
DRSL_FN TileLines tile_lines(const Call<D>& call, int64_t n, const int64_t* offsets, const int64_t* grad_offsets) {
  constexpr int64_t kLanes = Vec<Accumulator<D>>::kLanes, kBytes = sizeof(D);
  const RowLayout& layout = call.task.layout;
  const int64_t row_step = n > 1 ? offsets[1] - offsets[0] : 1;
  const auto step = [](int64_t stride) { return kBytes * (stride == 1 ? kLanes : stride); };
  return {reinterpret_cast<const char*>(call.logits + offsets[0] + kLanes * row_step),
          reinterpret_cast<const char*>(call.grad + grad_offsets[0]), step(layout.logits_class_stride),
          step(layout.grad_class_stride)};
}

// From a tile of logits to losses and, with kGrad, a tile of gradients in `exps`. The tile of logits is changed.
// `weights` is the tile of class probabilities; read where the call is soft.
template <class Terms, bool kGrad, class S>
DRSL_PASS void finish_tile(const CallInfo<S>& call, int64_t first, int64_t n, S* logits, S* exps, const S* weights,
                           const TileLines& lines, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  using Bits = typename Vec<S>::Bits;
  using Int = typename Vec<S>::Int;
  const int64_t classes = call.task.classes;
  const bool soft = call.task.soft;
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  const BlockLabels<S> labels = block_labels<S>(call, first, n);
  const auto is_label = [](int64_t c, Bits y) { return Mask<S>{y == static_cast<Int>(c)}; };
  const auto weight_of = [&](int64_t c) { return soft ? load(weights + c * kLanes) : Vec<S>(call.class_weights[c]); };

  const TileTop<S> top = top_of_tile<S>(logits, classes, is_label, labels.number);

  const Vec<S> shift = select(top.max == lowest, zero, top.max);
  Vec<S> sum_exp = zero, sum_exp2 = zero, steps = zero, squares = zero, weight = zero, weighted_depth = zero;
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<S> v = load(static_cast<const S*>(logits) + c * kLanes);
    const Vec<S> e = exp_of_fall(v - shift);
    prefetch(lines.next + c * lines.next_step);
    if constexpr (kGrad) prefetch_to_write(lines.grad + c * lines.grad_step);
    sum_exp = sum_exp + e;
    if constexpr (Terms::kSquares) sum_exp2 = sum_exp2 + e * e;
    if constexpr (Terms::kMoments) {
      const Mask<S> present = v != lowest;
      const Vec<S> step = select(present, v - top.mean, zero);
      steps = steps + step;
      squares = squares + step * step;
      if constexpr (Terms::kWeightedMean) {
        const Vec<S> u = weight_of(c);
        const WeightedShare<S> adds = weighted_share(select(is_label(c, labels.number), zero, u), v, top.max, soft);
        weight = weight + adds.weight;
        weighted_depth = weighted_depth + adds.depth;
      }
    }
    if constexpr (kGrad) store(exps + c * kLanes, e);
  }
  const Moments<Vec<S>> moments = corrected_moments(top.max, top.mean, steps, squares, top.count);
  // A NaN in a row, which need not show in its exponentials, shows in its mean.
  const RowStats<Vec<S>> stats{top.max,  sum_exp + (top.mean - top.mean), sum_exp2, moments.depth, moments.variance,
                               top.count};
  if constexpr (Terms::kWeightedMean) {
    weighted_depth = weighted_depth / select(weight == zero, Vec<S>(S(1)), weight);
  } else {
    weight = top.count;
    weighted_depth = moments.depth;
  }
  const BlockGrad<S> block =
      finish_block<S>(call, first, n, labels, stats, top.label_logit, weight, weighted_depth, sum);

  if constexpr (kGrad) {
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<S> e = load(static_cast<const S*>(exps) + c * kLanes);
      Vec<S> g = e * block.a;
      if constexpr (Terms::kSquares) g = e * (block.a + block.b * e);
      if constexpr (Terms::kMoments) {
        const Vec<S> v = load(static_cast<const S*>(logits) + c * kLanes);
        Vec<S> step = block.c * (v - block.max) + block.offset;
        if constexpr (Terms::kWeightedMean) step = step - block.smooth * weight_of(c);
        g = g + select(v != lowest, step, zero);
      }
      store(exps + c * kLanes, select(is_label(c, labels.number), block.label, g));
    }
    if (any(Mask<S>{~labels.valid.v})) {
      // An ignored row may hold NaN; its gradient is 0 all the same.
      for (int i = 0; i < n; ++i) {
        if (!call.ignored(first + i)) continue;
        for (int64_t c = 0; c < classes; ++c) exps[c * kLanes + i] = S(0);
      }
    }
  }
}

// Rows first .. first + n - 1, n <= kLanes. Scratch holds two tiles: logits, and exponentials that turn into the
// gradient; and a third of class probabilities, where the call is soft.
template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_FN void tile_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Task& t = call.task;
  S* const logits = scratch;
  S* const exps = scratch + t.classes * kLanes;
  int64_t offsets[kLanes], grad_offsets[kLanes];
  row_offsets(t.layout, first, n, offsets, grad_offsets);
  load_tile(call.logits, offsets, n, t.classes, t.layout.logits_class_stride, logits);
  S* const weights = exps + t.classes * kLanes;
  if constexpr (Terms::kWeightedMean) {
    if (t.soft) {
      int64_t rows[kLanes];
      for (int i = 0; i < n; ++i) rows[i] = i * t.classes;
      load_tile<S>(call.weights_of_row(first), rows, n, t.classes, 1, weights);
    }
  }
  finish_tile<Terms, kGrad, S>(call, first, n, logits, exps, weights, tile_lines(call, n, offsets, grad_offsets), sum);
  if constexpr (kGrad) {
    store_tile(call.grad, grad_offsets, n, t.classes, t.layout.grad_class_stride, static_cast<const S*>(exps));
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
