// The operator drsl_kernels::softmax_loss as a C++ function, with its autograd node. python.cpp relies on it.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "compute.h"

namespace drsl {

// Checked where codes come from outside.
Config make_config(double tau_value, int64_t truth, double q, int64_t distance, double scale, double margin,
                   int64_t ignore_index, int64_t reduction, double label_smoothing, bool soft, double threshold,
                   int64_t activation);

// The loss and, with return_stats, (3, ...) of statistics; undefined without. On tensors that have memory of their own.
std::tuple<at::Tensor, at::Tensor> softmax_loss(const at::Tensor& logits, const at::Tensor& y, const at::Tensor& weight,
                                                const at::Tensor& margins, const at::Tensor& tau, const Config& config,
                                                bool return_stats);

}  // namespace drsl
