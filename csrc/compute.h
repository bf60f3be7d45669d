// Tensors in, tensors out: the loss of a call and what else is wanted, by the CPU kernels. No autograd. Relies on
// cpu/kernels.h; ops.cpp relies on it.
#pragma once

#include <ATen/ATen.h>

#include "cpu/kernels.h"

namespace drsl {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// The arguments that are not tensors, and those of the tensors that need no gradient.
struct Config {
  Truth truth;
  double q;
  Distance distance;
  double scale, margin;
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;
  double tau_value;  // where no tau tensor is given
};

struct Wanted {
  bool grad = false, tau_grad = false, stats = false;
};

struct Result {
  at::Tensor loss, grad, tau_grad, stats;
  double grad_scale = 1;  // 1 / denominator of the mean
};

// The value of a tensor whose elements are all the same one (an expanded scalar, say).
double single_value(const at::Tensor& t);

// Losses, and what else is wanted. `upstream`, if defined, multiplies the gradient: one value, or one per row.
// Arguments are only checked for what would be unsafe: Python turns a failed check into an error that names the
// argument and its value (drsl_kernels/spec.py).
Result compute(const at::Tensor& logits, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& tau,
               const Config& config, const Wanted& wanted, const at::Tensor& upstream = {});

}  // namespace drsl
