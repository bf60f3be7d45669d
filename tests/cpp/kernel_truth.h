// What the kernels must find for a row, and how far rounding may take them from it: row_loss.h in double, on
// statistics summed one class after the other. For test_kernels.cpp.
#pragma once

#include <limits>
#include <vector>

#include "kernel_problem.h"

struct Expected {
  double value, slack;
};

struct ExpectedRow {
  Expected loss, cross_entropy, distance, margin, tau_grad;
  std::vector<Expected> grad;
  bool counts;          // false: an ignored row, zero everywhere
  bool any_nan;         // NaN or +inf among the logits, or all of them -inf: everything NaN
};

namespace truth {

using drsl::Distance;
using drsl::Truth;

inline double round_to(DType acc, double x) { return acc == DType::float32 ? double(float(x)) : x; }

// Roundings: eps is that of the accumulator, and `sums` bounds the relative error of a sum over the classes.
struct Rounding {
  double eps, tiny, sums;

  Rounding(DType acc, int64_t classes)
      : eps(acc == DType::float32 ? 0x1p-23 : 0x1p-52),
        tiny(acc == DType::float32 ? 0x1p-126 : 0x1p-1022),
        sums(eps * (24 + double(classes) / 16)) {}
};

// The statistics of one row, by two passes, and what is needed to judge them.
struct Row {
  drsl::RowStats<double> stats;
  double label, U, weighted_depth;  // z_y, U, M - nu
  bool lost;                        // probability of a masked class: the loss is infinite
  double masked;                    // how much; U has it, too
  double size;                      // the largest |z| of the rest: its mean is found in that precision at first
};

inline Row read_row(const Problem& problem, int64_t row) {
  const int64_t classes = problem.task.classes, y = problem.task.labels[row];
  Row out{drsl::empty_stats<double>(), problem.logit(row, y), 0, 0, false, 0, 0};
  std::vector<double> z, u;
  for (int64_t k = 0; k < classes; ++k) {
    const double logit = problem.logit(row, k), weight = problem.class_weight(row, k);
    if (k != y && logit == -kInf && problem.task.soft && weight != 0) {
      out.lost = true;
      out.masked += weight;
    }
    if (k == y || logit == -kInf) continue;
    z.push_back(logit);
    u.push_back(weight);
    out.stats.max = logit > out.stats.max ? logit : out.stats.max;
    out.size = std::max(out.size, std::fabs(logit));
  }
  const double n = double(z.size());
  long double sum = 0, exps = 0, squares = 0, spread = 0, weight = 0, weighted = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    const double e = std::exp(z[i] - out.stats.max);
    sum += out.stats.max - z[i];
    exps += e;
    squares += e * e;
    weight += u[i];
    weighted += u[i] * (long double)(out.stats.max - z[i]);
  }
  const long double depth = z.empty() ? 0 : sum / n;
  for (const double x : z) spread += (out.stats.max - x - depth) * (out.stats.max - x - depth);
  out.stats = {out.stats.max, double(exps), double(squares), double(depth), double(spread), n};
  out.U = double(weight) + out.masked;
  out.weighted_depth = weight == 0 ? 0 : double(weighted / weight);
  return out;
}

// Value and derivatives of a distance, each replaced by the sum of the absolute values of its terms.
struct DistanceSize {
  double value, d_delta, d_rho, d_variance, d_kappa;
};

inline DistanceSize distance_size(Distance name, double p, double w, double rho, const drsl::RowStats<double>& s,
                                  double kappa) {
  const double even = s.count > 1 ? 1 / s.count : 1;
  switch (name) {
    case Distance::uniform:
      return {p * p + w * w * rho + even, 2 * p * w * (w * rho + p), w * w, 0, 0};
    case Distance::non_target:
      return {w * w * (rho + even), 2 * p * w * w * (rho + even), w * w, 0, 0};
    case Distance::non_target_logits:
      return {s.variance, 0, 0, 1, 0};
    case Distance::conditional:
      return {rho + even, 0, 1, 0, 0};
    case Distance::kl:
      return {std::fabs(kappa) + std::log(s.count + 1), 0, 0, 0, 1};
    case Distance::kl_softmax:
      return {std::fabs(kappa) + std::log(s.count + 2), 1, 0, 0, 1};
    case Distance::none:
      break;
  }
  return {0, 0, 0, 0, 0};
}

