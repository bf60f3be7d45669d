// Tensors in, tensors out: the loss of a call and what else is wanted, by the kernels of the tensors' device. No
// autograd. Relies on cpu/kernels.h and cuda/launch.h; ops.cpp relies on it.
#pragma once

#include <ATen/ATen.h>

#include "task.h"

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
  double threshold;
  Activation activation;
  bool soft;  // class probabilities: y and weight are the labels and weights of a SoftTarget (drsl_kernels/targets.py)
  double tau_value;  // where no tau tensor is given
};

struct Wanted {
  bool loss = false, grad = false, tau_grad = false, stats = false;
  bool saved = false;  // what makes a later gradient cheaper, if there is such a thing
  bool over_logits = false;  // the gradient takes the place of the logits
};

struct Result {
  at::Tensor loss, grad, tau_grad, stats;
  double grad_scale = 1;  // on the CPU: 1 / denominator of the mean
  at::Tensor denominator;  // on a device: of the mean
  at::Tensor saved;  // for `Later`
};

// For a gradient after the loss: what an earlier run left, and the upstream gradient.
struct Later {
  at::Tensor upstream;  // multiplies the gradient: one value, or one per row
  at::Tensor denominator, saved;  // from the earlier Result
  at::Tensor grad;  // if defined, the buffer to fill, which is right already if upstream is the one value 1
};

// For logits that are only some of the classes: see Task.
struct Elsewhere {
  at::Tensor label_logits;  // (rows,)
  at::Tensor stats;  // (rows, parts, kRowStats)
};

// Whether a run takes place on a device, in the order of a stream, where the host cannot look at values.
bool on_device(const at::Tensor& t);

// The value of a tensor whose elements are all the same one (an expanded scalar, say).
double single_value(const at::Tensor& t);

// Whatever is wanted. `margins` (classes,), if defined, are the classes' own in place of config.margin.
// Arguments are only checked for what would be unsafe: Python turns a failed check into an error that names the
// argument and its value (drsl_kernels/spec.py).
Result compute(const at::Tensor& logits, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& margins,
               const at::Tensor& tau, const Config& config, const Wanted& wanted, const Later& later = {},
               const Elsewhere& elsewhere = {});

// What `Elsewhere` wants of these classes, logits (rows, classes): (rows, kRowStats). Labels may be outside of them.
at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& y, const Config& config);

}  // namespace drsl
