// One row on a device: its statistics in parts that merge, and the step from them to losses, outputs and gradient. The
// twin of cpu/call.h. Relies on reduce.cuh and row_loss.h; the kernels rely on it.
#pragma once

#include "reduce.cuh"

namespace drsl {
namespace cuda {

// exp of one logit. On a device: the exponential instruction, to about 2^-22 (1 + |x|), and 0 for what is subnormal.
DRSL_DEVICE float row_exp(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.44269504f));
  return e;
#else
  return ::expf(x);
#endif
}
DRSL_DEVICE double row_exp(double x) { return ::exp(x); }

// What the softmax is taken of.
template <class Terms, class S>
DRSL_DEVICE S transformed(S z) {
  if constexpr (Terms::kTransformed) return sigsoftmax_logit(z);
  else return z;
}

template <class Terms, int N, class S>
DRSL_DEVICE void transform(S (&z)[N]) {
  if constexpr (Terms::kTransformed) {
    DRSL_UNROLL
    for (int i = 0; i < N; ++i) z[i] = sigsoftmax_logit(z[i]);
  }
}

// Statistics of some classes of the rest of a row. With TermSet::kWeightedMean: U and sum u_k (M - z_k), else 0.
template <class S>
struct Part {
  RowStats<S> stats;
  S weight, weighted_depth;
};

template <class S>
DRSL_DEVICE Part<S> empty_part() {
  return {empty_stats<S>(), S(0), S(0)};
}

template <class Terms, class S>
DRSL_DEVICE Part<S> merge_parts(const Part<S>& x, const Part<S>& y) {
  Part<S> out = {merge(x.stats, y.stats), S(0), S(0)};
  if constexpr (!Terms::kMoments) out.stats.depth = out.stats.variance = S(0);
  if constexpr (Terms::kWeightedMean) {
    const S max = out.stats.max;
    out.weight = x.weight + y.weight;
    out.weighted_depth =
        (x.weighted_depth + x.weight * drop(x.stats.max, max)) + (y.weighted_depth + y.weight * drop(y.stats.max, max));
  }
  return out;
}

// Lane 0 gets the merge of the parts of all lanes of its warp.
template <class Terms, class S>
DRSL_DEVICE Part<S> merge_warp(Part<S> part) {
  DRSL_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const auto above = [&](S x) { return __shfl_down_sync(kAllLanes, x, step); };
    Part<S> other = empty_part<S>();
    other.stats.max = above(part.stats.max);
    other.stats.sum_exp = above(part.stats.sum_exp);
    if constexpr (Terms::kSquares) {
      other.stats.sum_exp2 = above(part.stats.sum_exp2);
      other.stats.count = above(part.stats.count);
    }
    if constexpr (Terms::kMoments) {
      other.stats.depth = above(part.stats.depth);
      other.stats.variance = above(part.stats.variance);
    }
    if constexpr (Terms::kWeightedMean) {
      other.weight = above(part.weight);
      other.weighted_depth = above(part.weighted_depth);
    }
    part = merge_parts<Terms>(part, other);
  }
  return part;
}

// What a masked class of weight u adds to sum u_k (M - z_k): that of a class probability costs infinitely much.
template <class S>
DRSL_DEVICE S masked_depth(S u, bool soft) {
  return soft && u != S(0) ? u * infinity<S>() : S(0);
}

// Add N logits to a part: one exponential each, and one for what was there. Classes at -inf are not in the rest; so
// that the label is not either, the caller puts -inf in its place, and 0 for its weight. u: class weights, or those of
// class probabilities (`soft`); read with kWeightedMean.
template <class Terms, int N, class S>
DRSL_DEVICE void take(Part<S>& part, const S (&z)[N], const S (&u)[N], bool soft) {
  const S lowest = -infinity<S>();
  S top = z[0], bottom = z[0];
  DRSL_UNROLL
  for (int i = 1; i < N; ++i) {
    top = max_(top, z[i]);
    bottom = min_(bottom, z[i]);
  }
  RowStats<S>& stats = part.stats;
  const S max = max_(stats.max, top), shift = max == lowest ? S(0) : max;
  const S deeper = drop(stats.max, max), rescale = row_exp(-deeper);

  S sum = 0, sum2 = 0, count = N;
  DRSL_UNROLL
  for (int i = 0; i < N; ++i) {
    const S e = row_exp(z[i] - shift);
    sum += e;
    if constexpr (Terms::kSquares) sum2 += e * e;
  }
  stats.sum_exp = stats.sum_exp * rescale + sum;
  if constexpr (Terms::kSquares) {
    stats.sum_exp2 = stats.sum_exp2 * (rescale * rescale) + sum2;
    if (bottom == lowest) {
      count = 0;
      DRSL_UNROLL
      for (int i = 0; i < N; ++i) count += z[i] == lowest ? S(0) : S(1);
    }
  }
  if constexpr (Terms::kMoments) {
    const auto depth_of = [&](S x) { return x == lowest ? S(0) : max - x; };
    S depth = 0, variance = 0;
    DRSL_UNROLL
    for (int i = 0; i < N; ++i) depth += depth_of(z[i]);
    depth = count == S(0) ? S(0) : depth / count;
    DRSL_UNROLL
    for (int i = 0; i < N; ++i) {
      const S step = z[i] == lowest ? S(0) : (max - z[i]) - depth;
      variance += step * step;
    }
    const S total = stats.count + count, share = total == S(0) ? S(0) : count / total;
    const S before = stats.depth + deeper, step = depth - before;
    stats.depth = total == S(0) ? S(0) : before * (stats.count / total) + depth * share;
    const S between = stats.count * share;
    // The depths may be infinite, and step^2 may overflow.
    const S squared = before == infinity<S>() ? before : step * step * between;
    stats.variance += variance + (between == S(0) ? S(0) : squared);
    if constexpr (Terms::kWeightedMean) {
      part.weighted_depth += part.weight * deeper;
      DRSL_UNROLL
      for (int i = 0; i < N; ++i) {
        part.weight += z[i] == lowest && !soft ? S(0) : u[i];
        part.weighted_depth += z[i] == lowest ? masked_depth(u[i], soft) : u[i] * (max - z[i]);
      }
    }
  }
  if constexpr (Terms::kSquares) stats.count += count;
  stats.max = max;
}

