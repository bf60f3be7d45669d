// The mathematics of the family, once: row statistics, their merge, truth terms, distances, gradient
// coefficients. Host and device, no torch, no intrinsics. T is float or double on a device, and may be a
// vector of them on the CPU (csrc/cpu/simd.h), one row per lane; every function is free of branches on values.
// Everything in csrc/ relies on this header.
//
// A row z with label y. R is the rest: every class k != y with z_k > -inf; n is its size.
//
//   M = max_R z    A1 = sum_R exp(z_k - M)    A2 = sum_R exp(2(z_k - M))    mu = mean_R z    V = sum_R (z_k - mu)^2
//   lse = M + log A1        r_k = exp(z_k - lse)          the softmax over the wrong classes alone
//   delta = lse - (s z_y - m)        rho = A2 / A1^2        kappa = lse - mu = h + log A1
// h = M - mu, the depth of the mean below the maximum, is kept in place of mu: like all the others it does not
// change when a constant is added to the row, so a large constant costs no precision.
//
//   p = sigmoid(-delta)     w = sigmoid(delta) = 1 - p    p_k = w r_k
//
// A loss is a function F of (delta, rho, V, kappa). By the chain rule, with d lse / d z_k = r_k,
// d rho / d z_k = 2 r_k (r_k - rho), d V / d z_k = 2 (z_k - mu) and d kappa / d z_k = r_k - 1/n, its gradient is
//
//   k != y:   r_k (a + b r_k) + c (z_k - mu) - d      a = F_delta + F_kappa - 2 rho F_rho    b = 2 F_rho
//   k == y:   -s F_delta                              c = 2 F_V                              d = F_kappa / n
//
// Another activation than softmax is the softmax of transformed logits u_k (see Activation): all of this holds with u in
// place of z, and the gradient by z_k has a factor du_k / dz_k more.
//
// Because the statistics leave the label out, 1 - p is never formed by subtraction: loss and label gradient
// keep their relative precision when p is within one rounding of 1.
//
// Label smoothing e with class weights u needs one more statistic, the weighted mean nu = sum_R u_k z_k / U with
// U = sum_R u_k. Since -log p_k = lse - z_k + softplus(-delta) and softplus(-delta) = softplus(delta) - delta,
//
//   (1-e) u_y (-log p) + e/(n+1) [u_y (-log p) + sum_R u_k (-log p_k)] = A softplus(delta) + B (lse - nu - delta)
//   A = (1-e) u_y + e/(n+1) (u_y + U)        B = e/(n+1) U
//
// and its gradient adds -B u_k / U at k != y. Without class weights nu = mu, U = n, A = u_y = 1.
//
// Class probabilities q as target are the same with weights u_k = (class weight k) q_k of the row's own, e/(n+1) = 1 and
// no first term: sum_k u_k (-log p_k). Any class may then stand as y; one with a large q_k keeps the gradient precise.
// U counts masked classes, too: probability of one costs infinitely much, and the gradient stays p_k sum_j u_j - u_k.
#pragma once

#if defined(__CUDACC__)
#define DRSL_FN __host__ __device__ __forceinline__
#else
#define DRSL_FN inline __attribute__((always_inline))
#endif

// Each build of the same source for another instruction set has a namespace of its own, so that the linker
// can never hand a function compiled for one set to code that runs on another.
#ifndef DRSL_ISA
#define DRSL_ISA generic
#endif

#include <math.h>

