// The operator drsl_kernels::softmax_loss on the CPU and on CUDA devices, with its autograd node. The gradient is
// computed together with the loss, into a buffer of its own, and handed over by the backward pass. Relies on compute.h;
// python.cpp calls the function behind the operator.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "cpu/kernels.h"
#include "ops.h"

namespace drsl {
namespace {

using at::Tensor;

// The loss in plain PyTorch (registered from Python), through which second derivatives go.
Tensor reference_loss(const Tensor& logits, const Tensor& y, const Tensor& weight, const Tensor& margins,
                      const Tensor& tau, const Config& config) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("drsl_kernels::reference_loss", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                        const std::optional<Tensor>&, double, int64_t, double, int64_t, double, double, int64_t,
                        int64_t, double, bool, double, int64_t)>();
  const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
  return op.call(logits, y, optional(weight), optional(margins), optional(tau), config.tau_value,
                 static_cast<int64_t>(config.truth), config.q, static_cast<int64_t>(config.distance), config.scale,
                 config.margin, config.ignore_index, static_cast<int64_t>(config.reduction), config.label_smoothing,
                 config.soft, config.threshold, static_cast<int64_t>(config.activation));
}

constexpr int64_t kCheapElements = 16384;  // a pass over so many takes less than the call around it

// Half precision has too little range to hold the gradient of a mean before it is scaled (by a loss scale of 2^16, say):
// it is computed when the scale is known; but not where computing it twice costs next to nothing. On a device the same
// holds for any half precision, and for losses per row: their upstream gradients are rarely all 1, and a gradient
// computed too early is computed twice.
bool gradient_waits(const Tensor& logits, const Config& config) {
  const bool half = logits.scalar_type() == at::kHalf;
  if (on_device(logits)) return half || config.reduction == Reduction::none;
  return half && config.reduction == Reduction::mean && logits.numel() > kCheapElements;
}

// Whether a gradient may have to be computed later: one that was rounded to half precision is not scaled. The CPU saves
// nothing of transformed logits: their gradient begins anew.
bool saves(const Tensor& logits, const Config& config) {
  if (!on_device(logits) && config.activation != Activation::softmax) return false;
  return on_device(logits) ? gradient_waits(logits, config) : logits.scalar_type() == at::kHalf;
}

// All upstream gradients are one value: reduced losses, and expanded scalars from a later sum or mean.
bool is_single_value(const Tensor& upstream) {
  for (int64_t d = 0; d < upstream.dim(); ++d) {
    if (upstream.size(d) != 1 && upstream.stride(d) != 0) return false;
  }
  return upstream.numel() > 0;
}

// False for wrappers without memory of their own: a batch of upstream gradients under vmap, say.
bool is_readable(const Tensor& t, at::Device device) {
  constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Python});
  return t.device() == device && !t.key_set().has_any(wrappers);
}

// A saved tensor as one pass needs it: unpacked when it is first asked for, and once, which is all that the hooks of a
// checkpoint allow.
class Once {
 public:
  explicit Once(const torch::autograd::SavedVariable& saved) : saved_(saved) {}
  const Tensor& operator()() {
    if (!tensor_) tensor_ = saved_.unpack();
    return *tensor_;
  }

 private:
  const torch::autograd::SavedVariable& saved_;
  std::optional<Tensor> tensor_;
};

struct SoftmaxLossBackward : torch::autograd::Node {
  Config config;
  torch::autograd::SavedVariable logits, y, weight, margins, tau;
  Tensor grad;  // d loss / d logits for an upstream gradient of 1, until handed over
  Tensor tau_grad;  // d row loss / d tau, per row, before the reduction
  double grad_scale = 1;
  Tensor denominator, saved;  // see Result
  at::Device device = at::kCPU;
  bool grad_on_device = false;
  bool released = false;

