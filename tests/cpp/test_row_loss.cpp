// csrc/row_loss.h with scalars: the statistics and their merge against direct sums, every loss of the family and its
// gradient against the textbook formulas (textbook.h), precision where the softmax is saturated, and the cases at
// the border.
#include "row_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "textbook.h"

namespace {

using namespace drsl;
using check::close;
using textbook::Real;
using textbook::Row;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Truth kTruths[] = {Truth::ce, Truth::gce, Truth::mae, Truth::log_odds};
constexpr Distance kDistances[] = {
    Distance::none,        Distance::uniform, Distance::non_target, Distance::non_target_logits,
    Distance::conditional, Distance::kl,      Distance::kl_softmax};

template <class T>
constexpr double kEps = std::numeric_limits<T>::epsilon();

float random_logit(check::Random& random, double offset, double spread) {
  return static_cast<float>(offset + spread * random.normal());
}

// ---------------------------------------------------------------------------------------------------------
// Statistics

template <class T>
RowStats<T> merge_range(const std::vector<double>& z, size_t begin, size_t end) {
  if (begin == end) return empty_stats<T>();
  if (end - begin == 1) return single_stats(T(z[begin]));
  const size_t middle = begin + (end - begin) / 2;
  return merge(merge_range<T>(z, begin, middle), merge_range<T>(z, middle, end));
}

template <class T>
RowStats<T> merge_in_order(const std::vector<double>& z) {
  RowStats<T> stats = empty_stats<T>();
  for (const double x : z) stats = merge(stats, single_stats(T(x)));
  return stats;
}

template <class T>
RowStats<T> merge_from_the_back(const std::vector<double>& z) {
  RowStats<T> stats = empty_stats<T>();
  for (size_t i = z.size(); i-- > 0;) stats = merge(single_stats(T(z[i])), stats);
  return stats;
}

template <class T>
RowStats<T> merge_with_empty_parts(const std::vector<double>& z) {
  const RowStats<T> none = empty_stats<T>(), masked = single_stats(T(-kInf));
  RowStats<T> stats = merge(none, none);
  for (const double x : z) stats = merge(merge(none, stats), merge(merge(masked, single_stats(T(x))), masked));
  return merge(stats, none);
}

template <class T>
void check_statistics(const RowStats<T>& got, const std::vector<double>& z, const char* how) {
  Real max = -kInf, mean = 0, sum_exp = 0, sum_exp2 = 0, variance = 0;
  int n = 0;
  for (const double x : z) max = std::max(max, Real(x));
  for (const double x : z) {
    if (x == -kInf) continue;
    ++n;
    mean += x;
    sum_exp += std::exp(x - max);
    sum_exp2 += std::exp(2 * (x - max));
  }
  if (n) mean /= n;
  for (const double x : z) {
    if (x != -kInf) variance += (x - mean) * (x - mean);
  }
  const Real depth = n ? max - mean : 0;
  // Rescaling by exp(x - M) at every new maximum, and roundings at every merge; none depends on the size of the logits.
  const Real slack = Real(kEps<T>) * (8 + n), depth_slack = slack / 4 * (depth + 1);
  CHECK(got.max == T(max), "%s: M", how);
  CHECK(got.count == T(n), "%s: n = %g, not %d", how, double(got.count), n);
  CHECK(close(Real(got.sum_exp), sum_exp, slack * sum_exp), "%s: A1 = %.9g, not %.9Lg", how, double(got.sum_exp),
        sum_exp);
  CHECK(close(Real(got.sum_exp2), sum_exp2, slack * sum_exp2), "%s: A2 = %.9g, not %.9Lg", how, double(got.sum_exp2),
        sum_exp2);
  CHECK(close(Real(got.depth), depth, depth_slack), "%s: h = %.9g, not %.9Lg", how, double(got.depth), depth);
  CHECK(close(Real(got.variance), variance, slack * variance), "%s: V = %.9g, not %.9Lg", how, double(got.variance),
        variance);
}

template <class T>
void test_statistics() {
  check::Random random(11);
  for (const int n : {0, 1, 2, 3, 10, 100, 1000}) {
    for (const double offset : {0.0, 50.0, -1e4}) {
      for (const double share_masked : {0.0, 0.3, 1.0}) {
        std::vector<double> z;
        for (int i = 0; i < n; ++i) {
          z.push_back(random.chance(share_masked) ? -kInf : random_logit(random, offset, 5));
        }
        check_statistics(merge_in_order<T>(z), z, "in order");
        check_statistics(merge_from_the_back<T>(z), z, "from the back");
        check_statistics(merge_range<T>(z, 0, z.size()), z, "in halves");
        check_statistics(merge_with_empty_parts<T>(z), z, "with empty parts");
        std::sort(z.begin(), z.end());
        check_statistics(merge_in_order<T>(z), z, "in rising order");
        check_statistics(merge_from_the_back<T>(z), z, "in falling order");
      }
    }
  }
}

template <class T>
bool identical(const RowStats<T>& x, const RowStats<T>& y) {
  return x.max == y.max && x.sum_exp == y.sum_exp && x.sum_exp2 == y.sum_exp2 && x.depth == y.depth &&
         x.variance == y.variance && x.count == y.count;
}

template <class T>
void test_merge_laws() {
  check::Random random(12);
  const RowStats<T> none = empty_stats<T>();
  CHECK(identical(merge(none, none), none));
  CHECK(identical(single_stats(T(-kInf)), none), "a masked class is an empty set");
  for (int round = 0; round < 200; ++round) {
    std::vector<double> parts[3];
    for (auto& part : parts) {
      for (int64_t i = random.below(20); i > 0; --i) part.push_back(random_logit(random, 30 * random.normal(), 3));
    }
    const RowStats<T> x = merge_in_order<T>(parts[0]), y = merge_in_order<T>(parts[1]), z = merge_in_order<T>(parts[2]);
    CHECK(identical(merge(x, none), x) && identical(merge(none, x), x), "an empty set changes nothing");
    std::vector<double> all;
    for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
    check_statistics(merge(merge(x, y), z), all, "(xy)z");
    check_statistics(merge(x, merge(y, z)), all, "x(yz)");
    check_statistics(merge(merge(z, x), y), all, "(zx)y");
  }
}

// A NaN anywhere reaches every sum, and through them every number of the loss.
template <class T>
void test_nan_spreads() {
  for (int at = 0; at < 5; ++at) {
    std::vector<double> z = {1, 2, -kInf, 0.5, 3};
    z[at] = kNan;
    for (const RowStats<T>& stats : {merge_in_order<T>(z), merge_from_the_back<T>(z), merge_range<T>(z, 0, z.size())}) {
      CHECK(std::isnan(stats.sum_exp) && std::isnan(stats.sum_exp2) && std::isnan(stats.depth) &&
            std::isnan(stats.variance));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Loss and gradient

template <class T>
struct Rest {
  RowStats<T> stats;
  T weight, depth;  // U, M - nu
};

template <class T>
Rest<T> rest_of(const Row& row) {
  std::vector<double> z = row.logits;
  z.erase(z.begin() + row.label);
  Rest<T> rest{merge_range<T>(z, 0, z.size()), T(0), T(0)};
  if (row.class_weights.empty()) return {rest.stats, rest.stats.count, rest.stats.depth};
  for (size_t k = 0; k < row.logits.size(); ++k) {
    if (int(k) == row.label || row.logits[k] == -kInf) continue;
    rest.weight += T(row.class_weights[k]);
    rest.depth += T(row.class_weights[k]) * (rest.stats.max - T(row.logits[k]));
  }
  rest.depth /= rest.weight == T(0) ? T(1) : rest.weight;
  return rest;
}

template <class T>
RowLoss<T> loss_of(const Row& row, const Rest<T>& rest) {
  const LossParams<double>& p = row.params;
  const LossParams<T> params{p.truth, p.distance, T(p.q), T(p.threshold), T(p.scale), T(p.smoothing), p.soft};
  return row_loss(params, rest.stats,
                  {T(row.logits[row.label]), T(row.margin), T(row.tau), T(row.weight), rest.weight, rest.depth});
}

template <class T>
RowLoss<T> loss_of(const Row& row) {
  return loss_of(row, rest_of<T>(row));
}

// The gradient that the coefficients describe; the formula at the top of row_loss.h.
template <class T>
std::vector<T> gradient_of(const Row& row) {
  const Rest<T> rest = rest_of<T>(row);
  const RowLoss<T> loss = loss_of(row, rest);
  const T mean = rest.stats.max - rest.stats.depth;
  std::vector<T> g;
  for (size_t k = 0; k < row.logits.size(); ++k) {
    const T z = T(row.logits[k]), u = row.class_weights.empty() ? T(1) : T(row.class_weights[k]);
    const T r = std::exp(z - rest.stats.max) / rest.stats.sum_exp;
    if (int(k) == row.label) g.push_back(loss.label);
    else if (z == -std::numeric_limits<T>::infinity()) g.push_back(T(0));
    else g.push_back(r * (loss.a + loss.b * r) + loss.c * (z - mean) - loss.d - loss.smooth * u);
  }
  return g;
}

template <class T>
void check_row(const Row& row, const textbook::Loss& want, const std::vector<Real>& want_gradient, double relative,
               double absolute) {
  const int truth = int(row.params.truth), distance = int(row.params.distance), classes = int(row.logits.size());
  const RowLoss<T> got = loss_of<T>(row);
  const Real slack = relative * (1 + std::fabs(row.tau * row.weight * want.distance) + std::fabs(want.loss));
  CHECK(close(Real(got.loss), want.loss, slack), "truth %d, distance %d, %d classes: loss %.15g, not %.15Lg", truth,
        distance, classes, double(got.loss), want.loss);
  CHECK(close(Real(got.cross_entropy), want.cross_entropy, Real(relative) * (1 + want.cross_entropy)));
  CHECK(close(Real(got.distance), want.distance, Real(relative) * (1 + want.distance)),
        "distance %d: %.15g, not %.15Lg", distance, double(got.distance), want.distance);
  std::vector<double> rest = row.logits;
  rest.erase(rest.begin() + row.label);
  const double margin = row.logits[row.label] - *std::max_element(rest.begin(), rest.end());
  CHECK(close(double(got.margin), margin, kEps<T> * std::fabs(margin)));

  const std::vector<T> gradient = gradient_of<T>(row);
  for (int k = 0; k < classes; ++k) {
    CHECK(close(Real(gradient[k]), want_gradient[k], relative * std::fabs(want_gradient[k]) + absolute),
          "truth %d, distance %d, %d classes, label %d: gradient[%d] = %.15g, not %.15Lg", truth, distance, classes,
          row.label, k, double(gradient[k]), want_gradient[k]);
  }
}

struct Variant {
  double q, scale, margin, smoothing, tau, weight;
  bool class_weights, masked, soft = false;
  double threshold = 0;
};

constexpr Variant kVariants[] = {
    {0.7, 1, 0, 0, 0.5, 1, false, false},         {0.3, 1.5, 0.35, 0, -0.75, 1.75, true, true},
    {1, 0.5, -0.25, 0, 2, 0.3, true, false},      {0.7, 1, 0, 0.1, 0.5, 1, false, true},
    {0.7, 2, 0.5, 0.3, 1.25, 0.7, true, false},   {0.7, 1, 0.2, 1, -0.5, 1.5, true, true},
    {0.7, 1, 0, 0, 0.75, 0.6, true, false, true}, {0.7, 1, 0.1, 0, 0.5, 1.2, false, true, false, 0.3},
};

Row random_row(check::Random& random, const Variant& v, Truth truth, Distance distance, int classes, double spread) {
  Row row{{truth, distance, float(v.q), float(v.threshold), float(v.scale), float(v.smoothing), v.soft},
          {},
          0,
          float(v.tau),
          float(v.weight),
          float(v.margin),
          {}};
  row.label = int(random.below(classes));
  for (int k = 0; k < classes; ++k) {
    row.logits.push_back(random_logit(random, 0, spread));
    if (v.class_weights) row.class_weights.push_back(k == row.label ? row.weight : float(random.uniform(0.1, 2)));
  }
  if (v.masked && classes > 2) row.logits[(row.label + 1) % classes] = -kInf;
  return row;
}

void test_losses() {
  check::Random random(13);
  for (const int classes : {2, 3, 10, 100}) {
    for (const Truth truth : kTruths) {
      for (const Distance distance : kDistances) {
        for (const Variant& v : kVariants) {
          if ((v.smoothing > 0 || v.soft) && truth != Truth::ce) continue;
          for (const double spread : {0.5, 3.0}) {
            const Row row = random_row(random, v, truth, distance, classes, spread);
            const textbook::Loss want = textbook::loss(row);
            const std::vector<Real> gradient = textbook::gradient(row);
            check_row<double>(row, want, gradient, 1e-6, 1e-12);
            // Single precision: relative to the terms, of which some cancel.
            check_row<float>(row, want, gradient, 1e-5, 1e-5);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Saturation: the label far above the others. Loss and gradient at the label keep their relative precision.

template <class T>
void test_saturation(double lowest_delta, double tolerance) {
  check::Random random(14);
  for (const int classes : {2, 10, 100}) {
    for (const double offset : {0.0, 1e4, -1e4}) {
      for (double delta = -1; delta >= lowest_delta; delta += lowest_delta / 230) {
        Row row{{Truth::ce, Distance::uniform, 0.75, 0, 1, 0, false}, {}, 0, 0, 1, 0, {}};
        for (int k = 0; k < classes; ++k) row.logits.push_back(random_logit(random, offset, 1));
        row.label = int(random.below(classes));
        row.logits[row.label] = static_cast<float>(offset + std::log(classes) - delta);
        for (const Truth truth : {Truth::ce, Truth::gce, Truth::mae}) {
          row.params.truth = truth;
          const RowLoss<T> got = loss_of<T>(row);
          const textbook::Loss want = textbook::loss(row);
          const auto agree = [&](T x, Real y) { return std::fabs(Real(x) / y - 1) < tolerance; };
          const Real right = 1 - want.wrong, power = std::pow(right, Real(row.params.q));
          const Real label = truth == Truth::ce    ? want.wrong
                             : truth == Truth::gce ? power * want.wrong
                                                   : 2 * right * want.wrong;
          CHECK(agree(got.loss, want.loss), "truth %d, %d classes, offset %g, delta %g: loss %.9g, not %.9Lg",
                int(truth), classes, offset, delta, double(got.loss), want.loss);
          CHECK(agree(got.cross_entropy, want.cross_entropy));
          CHECK(agree(-got.label, label), "truth %d, %d classes, offset %g, delta %g: gradient %.9g, not %.9Lg",
                int(truth), classes, offset, delta, double(got.label), -label);
          CHECK(agree(got.a, label));
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Border cases

bool all_nan(const RowLoss<float>& x) {
  return std::isnan(x.loss) && std::isnan(x.cross_entropy) && std::isnan(x.distance) && std::isnan(x.margin) &&
         std::isnan(x.a) && std::isnan(x.label);
}

bool no_nan(const RowLoss<float>& x) {
  return !std::isnan(x.a) && !std::isnan(x.b) && !std::isnan(x.c) && !std::isnan(x.d) && !std::isnan(x.label) &&
         !std::isnan(x.smooth) && !std::isnan(x.loss);
}

void test_border_cases(Truth truth, Distance distance, double smoothing, bool class_weights) {
  const auto row_of = [&](std::vector<double> z) {
    Row row{{truth, distance, 0.7f, 0, 1, smoothing, false}, z, 0, 0.5, 1.25, 0, {}};
    if (class_weights) row.class_weights.assign(z.size(), 0.75);
    return row;
  };
  const auto loss = [&](std::vector<double> z) { return loss_of<float>(row_of(z)); };

  // No rest: one class, or all others masked.
  for (const std::vector<double>& z : {std::vector<double>{2}, {2, -kInf}, {-3, -kInf, -kInf}}) {
    const RowLoss<float> alone = loss(z);
    CHECK(alone.loss == 0 && alone.cross_entropy == 0 && alone.distance == 0 && alone.a == 0 && alone.label == 0 &&
          no_nan(alone));
    for (const float g : gradient_of<float>(row_of(z))) CHECK(g == 0);
  }
  CHECK(std::isnan(loss({kNan}).loss) && std::isnan(loss({-kInf}).loss) && std::isnan(loss({kInf}).loss));

  // The label masked: p_y = 0, and gradients as F.cross_entropy has them.
  const RowLoss<float> lost = loss({-kInf, 1, 2});
  const bool bounded = truth == Truth::gce || truth == Truth::mae;
  CHECK(bounded && distance != Distance::kl_softmax ? std::isfinite(lost.loss) : lost.loss == float(kInf));
  CHECK(no_nan(lost) && lost.cross_entropy == float(kInf) && lost.margin == -float(kInf));
  const bool flat = !needs_squares(distance) && distance != Distance::kl_softmax;
  if (truth == Truth::ce && !(smoothing > 0) && flat) CHECK(lost.label == -1.25f);
  for (const float g : gradient_of<float>(row_of({-kInf, 1, 2, -kInf}))) CHECK(std::isfinite(g));

  CHECK(all_nan(loss({kInf, 1, 2})), "label at +inf, distance %d", int(distance));
  CHECK(all_nan(loss({kNan, 1, 2})), "label NaN, truth %d, distance %d", int(truth), int(distance));
  for (int at = 1; at < 4; ++at) {
    std::vector<double> z = {0, 1, 2, 3};
    z[at] = kNan;
    CHECK(all_nan(loss(z)), "NaN at %d", at);
  }
  CHECK(std::isnan(loss({0, kInf, 2}).loss), "a wrong logit at +inf");

  // n counts the classes that are there: masking a class is leaving it out.
  const RowLoss<float> with = loss({0.5, -kInf, 1.5, -kInf, 0.25}), without = loss({0.5, 1.5, 0.25});
  CHECK(with.loss == without.loss && with.distance == without.distance && with.label == without.label &&
        with.a == without.a && with.b == without.b && with.c == without.c && with.d == without.d);
  CHECK(rest_of<float>(row_of({0.5, -kInf, 1.5, -kInf, 0.25})).stats.count == 2);

  // A penalty of strength 0 is none, even where the distance is infinite.
  Row off = row_of({1, 3e38, -3e38});
  off.tau = 0;
  CHECK(no_nan(loss_of<float>(off)) || smoothing > 0 || distance == Distance::kl);
}

// Class probabilities: certainty about one class is its label, and probability of a masked class is never forgiven.
void test_soft_border_cases() {
  const auto row_of = [](std::vector<double> z, std::vector<double> q) {
    return Row{{Truth::ce, Distance::none, 0.7, 0, 1, 0, true}, z, 0, 0, q[0], 0, q};
  };
  for (const double high : {0.0, 5.0, 40.0, 80.0}) {
    const std::vector<double> z{high, 0.5, -1, 0.25};
    const Row certain = row_of(z, {1, 0, 0, 0});
    Row labelled = certain;
    labelled.params.soft = false;
    labelled.class_weights.clear();
    CHECK(loss_of<float>(certain).loss == loss_of<float>(labelled).loss);
    CHECK(gradient_of<float>(certain) == gradient_of<float>(labelled));
  }
  // Nothing that is subtracted may spoil a small loss, whichever class stands for the label.
  const textbook::Loss want = textbook::loss(row_of({30, 0, 0, 0}, {1, 0, 0, 0}));
  Row other = row_of({30, 0, 0, 0}, {1, 0, 0, 0});
  other.label = 1;
  other.weight = 0;
  CHECK(std::fabs(Real(loss_of<double>(other).loss) / want.loss - 1) < 1e-3L, "%.9g", loss_of<double>(other).loss);

  Rest<float> rest = rest_of<float>(row_of({2, -kInf}, {0.5, 0}));
  rest.depth = float(kInf);
  CHECK(loss_of(row_of({2, -kInf}, {0.5, 0.5}), rest).loss == float(kInf));
  rest.depth = 0;
  CHECK(loss_of(row_of({2, -kInf}, {1, 0}), rest).loss == 0);
  CHECK(std::isnan(loss_of<float>(row_of({kNan, 1}, {0, 1})).loss));
}

}  // namespace

int main() {
  test_statistics<double>();
  test_statistics<float>();
  test_merge_laws<double>();
  test_merge_laws<float>();
  test_nan_spreads<double>();
  test_nan_spreads<float>();
  test_losses();
  test_saturation<float>(-69, 1e-6);
  test_saturation<double>(-690, 1e-14);
  test_soft_border_cases();
  for (const Truth truth : kTruths) {
    for (const Distance distance : kDistances) {
      test_border_cases(truth, distance, 0, false);
      if (truth != Truth::ce) continue;
      test_border_cases(truth, distance, 0.1, false);
      test_border_cases(truth, distance, 0.1, true);
    }
  }
  return check::report();
}
