// Rows with few classes, or with classes that are not adjacent in memory: a tile of kLanes rows at a time, one
// row per lane, held class by class in scratch. Vectors then run across rows, so ten classes cost ten vectors
// for sixteen rows, and no step reduces across lanes. Pass 1 reads the tile, pass 2 turns it into exponentials and sums
// them, pass 3 writes the gradient. Relies on call.h and tiles.h; kernels.cpp relies on it.
#pragma once

#include "call.h"
#include "tiles.h"

namespace drsl {
inline namespace DRSL_ISA {

// Lines to fetch, a class at a time: of this tile's gradient in pass 1, of the tile that is next in pass 2. The memory
// takes its time for each, so neither pass should ask for both.
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
          reinterpret_cast<const char*>(call.grad ? call.grad + grad_offsets[0] : nullptr),
          step(layout.logits_class_stride), step(layout.grad_class_stride)};
}

// ---------------------------------------------------------------------------------------------------------
// Passes over a tile

template <class S>
DRSL_FN Mask<S> is_label(const BlockLabels<S>& labels, int64_t c) {
  return {labels.number == static_cast<typename Vec<S>::Int>(c)};
}

template <class S>
struct TileTop {
  Vec<S> max, mean, count, label_logit;
};

// Each row's label in a tile, exchanged for the class beside it: a maximum over the tile is then one over the rests, and
// no class needs to be compared with the label.
template <class S>
class SwappedLabels {
 public:
  DRSL_FN SwappedLabels(const BlockLabels<S>& labels, S* tile) {
    constexpr int kLanes = Vec<S>::kLanes;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t y = labels.number[i];
      at_[i] = tile + y * kLanes + i;
      own_[i] = *at_[i];
      beside_[i] = tile[(y > 0 ? y - 1 : 1) * kLanes + i];
    }
    for (int i = 0; i < kLanes; ++i) *at_[i] = beside_[i];
  }
  DRSL_FN Vec<S> label_logit() const { return load(own_); }
  DRSL_FN Vec<S> neighbour() const { return load(beside_); }
  DRSL_FN void mask() {
    for (S* at : at_) *at = -infinity<S>();
  }

 private:
  S* at_[Vec<S>::kLanes];
  S own_[Vec<S>::kLanes], beside_[Vec<S>::kLanes];
};

constexpr int64_t kFewestSwapped = 96;  // classes; with fewer it is quicker to compare each with the label

// Pass 1: M, a rounded mu, n and z_y of each row. The tile holds the logits, with -inf in place of each row's label.
template <bool kGrad, class D, class S = Accumulator<D>>
DRSL_PASS TileTop<S> take_tile(const Call<D>& call, const int64_t* offsets, int64_t n, const BlockLabels<S>& labels,
                               S* tile, const TileLines& lines) {
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t classes = call.task.classes;
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0)), one(S(1));
  Vec<S> max = lowest, sum = zero, label_logit = zero;
  const char* line = lines.grad;
  const auto ask_for_line = [&] {
    if constexpr (kGrad) {
      prefetch_to_write(line);
      line += lines.grad_step;
    }
  };
  const bool quads = quads_fit<D>(classes, call.task.layout.logits_class_stride);
  if (quads && classes >= kFewestSwapped) {
    if constexpr (kQuadClasses<D> > 0) {
      read_quads(call.logits, offsets, n, classes, tile);
      SwappedLabels<S> swapped(labels, tile);
      Vec<S> other_max = lowest, other_sum = zero;
      const auto take = [&](int64_t c, Vec<S>& most, Vec<S>& total) {
        const Vec<S> v = load(static_cast<const S*>(tile) + c * kLanes);
        ask_for_line();
        most = max_(most, v);
        total = total + v;
      };
      for (int64_t c = 0; c + 2 <= classes; c += 2) {
        take(c, max, sum);
        take(c + 1, other_max, other_sum);
      }
      if (classes % 2) take(classes - 1, max, sum);
      max = max_(max, other_max);
      sum = (sum + other_sum) - swapped.neighbour();
      label_logit = swapped.label_logit();
      swapped.mask();
    }
  } else {
    read_tile(call.logits, offsets, n, classes, call.task.layout.logits_class_stride, tile, [&](int64_t c, Vec<S> v) {
      const Mask<S> is = is_label(labels, c);
      ask_for_line();
      label_logit = select(is, v, label_logit);
      sum = sum + select(is, zero, v);
      const Vec<S> rest = select(is, lowest, v);
      max = max_(max, rest);
      store(tile + c * kLanes, rest);
    });
  }
  const S others = S(classes > 2 ? classes - 1 : 1);
  const Vec<S> share(S(1) / others);
  Vec<S> mean = sum * share, count(S(classes - 1));
  const Mask<S> odd{~(abs_(sum) < infinity<Vec<S>>()).v};  // a class at -inf, an overflow, or NaN
  if (any(odd)) {
    Vec<S> shares = zero, found = zero;  // a sum of shares z_k / n cannot overflow
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<S> v = load(static_cast<const S*>(tile) + c * kLanes);
      const Mask<S> present = v != lowest;
      shares = shares + select(present, v, zero) * share;
      found = found + select(present, one, zero);
    }
    mean = select(odd, shares * (Vec<S>(others) / select(found > one, found, one)), mean);
    count = select(odd, found, count);
  }
  return {max, mean, count, label_logit};
}