  std::string name() const override { return "SoftmaxLossBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    logits.reset_data();
    y.reset_data();
    weight.reset_data();
    margins.reset_data();
    tau.reset_data();
    grad.reset();
    tau_grad.reset();
    denominator.reset();
    saved.reset();
    released = true;
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor& upstream = upstreams[0];
    torch::autograd::variable_list grads(num_outputs());
    if (!upstream.defined()) return grads;
    if (at::GradMode::is_enabled() || !is_readable(upstream, device)) return differentiable(upstream);
    Once target(y), like(tau);  // what both gradients may ask for
    if (task_should_compute_output(0)) grads[0] = logits_gradient(upstream, target, like);
    if (grads.size() > 1 && task_should_compute_output(1)) grads[1] = tau_gradient(upstream, target, like());
    return grads;
  }

  Tensor logits_gradient(const Tensor& upstream, Once& target, Once& like) {
    const bool single = is_single_value(upstream);
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    if (grad_on_device) {
      // Whether the gradient at hand is right is decided there; one that somebody will need again is left alone.
      return gradient_later(single ? upstream.as_strided({}, {}) : upstream, keep ? Tensor() : std::move(grad), target,
                            like);
    }
    const double factor = single ? single_value(upstream) : 0;
    if (single && factor == 1 && grad.defined()) return take(keep);
    if (!grad.defined() || at::isReducedFloatingType(grad.scalar_type())) {
      // Scaling a rounded gradient would round it twice.
      return gradient_later(single ? at::scalar_tensor(factor, upstream.options()) : upstream, Tensor(), target, like);
    }
    if (single) return keep ? grad.mul(factor) : take(false).mul_(factor);
    const Tensor rows = (grad.dim() == 1 ? upstream.reshape({}) : upstream.unsqueeze(1)).to(grad.scalar_type());
    return keep ? grad.mul(rows) : take(false).mul_(rows);
  }

  Tensor gradient_later(const Tensor& upstream, Tensor buffer, Once& target, Once& like) {
    Wanted wanted;
    wanted.grad = true;
    const Later later{upstream, denominator, saved, std::move(buffer)};
    return compute(logits.unpack(), target(), weight.unpack(), margins.unpack(), like(), config, wanted, later).grad;
  }

  // The buffer itself where nobody needs it again, a copy where a later backward pass will.
  Tensor take(bool keep) { return keep ? grad.clone() : std::move(grad); }

  Tensor tau_gradient(const Tensor& upstream, Once& target, const Tensor& like) {
    Tensor rows = tau_grad * upstream.to(tau_grad.scalar_type()).reshape({-1}) * grad_scale;
    if (denominator.defined()) {
      // Where no row counts the loss is NaN, but nothing depends on it.
      const Tensor ignored = target().reshape({-1}) == config.ignore_index;
      rows = at::where(ignored, at::zeros({}, rows.options()), (rows / denominator).to(rows.scalar_type()));
    }
    return (like.dim() == 0 ? rows.sum() : rows.reshape(like.sizes())).to(like.options());
  }

  torch::autograd::variable_list differentiable(const Tensor& upstream) {
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode record(true);
    const Tensor z = logits.unpack(), t = tau.unpack();
    const Tensor loss = reference_loss(z, y.unpack(), weight.unpack(), margins.unpack(), t, config);
    torch::autograd::variable_list inputs, grads(num_outputs());
    if (task_should_compute_output(0)) inputs.push_back(z);
    const bool with_tau = grads.size() > 1 && task_should_compute_output(1);
    if (with_tau) inputs.push_back(t);
    auto found = torch::autograd::grad({loss}, inputs, {upstream}, create_graph, create_graph, true);
    if (task_should_compute_output(0)) grads[0] = found[0];
    if (with_tau) grads[1] = found.back();
    return grads;
  }
};

// Nodes are counted by an intrusive pointer from torch 2.13 on, by a shared one before.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) return c10::make_intrusive<N>();
  else return std::make_shared<N>();
}

}  // namespace

Config make_config(double tau_value, int64_t truth, double q, int64_t distance, double scale, double margin,
                   int64_t ignore_index, int64_t reduction, double label_smoothing, bool soft, double threshold,
                   int64_t activation) {
  TORCH_CHECK(truth >= 0 && truth < kTruthCount, "truth has code ", truth);
  TORCH_CHECK(distance >= 0 && distance < kDistanceCount, "distance has code ", distance);
  TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::sigsoftmax), "activation has code ",
              activation);
  TORCH_CHECK(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::sum), "reduction has code ", reduction);
  return {static_cast<Truth>(truth),
          q,
          static_cast<Distance>(distance),
          scale,
          margin,
          ignore_index,
          static_cast<Reduction>(reduction),
          label_smoothing,
          threshold,
          static_cast<Activation>(activation),
          soft,
          tau_value};
}