// ---------------------------------------------------------------------------------------------------------
// From statistics to outputs and gradient

// Gradient of a row, scaled: with e_k = exp(z_k - shift),
//   k != y:  e_k (a + b e_k) + c (z_k - max) + offset - smooth u_k        k == y:  label
template <class S>
struct RowGrad {
  S shift, a, b, c, offset, max, smooth, label;
};

// The slope of the transformation where it gave u.
template <class Terms, class S>
DRSL_DEVICE S slope_at(S u) {
  if constexpr (Terms::kTransformed) return sigsoftmax_slope_from(u);
  else return S(1);
}

// Losses and gradient of row `row`; `writes` says whether this thread is the one to write what is asked for and to add
// to the sum of losses. `scale`: 1 / denominator of the mean. An ignored row gives zeros, a wrong label NaN.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_DEVICE RowGrad<S> finish_row(const Call<D>& call, int64_t row, const RowLabel& y, S label_logit,
                                  const Part<S>& rest, S scale, bool writes, double& loss_sum) {
  const RowStats<S>& stats = rest.stats;
  const S weight = call.weight(row, y);
  RowInput<S> in{label_logit, call.margin_of(y), call.strength(row), weight, stats.count, stats.depth};
  if constexpr (Terms::kWeightedMean) {
    in.rest_weight = rest.weight;
    in.rest_depth = rest.weight == S(0) ? rest.weighted_depth : rest.weighted_depth / rest.weight;
  }
  const RowLoss<S> out = row_loss(call.params, stats, in);
  if (writes) {
    const auto write = [&](S* rows, S value) {
      if (rows) rows[row] = y.counts ? value : S(0);
    };
    write(call.loss, out.loss);
    write(call.cross_entropy, out.cross_entropy);
    write(call.distance, out.distance);
    write(call.margin, out.margin);
    write(call.tau_grad, out.tau_slope);
    if (y.counts) loss_sum += double(out.loss);
  }
  if (!y.counts) return {};
  scale = scale * call.upstream_of(row);
  const S per_sum = S(1) / (stats.sum_exp == S(0) ? S(1) : stats.sum_exp);
  // Where c is 0 the moments do not count, even if they overflowed.
  const bool flat = out.c == S(0);
  const S d = (call.class_weights ? out.d : out.d + out.smooth) * scale;  // without class weights u_k = 1
  const S nan = infinity<S>() - infinity<S>();
  return {stats.max == -infinity<S>() ? S(0) : stats.max,
          y.wrong ? nan : out.a * scale * per_sum,
          out.b * scale * per_sum * per_sum,
          out.c * scale,
          (flat ? S(0) : out.c * scale * stats.depth) - d,
          flat ? S(0) : stats.max,
          out.smooth * scale,
          out.label * scale * slope_at<Terms>(label_logit)};
}

// The gradient at a class that is not the label, by the transformed logit z. e = exp(z - shift). A masked class has one
// where it has a probability.
template <class Terms, class S>
DRSL_DEVICE S gradient(const RowGrad<S>& row, S z, S e, S u, bool soft) {
  S g = e * row.a;
  if constexpr (Terms::kSquares) g = e * (row.a + row.b * e);
  if constexpr (Terms::kMoments) {
    S step = row.c * (z - row.max) + row.offset, at_masked = 0;
    if constexpr (Terms::kWeightedMean) {
      step -= row.smooth * u;
      at_masked = soft ? -row.smooth * u : S(0);
    }
    g += z == -infinity<S>() ? at_masked : step;
  }
  return g;
}

}  // namespace cuda
}  // namespace drsl
