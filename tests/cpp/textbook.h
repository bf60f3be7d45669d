// The losses as a textbook writes them: over the whole softmax of one row, in long double, with nothing of the row
// statistics of csrc/row_loss.h. For test_row_loss.cpp, which differentiates them numerically.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "row_loss.h"

namespace textbook {

using Real = long double;

// All numbers are floats in value, so that every precision starts from the same row.
struct Row {
  drsl::LossParams<double> params;
  std::vector<double> logits;
  int label;
  double tau, weight, margin;         // weight: u_y
  std::vector<double> class_weights;  // empty: all 1; with params.soft the class probabilities
};

struct Loss {
  Real loss, cross_entropy, distance, wrong;  // wrong: 1 - p_y
};

inline Real square(Real x) { return x * x; }

// `logits` takes the place of row.logits.
inline Loss loss(const Row& row, const std::vector<Real>& logits) {
  const int classes = static_cast<int>(logits.size());
  const auto masked = [&](int k) { return k != row.label && logits[k] == -INFINITY; };
  std::vector<Real> shown = logits;  // what the softmax sees
  shown[row.label] = Real(row.params.scale) * logits[row.label] - Real(row.margin);
  Real top = -INFINITY;
  for (const Real z : shown) top = z > top ? z : top;
  Real total = 0;
  for (const Real z : shown) total += std::exp(z - top);

  int n = 0;
  Real wrong = 0, mean = 0;
  for (int k = 0; k < classes; ++k) {
    if (k == row.label || masked(k)) continue;
    ++n;
    wrong += std::exp(shown[k] - top) / total;
    mean += shown[k];
  }
  mean /= n;
  const auto log_p = [&](int k) { return (shown[k] - top) - std::log(total); };
  const Real right = std::exp(log_p(row.label));
  const Real log_right = right > 0.5L ? std::log1p(-wrong) : log_p(row.label);

  Loss out;
  out.wrong = wrong;
  out.cross_entropy = -log_right;
  switch (row.params.truth) {
    case drsl::Truth::ce:
      out.loss = -log_right;
      break;
    case drsl::Truth::gce:
      out.loss = -std::expm1(Real(row.params.q) * std::max(log_right, std::log(Real(row.params.threshold)))) /
                 Real(row.params.q);
      break;
    case drsl::Truth::mae:
      out.loss = 2 * wrong;
      break;
    case drsl::Truth::log_odds:
      out.loss = std::log(wrong) - log_right;
      break;
  }
  out.loss *= row.weight;
  if (row.params.smoothing > 0) {
    const auto u = [&](int k) { return row.class_weights.empty() ? Real(1) : Real(row.class_weights[k]); };
    Real all = row.weight * -log_right;
    for (int k = 0; k < classes; ++k) {
      if (k != row.label && !masked(k)) all -= u(k) * log_p(k);
    }
    const Real e = row.params.smoothing;
    out.loss = (1 - e) * out.loss + e / (n + 1) * all;
  }

  if (row.params.soft) {
    out.loss = row.class_weights[row.label] * -log_right;
    for (int k = 0; k < classes; ++k) {
      if (k != row.label && row.class_weights[k] != 0) out.loss -= row.class_weights[k] * log_p(k);
    }
    out.cross_entropy = out.loss;
  }

  Real d = row.params.distance == drsl::Distance::uniform ? square(right - Real(1) / (n + 1)) : 0;
  for (int k = 0; k < classes; ++k) {
    if (k == row.label || masked(k)) continue;
    const Real p = std::exp(log_p(k)), even = Real(1) / n;
    switch (row.params.distance) {
      case drsl::Distance::none:
        break;
      case drsl::Distance::uniform:
        d += square(p - Real(1) / (n + 1));
        break;
      case drsl::Distance::non_target:
        d += square(p - wrong * even);
        break;
      case drsl::Distance::non_target_logits:
        d += square(shown[k] - mean);
        break;
      case drsl::Distance::conditional:
        d += square(p / wrong - even);
        break;
      case drsl::Distance::kl:
        d += even * std::log(even / (p / wrong));
        break;
      case drsl::Distance::kl_softmax:
        d -= log_p(k) / (n + 1);
        break;
    }
  }
  if (row.params.distance == drsl::Distance::kl_softmax) d += -log_right / (n + 1) - std::log(Real(n + 1));
  out.distance = d;
  out.loss += Real(row.tau) * (row.params.soft ? Real(1) : Real(row.weight)) * d;
  return out;
}

inline Loss loss(const Row& row) { return loss(row, std::vector<Real>(row.logits.begin(), row.logits.end())); }

// Central differences of fourth order; 0 for a masked class.
inline std::vector<Real> gradient(const Row& row) {
  constexpr Real h = 1e-3L;
  std::vector<Real> z(row.logits.begin(), row.logits.end()), g(z.size(), 0);
  for (size_t k = 0; k < z.size(); ++k) {
    const Real here = z[k];
    if (here == -INFINITY) continue;
    const auto at = [&](Real step) {
      z[k] = here + step;
      return loss(row, z).loss;
    };
    g[k] = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    z[k] = here;
  }
  return g;
}

}  // namespace textbook