// Class weights by class: of the call, or of a tile of class probabilities.
template <class S>
DRSL_FN Vec<S> weight_of(const CallInfo<S>& call, const S* tile, int64_t c) {
  return call.task.soft ? load(tile + c * Vec<S>::kLanes) : Vec<S>(call.class_weights[c]);
}

// Sums of so many classes are added up among themselves: the error of a longer one would grow with the classes, and
// equal weights round in one direction.
template <class Terms>
constexpr int64_t kSummed = Terms::kWeightedMean ? 16 : 256;

template <class Number>
struct TileSums {
  Number exps, exps2, steps, squares, weight, weighted_depth;
};

template <class Terms, class S>
DRSL_FN void add_part(TileSums<ExactSum<S>>& sums, const TileSums<Vec<S>>& part) {
  sums.exps.add(part.exps);
  if constexpr (Terms::kSquares) sums.exps2.add(part.exps2);
  if constexpr (Terms::kMoments) {
    sums.steps.add(part.steps);
    sums.squares.add(part.squares);
  }
  if constexpr (Terms::kWeightedMean) {
    sums.weight.add(part.weight);
    sums.weighted_depth.add(part.weighted_depth);
  }
}

// Pass 2: losses, outputs and gradient coefficients; with kGrad the exponentials, for pass 3.
template <class Terms, bool kGrad, class S>
DRSL_PASS BlockGrad<S> finish_tile(const CallInfo<S>& call, int64_t first, int64_t n, const BlockLabels<S>& labels,
                                   const TileTop<S>& top, const S* logits, S* exps, const S* weights,
                                   const TileLines& lines, LossSum<S>& sum) {
  constexpr int kLanes = Vec<S>::kLanes;
  const int64_t classes = call.task.classes;
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  const Vec<S> shift = select(top.max == lowest, zero, top.max);
  TileSums<ExactSum<S>> sums = {};
  const char* line = lines.next;
  for (int64_t from = 0; from < classes; from += kSummed<Terms>) {
    const int64_t to = classes - from < kSummed<Terms> ? classes : from + kSummed<Terms>;
    TileSums<Vec<S>> part = {};
    for (int64_t c = from; c < to; ++c) {
      const Vec<S> v = load(logits + c * kLanes);
      const Vec<S> e = exp_of_fall(v - shift);
      prefetch(line);
      line += lines.next_step;
      part.exps = part.exps + e;
      if constexpr (Terms::kSquares) part.exps2 = part.exps2 + e * e;
      if constexpr (Terms::kMoments) {
        const Mask<S> present = v != lowest;
        const Vec<S> step = select(present, v - top.mean, zero);
        part.steps = part.steps + step;
        part.squares = part.squares + step * step;
        if constexpr (Terms::kWeightedMean) {
          const Vec<S> u = select(is_label(labels, c), zero, weight_of(call, weights, c));
          const WeightedShare<S> adds = weighted_share(u, v, top.max, call.task.soft);
          part.weight = part.weight + adds.weight;
          part.weighted_depth = part.weighted_depth + adds.depth;
        }
      }
      if constexpr (kGrad) store(exps + c * kLanes, e);
    }
    add_part<Terms>(sums, part);
  }
  const Moments<Vec<S>> moments =
      corrected_moments(top.max, top.mean, sums.steps.total(), sums.squares.total(), top.count);
  // A NaN in a row, which need not show in its exponentials, shows in its mean.
  const RowStats<Vec<S>> stats{
      top.max,  sums.exps.total() + (top.mean - top.mean), sums.exps2.total(), moments.depth, moments.variance,
      top.count};
  Vec<S> weight = top.count, weighted_depth = moments.depth;
  if constexpr (Terms::kWeightedMean) {
    weight = sums.weight.total();
    weighted_depth = sums.weighted_depth.total() / select(weight == zero, Vec<S>(S(1)), weight);
  }
  return finish_block<S>(call, first, n, labels, stats, top.label_logit, weight, weighted_depth, sum);
}