namespace drsl {

enum class Truth : int { ce = 0, gce = 1, mae = 2, log_odds = 3 };
constexpr int kTruthCount = 4;

// Whose p the loss is of: softmax(z), or sigsoftmax(z), which is the softmax of u = z + log sigmoid(z).
enum class Activation : int { softmax = 0, sigsoftmax = 1 };

enum class Distance : int {
  none = 0,
  uniform = 1,
  non_target = 2,
  non_target_logits = 3,
  conditional = 4,
  kl = 5,
  kl_softmax = 6,  // KL(uniform || p) over all classes: what kl is for class probabilities. Always the last
};
constexpr int kDistanceCount = 7;

// Whether a distance reads A2, and whether it reads mu and V.
constexpr bool needs_squares(Distance d) {
  return d == Distance::uniform || d == Distance::non_target || d == Distance::conditional;
}
constexpr bool needs_moments(Distance d) {
  return d == Distance::non_target_logits || d == Distance::kl || d == Distance::kl_softmax;
}

inline namespace DRSL_ISA {

template <class T>
struct ScalarOf {
  using type = T;
};
template <class T>
using Scalar = typename ScalarOf<T>::type;

// The elementwise vocabulary, for scalars. Vectors bring their own overloads.
DRSL_FN float exp_(float x) { return ::expf(x); }
DRSL_FN double exp_(double x) { return ::exp(x); }
DRSL_FN float expm1_(float x) { return ::expm1f(x); }
DRSL_FN double expm1_(double x) { return ::expm1(x); }
DRSL_FN float log_(float x) { return ::logf(x); }
DRSL_FN double log_(double x) { return ::log(x); }
DRSL_FN float log1p_(float x) { return ::log1pf(x); }
DRSL_FN double log1p_(double x) { return ::log1p(x); }
DRSL_FN float abs_(float x) { return ::fabsf(x); }
DRSL_FN double abs_(double x) { return ::fabs(x); }
DRSL_FN float select(bool c, float a, float b) { return c ? a : b; }
DRSL_FN double select(bool c, double a, double b) { return c ? a : b; }

template <class T>
DRSL_FN T infinity() {
  return T(Scalar<T>(INFINITY));
}

// ---------------------------------------------------------------------------------------------------------
// Statistics of a set of classes, and the merge of two disjoint sets

template <class T>
struct RowStats {
  T max, sum_exp, sum_exp2, depth, variance, count;  // M, A1, A2, h, V, n
};

template <class T>
DRSL_FN RowStats<T> empty_stats() {
  return {-infinity<T>(), T(0), T(0), T(0), T(0), T(0)};
}

// A set of the one class with logit z; a masked one (z = -inf) adds nothing.
template <class T>
DRSL_FN RowStats<T> single_stats(T z) {
  const auto masked = z == -infinity<T>();
  const T one = select(masked, T(0), T(1));
  return {z, one, one, T(0), T(0), one};
}

// How far the maximum of a part is below that of the whole; 0 for an empty part, which weighs nothing.
template <class T>
DRSL_FN T drop(T part, T whole) {
  return select(part == -infinity<T>(), T(0), whole - part);
}

// Associative and commutative up to rounding; NaN in either side stays NaN.
template <class T>
DRSL_FN RowStats<T> merge(const RowStats<T>& x, const RowStats<T>& y) {
  const T max = select(x.max > y.max, x.max, y.max);
  const T drop_x = drop(x.max, max), drop_y = drop(y.max, max);
  const T fx = exp_(-drop_x), fy = exp_(-drop_y);
  const T count = x.count + y.count;
  const T share_x = select(count == T(0), T(0), x.count / count), share = select(count == T(0), T(0), y.count / count);
  const T depth_x = x.depth + drop_x, depth_y = y.depth + drop_y;
  const T step = depth_y - depth_x, between = x.count * share;
  // The depths may be infinite, and step^2 may overflow.
  const T squared = select(depth_x == infinity<T>(), infinity<T>(), step * step * between);
  const T spread = select(between == T(0), T(0), squared);
  return {max,
          x.sum_exp * fx + y.sum_exp * fy,
          x.sum_exp2 * (fx * fx) + y.sum_exp2 * (fy * fy),
          depth_x * share_x + depth_y * share,
          x.variance + y.variance + spread,
          count};
}

// ---------------------------------------------------------------------------------------------------------
// Sigsoftmax: u = z + log sigmoid(z), and du/dz = 1 + sigmoid(-z)

template <class T>
DRSL_FN T sigsoftmax_logit(T z) {
  return select(z > T(0), z, z + z) - log1p_(exp_(-abs_(z)));
}

template <class T>
DRSL_FN T sigsoftmax_slope(T z) {
  const T tail = exp_(-abs_(z));
  return T(1) + select(z > T(0), tail, T(1)) / (T(1) + tail);
}

// The same from u, where z is no longer at hand: x = exp(z) solves x^2 / (1 + x) = exp(u). Infinite steps end in 1 or 2.
DRSL_FN float sigsoftmax_slope_from(float u) {
  const float power = ::expf(u), x = 0.5f * (power + ::sqrtf(power * power + 4.0f * power));
  return 1.0f + 1.0f / (1.0f + x);
}
DRSL_FN double sigsoftmax_slope_from(double u) {
  const double power = ::exp(u), x = 0.5 * (power + ::sqrt(power * power + 4.0 * power));
  return 1.0 + 1.0 / (1.0 + x);
}

// ---------------------------------------------------------------------------------------------------------
// From statistics to the loss and its gradient

// What is the same for all rows of a call.
template <class S>
struct LossParams {
  Truth truth;
  Distance distance;
  S q, threshold;  // of gce: where p is below the threshold, the loss stays as it is there
  S scale, smoothing;  // s of the label transform; e
  bool soft;  // class probabilities
};

// What a row brings besides its statistics. Without class weights: weight = 1, rest_weight = n, rest_depth = h.
template <class T>
struct RowInput {
  T label_logit, margin, tau, weight;  // z_y, m, tau, u_y
  T rest_weight, rest_depth;  // U, M - nu (sum u_k (M - z_k) where U = 0): read only when smoothing > 0 or soft
};

template <class T>
struct RowLoss {
  T loss;  // A T(delta) + ... + tau u_y D (soft: tau D)
  T cross_entropy, distance, margin;  // -log p (soft: the loss without tau D), D, z_y - M: for reporting
  T tau_slope;  // derivative of the loss by tau
  T a, b, c, d;  // gradient coefficients, see the top
  T smooth;  // B / U, to be multiplied by u_k and subtracted at k != y
  T label;  // gradient at the label
};

// delta and what follows from it alone. `tail` = exp(-|delta|) is in (0, 1] and carries delta's rounding error.
template <class T>
struct Odds {
  T delta, tail, p, w, softplus, softminus;  // softplus(delta), softplus(-delta)
};

// x - y exactly: the rounded difference and its error (0 where the difference is not finite).
template <class T>
DRSL_FN T difference_error(T x, T y, T rounded) {
  const T y_seen = x - rounded;
  const T x_seen = rounded + y_seen;
  return select(abs_(rounded) < infinity<T>(), (x - x_seen) - (y - y_seen), T(0));
}

template <class T>
DRSL_FN Odds<T> label_odds(const RowStats<T>& rest, T log_sum, T label, T scale, T margin) {
  const T scaled = scale * label;
  const T target = scaled - margin;
  const T gap = rest.max - target;
  const T delta = gap + log_sum;
  const T low = difference_error(rest.max, target, gap) - difference_error(scaled, margin, target) +
                difference_error(gap, -log_sum, delta);
  const T magnitude = exp_(-abs_(delta));
  const auto wrong = delta > T(0);
  const T tail = magnitude - magnitude * select(wrong, low, -low);
  const T big = T(1) / (T(1) + tail);
  const T small = tail * big, rise = log1p_(tail);
  return {delta,
          tail,
          select(wrong, small, big),
          select(wrong, big, small),
          select(wrong, delta, T(0)) + rise,
          select(wrong, T(0), -delta) + rise};
}

template <class T>
struct TruthTerm {
  T value, d_delta;
};

template <class T>
DRSL_FN TruthTerm<T> truth_term(const LossParams<Scalar<T>>& params, const Odds<T>& o) {
  switch (params.truth) {
    case Truth::gce: {
      const Scalar<T> k = params.threshold;
      const T q = T(params.q), most = T(k > Scalar<T>(0) ? -log_(k) : infinity<Scalar<T>>());
      const auto cut = o.softplus > most;
      const T power = -q * select(cut, most, o.softplus);  // log p^q
      return {-expm1_(power) / q, select(cut, T(0), exp_(power) * o.w)};
    }
    case Truth::mae:
      return {T(2) * o.w, T(2) * o.w * o.p};
    case Truth::log_odds:
      return {o.delta, T(1)};
    default:
      return {o.softplus, o.w};
  }
}

template <class T>
struct DistanceTerm {
  T value, d_delta, d_rho, d_variance, d_kappa;
};

template <class T>
DRSL_FN DistanceTerm<T> distance_term(Distance name, const Odds<T>& o, T rho, T kappa, T variance, T count) {
  const T n = select(count > T(1), count, T(1));
  const T even = T(1) / n;
  switch (name) {
    case Distance::uniform:
      return {o.p * o.p + o.w * o.w * rho - T(1) / (count + T(1)), T(2) * o.p * o.w * (o.w * rho - o.p), o.w * o.w,
              T(0), T(0)};
    case Distance::non_target:
      return {o.w * o.w * (rho - even), T(2) * o.p * o.w * o.w * (rho - even), o.w * o.w, T(0), T(0)};
    case Distance::non_target_logits:
      return {variance, T(0), T(0), T(1), T(0)};
    case Distance::conditional:
      return {rho - even, T(0), T(1), T(0), T(0)};
    case Distance::kl:
      return {kappa - log_(n), T(0), T(0), T(0), T(1)};
    case Distance::kl_softmax: {
      const T share = n / (n + T(1)), label_share = T(1) / (n + T(1));
      return {label_share * o.softplus + share * (kappa + o.softminus) - log_(n + T(1)),
              label_share * o.w - share * o.p, T(0), T(0), share};
    }
    default:
      return {T(0), T(0), T(0), T(0), T(0)};
  }
}

// Loss and gradient coefficients of a row. A row without a rest (one class, or all others masked) has loss and
// gradient 0 (soft: but for the probabilities of masked classes); a row with a NaN, or with a label at +inf, has NaN
// everywhere.
template <class T>
DRSL_FN RowLoss<T> row_loss(const LossParams<Scalar<T>>& params, const RowStats<T>& rest, const RowInput<T>& in) {
  const auto alone = rest.sum_exp == T(0);
  const T nan = infinity<T>() - infinity<T>();
  const T label = select(in.label_logit == infinity<T>(), nan, in.label_logit);
  const T sum_exp = select(alone, T(1), rest.sum_exp);
  const T rho = rest.sum_exp2 / (sum_exp * sum_exp);
  const T log_sum = log_(rest.sum_exp), log_some = select(alone, T(0), log_sum);
  const T kappa = rest.depth + log_some;
  const T n = select(rest.count > T(1), rest.count, T(1));

  const Odds<T> odds = label_odds(rest, log_sum, label, T(params.scale), in.margin);
  const TruthTerm<T> truth = truth_term(params, odds);
  const DistanceTerm<T> dist = distance_term(params.distance, odds, rho, kappa, rest.variance, rest.count);

  T value = in.weight * truth.value, f_delta = in.weight * truth.d_delta;
  T f_sum = f_delta;  // F_delta + F_kappa, which do not have to cancel
  T d_mean = T(0), share = T(0);  // B, F_kappa of the smoothing term; B / U
  if (params.soft || params.smoothing > Scalar<T>(0)) {
    const T e = T(params.smoothing);
    share = params.soft ? T(1) : e / (rest.count + T(1));
    const T own = params.soft ? in.weight : (T(1) - e) * in.weight + share * in.weight;
    // sum u_k (-log p_k), of terms that do not cancel. The label at -inf makes -log p inf, and 0 inf is no loss.
    const T others = in.rest_weight * (in.rest_depth + log_some + odds.softminus);
    value =
        select(own == T(0), T(0), own * truth.value) + share * select(in.rest_weight == T(0), in.rest_depth, others);
    d_mean = share * in.rest_weight;
    f_delta = own * odds.w - d_mean * odds.p;
    f_sum = (own + d_mean) * odds.w;
  }
  const T cross_entropy = params.soft ? value : odds.softplus;
  const T penalty_weight = params.soft ? T(1) : in.weight;
  const T strength = select(in.tau == T(0), T(0), in.tau * penalty_weight);
  const auto off = strength == T(0);  // 0 * inf is not a penalty
  value = value + select(off, T(0), strength * dist.value);
  // Not every term reads delta, and a maximum may pass over a NaN: what the row reports must be NaN all the same.
  const T poison = select(odds.delta == odds.delta, T(0), nan);
  const T d_delta = strength * dist.d_delta + poison;
  const T f_rho = strength * dist.d_rho;
  const T f_kappa = strength * dist.d_kappa;

  const T label_or_zero = select(abs_(label) < infinity<T>(), T(0), nan);
  // Probability of a masked class is an infinite loss, even where nothing else is left.
  const T rest_loss = select(in.rest_weight == T(0), in.rest_depth, in.rest_weight * in.rest_depth);
  const T lost = label_or_zero + (params.soft ? select(abs_(rest_loss) < infinity<T>(), T(0), rest_loss) : T(0));
  RowLoss<T> out;
  out.loss = select(alone, lost, value);
  out.cross_entropy = select(alone, lost, cross_entropy);
  out.distance = select(alone, label_or_zero, dist.value + poison);
  out.margin = label - rest.max + poison;
  out.tau_slope = penalty_weight * out.distance;
  out.a = select(alone, T(0), (f_sum + d_delta) + f_kappa - T(2) * rho * f_rho);
  out.b = T(2) * f_rho;
  out.c = T(2) * strength * dist.d_variance;
  out.d = f_kappa / n;
  out.smooth = share + poison;
  out.label = select(alone, label_or_zero + (params.soft ? d_mean : T(0)), -T(params.scale) * (f_delta + d_delta));
  return out;
}

}  // namespace DRSL_ISA
}  // namespace drsl