inline Expected stored(DType dtype, double value, double slack) {
  if (dtype == DType::bfloat16) slack += std::fabs(value) * 0x1.02p-8 + 0x1p-133;
  if (dtype == DType::float16) slack += std::fabs(value) * 0x1.02p-11 + 0x1p-24;
  return {value, slack};
}

}  // namespace truth

inline ExpectedRow expected_row(const Problem& problem, int64_t row) {
  const drsl::Task& t = problem.task;
  const int64_t classes = t.classes, y = t.labels[row];
  ExpectedRow out{};
  out.counts = y != t.ignore_index;
  if (!out.counts) {
    out.grad.assign(size_t(classes), Expected{0, 0});
    return out;
  }
  const auto rounded = [&](double x) { return truth::round_to(problem.acc, x); };
  double grad_scale = rounded(t.grad_scale);
  if (t.upstream) grad_scale *= get(problem.acc, t.upstream, row * t.upstream_stride);
  const truth::Rounding round(problem.acc, classes);
  const truth::Row r = truth::read_row(problem, row);
  const auto& s = r.stats;
  out.any_nan = s.count == 0 && r.label == -kInf;
  for (int64_t k = 0; k < classes; ++k) {
    const double z = problem.logit(row, k);
    out.any_nan |= std::isnan(z) || z == kInf;
  }
  if (s.count == 0 || out.any_nan) {
    out.margin.value = s.count == 0 ? kInf : 0;
    if (r.lost) out.loss.value = out.cross_entropy.value = kInf;
    out.grad.assign(size_t(classes), Expected{0, 0});
    if (r.lost && !out.any_nan) {
      for (int64_t k = 0; k < classes; ++k) {
        const double g = (k == y ? r.U : -problem.class_weight(row, k)) * problem.slope(row, k) * grad_scale;
        out.grad[size_t(k)] = truth::stored(problem.choice.dtype, g, std::fabs(g) * round.sums);
      }
    }
    return out;
  }
  const drsl::LossParams<double> params{t.truth,          t.distance,           rounded(t.q), rounded(t.threshold),
                                        rounded(t.scale), rounded(t.smoothing), t.soft};
  const double margin = rounded(problem.margin(y));
  const double tau = rounded(t.tau_rows ? get(problem.acc, t.tau_rows, row) : t.tau);
  const double u = problem.class_weight(row, y), penalty_weight = t.soft ? 1 : u;
  auto loss = drsl::row_loss(params, s, drsl::RowInput<double>{r.label, margin, tau, u, r.U, r.weighted_depth});

  // Absolute error of delta, which is the relative one of p and w; errors of h, V and kappa.
  const double eps = round.eps, target = params.scale * r.label - margin;
  const bool finite = std::isfinite(target);  // else the label is at -inf
  const double log_sum = std::log(s.sum_exp);
  const bool plain = params.scale == 1 && margin == 0;  // else the rounding of the target counts
  // Transformed logits are rounded, each to within a few ulp.
  const bool transforms = t.activation != drsl::Activation::softmax;
  const double moved = transforms ? 4 * eps * (r.size + (finite ? std::fabs(r.label) : 0) + 1) : 0;
  const double in_delta =
      2 * moved + round.sums * (1 + log_sum) + (plain || !finite ? 0 : 2 * eps * (std::fabs(target) + 1));
  const double relative = 3 * in_delta + round.sums;
  const double in_depth = 2 * moved + round.sums * (s.depth + r.weighted_depth);
  // V is found around a rounded mean; what that adds is taken off again.
  const double first_mean = round.sums * r.size;
  const double in_variance = round.sums * (s.variance + s.count * first_mean * first_mean) +
                             2 * moved * (std::sqrt(s.count * s.variance) + s.count * moved);
  const double in_kappa = in_delta + in_depth;

  const double delta = (s.max - target) + log_sum, kappa = s.depth + log_sum;
  const double p = 1 / (1 + std::exp(delta)), w = 1 / (1 + std::exp(-delta));
  const double rho = s.sum_exp2 / (s.sum_exp * s.sum_exp);
  const truth::DistanceSize size = truth::distance_size(t.distance, p, w, rho, s, kappa);
  // delta itself, where it is not in an exponent and hence not compensated.
  const double steps = finite ? eps * (std::fabs(delta) + std::fabs(s.max) + std::fabs(target)) : 0;
  double in_distance = size.value * relative + size.d_variance * in_variance + size.d_kappa * in_kappa;
  if (t.distance == drsl::Distance::kl_softmax && finite) in_distance += std::fabs(delta) * relative + 2 * steps;

  const double strength = std::fabs(tau * penalty_weight), share = t.soft ? 1 : params.smoothing / (s.count + 1);
  const bool weighted = t.soft || params.smoothing > 0;
  const double B = weighted ? share * r.U : 0;
  const double A = weighted ? (t.soft ? 0 : 1 - params.smoothing) * u + share * (u + r.U) : u;
  const auto term = drsl::truth_term(params, drsl::label_odds(s, drsl::log_(s.sum_exp), r.label, params.scale, margin));
  double in_loss =
      A * (std::fabs(term.value) * relative + (t.truth == drsl::Truth::log_odds ? in_delta + 2 * steps : 0));
  in_loss += B * (in_kappa + in_delta + 2 * steps);
  const double in_cross_entropy =
      t.soft ? in_loss + eps * std::fabs(loss.cross_entropy) : loss.cross_entropy * relative;
  in_loss += strength * in_distance + eps * std::fabs(loss.loss);
  if (r.lost) loss.loss += kInf, loss.cross_entropy += kInf;

  out.loss = {loss.loss, in_loss + 8 * round.tiny};
  out.cross_entropy = {loss.cross_entropy, in_cross_entropy + 8 * round.tiny};
  out.distance = {loss.distance, in_distance + round.tiny};
  out.margin = {loss.margin, eps * std::fabs(loss.margin) + 2 * moved};
  out.tau_grad = {loss.tau_slope, (in_distance + eps * std::fabs(loss.distance)) * penalty_weight + 8 * round.tiny};

  const double d_delta = A * term.d_delta * (1 + steps) + B + strength * size.d_delta;
  const double a = d_delta + B + strength * (size.d_kappa + 2 * rho * size.d_rho);
  for (int64_t k = 0; k < classes; ++k) {
    const double z = problem.logit(row, k), scaled = problem.slope(row, k) * grad_scale;
    if (k == y) {
      const double slack = params.scale * d_delta * relative + 8 * round.tiny;
      out.grad.push_back(truth::stored(problem.choice.dtype, loss.label * scaled, slack * std::fabs(scaled)));
      continue;
    }
    if (z == -kInf) {
      const double lost = t.soft ? -problem.class_weight(row, k) * scaled : 0;
      out.grad.push_back(truth::stored(problem.choice.dtype, lost, std::fabs(lost) * round.sums));
      continue;
    }
    const double e = std::exp(z - s.max) / s.sum_exp, share_of_k = problem.class_weight(row, k);
    const double g = e * (loss.a + loss.b * e) + loss.c * (s.depth - (s.max - z)) - loss.d - loss.smooth * share_of_k;
    double slack = (e * (a + std::fabs(loss.b) * e) + round.tiny * (1 + a)) * (relative + eps * std::fabs(z - s.max));
    slack += round.tiny * (1 + a);
    slack += std::fabs(loss.c) * (in_depth + round.sums * (s.max - z)) +
             (std::fabs(loss.d) + loss.smooth * share_of_k) * round.sums;
    if (transforms)
      slack += (std::fabs(g) + std::fabs(loss.c) * s.depth) * 4 * eps + 2 * std::fabs(loss.c) * moved + round.tiny;
    out.grad.push_back(truth::stored(problem.choice.dtype, g * scaled, slack * std::fabs(scaled)));
  }
  return out;
}