// Pass 3 by quads. The labels' elements and ignored rows, which may hold NaN, are overwritten at the end.
template <class Terms, class D>
DRSL_PASS void write_gradient_quads(const Call<D>& call, const int64_t* grad_offsets, int64_t n,
                                    const BlockLabels<float>& labels, const BlockGrad<float>& block,
                                    const float* logits, const float* exps, const float* weights, D* spare) {
  const Task& t = call.task;
  write_quads(call.grad, grad_offsets, n, t.classes, spare, [&](int low, int high) {
    const auto rows = [&](const Vec<float>& x) {
      const float* const lanes = reinterpret_cast<const float*>(&x);
      return load_floats(lanes + low, lanes + high);
    };
    const QuadFloats a = rows(block.a), b = rows(block.b), c = rows(block.c), offset = rows(block.offset);
    const QuadFloats max = rows(block.max), smooth = rows(block.smooth), zero = {};
    return [=, &t, &call](int64_t at, int64_t at_high) {
      const QuadFloats e = load_floats(exps + at, exps + at_high);
      QuadFloats g = e * a;
      if constexpr (Terms::kSquares) g = e * (a + b * e);
      if constexpr (Terms::kMoments) {
        const QuadFloats v = load_floats(logits + at, logits + at_high);
        QuadFloats step = c * (v - max) + offset, at_masked = zero;
        if constexpr (Terms::kWeightedMean) {
          const auto weight = [&](int64_t i) { return quiet(Vec<float>(call.class_weights[i / kTileLanes])).v[0]; };
          const QuadFloats u =
              t.soft ? load_floats(weights + at, weights + at_high) : both(weight(at), weight(at_high));
          step = step - smooth * u;
          if (t.soft) at_masked = -(smooth * u);
        }
        g = g + (v != -infinity<float>() ? step : at_masked);
      }
      return g;
    };
  });
  D label[kTileLanes];
  store(static_cast<D*>(label), block.label);
  for (int64_t i = 0; i < n; ++i) {
    D* const row = call.grad + grad_offsets[i];
    if (labels.valid.v[i]) row[labels.number[i]] = label[i];
    else memset(static_cast<void*>(row), 0, t.classes * sizeof(D));
  }
}

// Pass 3. An ignored row may hold NaN; its gradient is 0 all the same.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_PASS void write_tile_gradient(const Call<D>& call, const int64_t* grad_offsets, int64_t n,
                                   const BlockLabels<S>& labels, const BlockGrad<S>& block, const S* logits,
                                   const S* exps, const S* weights) {
  constexpr int kLanes = Vec<S>::kLanes;
  const Vec<S> lowest = -infinity<Vec<S>>(), zero(S(0));
  const Task& t = call.task;
  write_tile(call.grad, grad_offsets, n, t.classes, t.layout.grad_class_stride, [&](int64_t c) {
    const Vec<S> e = load(exps + c * kLanes);
    Vec<S> g = e * block.a;
    if constexpr (Terms::kSquares) g = e * (block.a + block.b * e);
    if constexpr (Terms::kMoments) {
      const Vec<S> v = load(logits + c * kLanes);
      Vec<S> step = block.c * (v - block.max) + block.offset;
      Vec<S> at_masked = zero;
      if constexpr (Terms::kWeightedMean) {
        const Vec<S> u = weight_of<S>(call, weights, c);
        step = step - block.smooth * u;
        if (t.soft) at_masked = -(block.smooth * u);
      }
      g = g + select(v != lowest, step, at_masked);
    }
    return select(labels.valid, select(is_label(labels, c), block.label, g), zero);
  });
}

