// The loss in pieces, as operators for whoever composes it without autograd (drsl_kernels/backends/pieces.py): the
// gradient in the place of the logits, and the loss of rows whose classes lie in several places. Relies on ops.h.
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "ops.h"

namespace drsl {
namespace {

using at::Tensor;

// Losses per row, and if wanted their derivatives by tau and statistics (3, rows) to report; tensors without elements
// where they are not. With `with_grad` the logits become the gradient: that of each row's loss, times upstream.
std::tuple<Tensor, Tensor, Tensor> loss_over_logits(
    const Tensor& logits, const Tensor& y, const std::optional<Tensor>& weight, const std::optional<Tensor>& margins,
    const std::optional<Tensor>& tau, double tau_value, int64_t truth, double q, int64_t distance, double scale,
    double margin, int64_t ignore_index, int64_t reduction, double label_smoothing, bool soft, double threshold,
    int64_t activation, const std::optional<Tensor>& upstream, const std::optional<Tensor>& label_logits,
    const std::optional<Tensor>& stats, bool with_grad, bool with_tau, bool return_stats) {
  Config config = make_config(tau_value, truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing,
                              soft, threshold, activation);
  config.reduction = Reduction::none;
  Wanted wanted;
  wanted.loss = true;
  wanted.grad = wanted.over_logits = with_grad;
  wanted.tau_grad = with_tau;
  wanted.stats = return_stats;
  Later later;
  later.upstream = upstream.value_or(Tensor());
  const Elsewhere elsewhere{label_logits.value_or(Tensor()), stats.value_or(Tensor())};
  const Result result = compute(logits, y, weight.value_or(Tensor()), margins.value_or(Tensor()),
                                tau.value_or(Tensor()), config, wanted, later, elsewhere);
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, result.loss.options()); };
  return {result.loss, or_none(result.tau_grad), or_none(result.stats)};
}

Tensor row_stats_operator(const Tensor& logits, const Tensor& y, int64_t truth, double q, int64_t distance,
                          double scale, double margin, int64_t ignore_index, int64_t reduction, double label_smoothing,
                          bool soft, double threshold, int64_t activation) {
  return row_stats(logits, y,
                   make_config(0, truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing, soft,
                               threshold, activation));
}

}  // namespace
}  // namespace drsl

#ifndef DRSL_LIBRARY
#define DRSL_LIBRARY drsl_kernels
#endif
#define DRSL_FRAGMENT(name, m) TORCH_LIBRARY_FRAGMENT(name, m)
#define DRSL_IMPLEMENT(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)
#define DRSL_CODES                                                                                 \
  "int truth, float q, int distance, float scale, float margin, int ignore_index, int reduction, " \
  "float label_smoothing, bool soft, float threshold, int activation"

DRSL_FRAGMENT(DRSL_LIBRARY, m) {
  m.def(
      "loss_over_logits(Tensor(a!) logits, Tensor y, Tensor? weight, Tensor? margins, Tensor? tau, float "
      "tau_value, " DRSL_CODES
      ", Tensor? upstream, Tensor? label_logits, Tensor? stats, bool with_grad, bool with_tau, bool return_stats) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("row_stats(Tensor logits, Tensor y, " DRSL_CODES ") -> Tensor");
}

DRSL_IMPLEMENT(DRSL_LIBRARY, CPU, m) {
  m.impl("loss_over_logits", drsl::loss_over_logits);
  m.impl("row_stats", drsl::row_stats_operator);
}
#if defined(DRSL_WITH_CUDA) && !defined(DRSL_CUDA_ON_HOST)
DRSL_IMPLEMENT(DRSL_LIBRARY, CUDA, m) {
  m.impl("loss_over_logits", drsl::loss_over_logits);
  m.impl("row_stats", drsl::row_stats_operator);
}
#endif