std::tuple<Tensor, Tensor> softmax_loss(const Tensor& logits, const Tensor& y, const Tensor& weight,
                                        const Tensor& margins, const Tensor& tau, const Config& config,
                                        bool return_stats) {
  const bool for_logits = at::GradMode::is_enabled() && logits.requires_grad();
  const bool for_tau = at::GradMode::is_enabled() && tau.defined() && tau.requires_grad();

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const bool waits = gradient_waits(logits, config);
  const Wanted wanted{true, for_logits && !waits, for_tau, return_stats, for_logits && saves(logits, config)};
  Result result = compute(logits, y, weight, margins, tau, config, wanted);
  if (for_logits || for_tau) {
    auto node = make_node<SoftmaxLossBackward>();
    node->config = config;
    node->logits = torch::autograd::SavedVariable(logits, false);
    node->y = torch::autograd::SavedVariable(y, false);
    node->weight = torch::autograd::SavedVariable(weight, false);
    node->margins = torch::autograd::SavedVariable(margins, false);
    node->tau = torch::autograd::SavedVariable(tau, false);
    node->grad = std::move(result.grad);
    node->tau_grad = std::move(result.tau_grad);
    node->grad_scale = result.grad_scale;
    node->denominator = std::move(result.denominator);
    node->saved = std::move(result.saved);
    node->device = logits.device();
    node->grad_on_device = on_device(logits);
    node->set_next_edges(tau.defined() ? torch::autograd::collect_next_edges(logits, tau)
                                       : torch::autograd::collect_next_edges(logits));
    torch::autograd::set_history(result.loss, node);
  }
  return {std::move(result.loss), std::move(result.stats)};
}

namespace {

std::tuple<Tensor, Tensor> softmax_loss_operator(const Tensor& logits, const Tensor& y,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& margins, const std::optional<Tensor>& tau,
                                                 double tau_value, int64_t truth, double q, int64_t distance,
                                                 double scale, double margin, int64_t ignore_index, int64_t reduction,
                                                 double label_smoothing, bool soft, double threshold,
                                                 int64_t activation, bool return_stats) {
  const Config config = make_config(tau_value, truth, q, distance, scale, margin, ignore_index, reduction,
                                    label_smoothing, soft, threshold, activation);
  return softmax_loss(logits, y, weight.value_or(Tensor()), margins.value_or(Tensor()), tau.value_or(Tensor()), config,
                      return_stats);
}

}  // namespace
}  // namespace drsl

// A test builds this file a second time, under another name, to run the CUDA kernels on the host.
#ifndef DRSL_LIBRARY
#define DRSL_LIBRARY drsl_kernels
#endif
#define DRSL_DEFINE(name, m) TORCH_LIBRARY(name, m)
#define DRSL_IMPLEMENT(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

DRSL_DEFINE(DRSL_LIBRARY, m) {
  m.def(
      "softmax_loss(Tensor logits, Tensor y, Tensor? weight, Tensor? margins, Tensor? tau, float tau_value, int truth, "
      "float q, int distance, float scale, float margin, int ignore_index, int reduction, float label_smoothing, "
      "bool soft, float threshold, int activation, bool return_stats) -> (Tensor, Tensor)");
}

DRSL_IMPLEMENT(DRSL_LIBRARY, AutogradCPU, m) { m.impl("softmax_loss", drsl::softmax_loss_operator); }
DRSL_IMPLEMENT(DRSL_LIBRARY, CPU, m) { m.impl("softmax_loss", drsl::softmax_loss_operator); }
#if defined(DRSL_WITH_CUDA) && !defined(DRSL_CUDA_ON_HOST)
DRSL_IMPLEMENT(DRSL_LIBRARY, AutogradCUDA, m) { m.impl("softmax_loss", drsl::softmax_loss_operator); }
DRSL_IMPLEMENT(DRSL_LIBRARY, CUDA, m) { m.impl("softmax_loss", drsl::softmax_loss_operator); }
#endif