template <class S>
DRSL_FN int64_t tile_scratch_elements(const Task& t) {
  return (t.soft ? 3 : 2) * t.classes * Vec<S>::kLanes + t.classes;
}

// Rows first .. first + n - 1, n <= kLanes, where they lie, and what scratch holds: a tile of class probabilities, where
// the call is soft, one of logits, one of exponentials, and a spare row.
template <class Terms, class D, class S = Accumulator<D>>
class Tile {
  static constexpr int kLanes = Vec<S>::kLanes;

 public:
  DRSL_FN Tile(const Call<D>& call, int64_t first, int64_t n, S* scratch)
      : call_(call), first_(first), n_(n), weights_(scratch) {
    const Task& t = call.task;
    logits_ = weights_ + (t.soft ? t.classes * kLanes : 0);
    exps_ = logits_ + t.classes * kLanes;
    row_offsets(t.layout, first, n, offsets_, grad_offsets_);
    if constexpr (Terms::kWeightedMean) {
      if (t.soft) read_weights();
    }
    labels_ = block_labels<S>(call, first, n);
    lines_ = tile_lines(call, n, offsets_, grad_offsets_);
  }

  // Passes 1 and 2.
  template <bool kGrad>
  DRSL_FN BlockGrad<S> finish(LossSum<S>& sum) {
    const TileTop<S> top = take_tile<kGrad>(call_, offsets_, n_, labels_, logits_, lines_);
    return finish_tile<Terms, kGrad, S>(call_, first_, n_, labels_, top, logits_, exps_, weights_, lines_, sum);
  }

  // In place of both, where an earlier run saved what they find.
  DRSL_FN BlockGrad<S> from_saved() {
    const Task& t = call_.task;
    const SavedBlock<S> saved = load_saved<S>(call_, first_, n_);
    const char* line = lines_.next;
    read_tile(call_.logits, offsets_, n_, t.classes, t.layout.logits_class_stride, logits_, [&](int64_t c, Vec<S> v) {
      prefetch(line);
      line += lines_.next_step;
      if constexpr (Terms::kMoments) store(logits_ + c * kLanes, v);
      store(exps_ + c * kLanes, exp_of_fall(v - saved.shift));
    });
    return saved.grad;
  }

  // Pass 3.
  DRSL_FN void write(const BlockGrad<S>& block) {
    const Task& t = call_.task;
    if constexpr (kQuadClasses<D> > 0) {
      if (quads_fit<D>(t.classes, t.layout.grad_class_stride)) {
        D* const spare = reinterpret_cast<D*>(exps_ + t.classes * kLanes);
        const BlockGrad<S> numbers = sizeof(D) == 2 ? quiet(block) : block;
        return write_gradient_quads<Terms>(call_, grad_offsets_, n_, labels_, numbers, logits_, exps_, weights_, spare);
      }
    }
    write_tile_gradient<Terms>(call_, grad_offsets_, n_, labels_, block, logits_, exps_, weights_);
  }

 private:
  DRSL_FN void read_weights() {
    const int64_t classes = call_.task.classes;
    int64_t rows[kLanes];
    for (int i = 0; i < n_; ++i) rows[i] = i * classes;
    read_tile(call_.weights_of_row(first_), rows, n_, classes, 1, weights_,
              [&](int64_t c, Vec<S> u) { store(weights_ + c * kLanes, quiet(u)); });
  }

  const Call<D>& call_;
  const int64_t first_, n_;
  S *const weights_, *logits_, *exps_;
  int64_t offsets_[kLanes], grad_offsets_[kLanes];
  BlockLabels<S> labels_;
  TileLines lines_;
};

template <class Terms, bool kGrad, class D, class S = Accumulator<D>>
DRSL_FN void tile_block(const Call<D>& call, int64_t first, int64_t n, S* scratch, LossSum<S>& sum) {
  Tile<Terms, D> tile(call, first, n, scratch);
  const BlockGrad<S> block = tile.template finish<kGrad>(sum);
  if constexpr (kGrad) tile.write(block);
}

template <class Terms, class D, class S = Accumulator<D>>
DRSL_FN void tile_block_from_saved(const Call<D>& call, int64_t first, int64_t n, S* scratch) {
  Tile<Terms, D> tile(call, first, n, scratch);
  tile.write(tile.from_saved());
}

}  // namespace DRSL_ISA
}  // namespace drsl
