// The operator drsl_kernels::softmax_loss on the CPU, with its autograd node. The gradient is computed together
// with the loss, into a buffer of its own, and handed over by the backward pass. Relies on cpu/kernels.h;
// drsl_kernels/backends/cpp.py calls the operator.
//
// Arguments are only checked here for what would be unsafe. Python turns a failed check into an error that names
// the argument and its value (drsl_kernels/spec.py).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace drsl {
namespace {

using at::Tensor;

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
  Tensor loss, grad, tau_grad, stats;
  double grad_scale = 1;  // 1 / denominator of the mean
};

// ---------------------------------------------------------------------------------------------------------
// Tensors -> Task

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

at::ScalarType accumulator_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_plain_cpu(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.layout() == at::kStrided && !t.key_set().has(c10::DispatchKey::Python), name,
              " must be a dense tensor on the CPU, got ", t.toString(), " on ", t.device());
}

void check_shapes(const Tensor& logits, const Tensor& y, const Tensor& weight, const Tensor& tau) {
  check_plain_cpu(logits, "logits");
  check_plain_cpu(y, "y");
  TORCH_CHECK_NOT_IMPLEMENTED(kernel_dtype(logits.scalar_type()), "logits have dtype ", logits.scalar_type());
  TORCH_CHECK(y.scalar_type() == at::kLong || y.scalar_type() == at::kByte, "y has dtype ", y.scalar_type());
  TORCH_CHECK(logits.dim() >= 1, "logits have no class dimension");
  if (logits.dim() == 1) {
    TORCH_CHECK(y.dim() == 0 || (y.dim() == 1 && y.numel() == 1), "y has shape ", y.sizes());
  } else {
    bool same = y.dim() == logits.dim() - 1 && y.size(0) == logits.size(0);
    for (int64_t d = 1; same && d < y.dim(); ++d) same = y.size(d) == logits.size(d + 1);
    TORCH_CHECK(same, "y has shape ", y.sizes(), ", logits ", logits.sizes());
  }
  if (weight.defined()) {
    check_plain_cpu(weight, "weight");
    TORCH_CHECK(weight.dim() == 1 && weight.numel() == logits.size(class_dim(logits)) && weight.is_floating_point(),
                "weight has shape ", weight.sizes());
  }
  if (tau.defined()) {
    check_plain_cpu(tau, "tau");
    TORCH_CHECK(tau.dim() == 0 || tau.sizes() == y.sizes(), "tau has shape ", tau.sizes());
    TORCH_CHECK(tau.is_floating_point(), "tau has dtype ", tau.scalar_type());
  }
}

// RowLayout with the storage it points to. Neighbouring row dimensions that step evenly in both tensors are one.
struct Layout {
  std::vector<int64_t> sizes, logits_strides, grad_strides;
  int64_t logits_class_stride, grad_class_stride;

  Layout(const Tensor& logits, const Tensor& grad) {
    const int64_t classes_at = class_dim(logits);
    logits_class_stride = logits.stride(classes_at);
    grad_class_stride = grad.defined() ? grad.stride(classes_at) : logits_class_stride;
    for (int64_t d = 0; d < logits.dim(); ++d) {
      if (d != classes_at) add(logits.size(d), logits.stride(d), grad.defined() ? grad.stride(d) : logits.stride(d));
    }
    if (sizes.empty()) add(1, 0, 0);
  }

  void add(int64_t size, int64_t stride, int64_t grad_stride) {
    if (size == 1 && !sizes.empty()) return;
    if (!sizes.empty() &&
        (sizes.back() == 1 || (logits_strides.back() == stride * size && grad_strides.back() == grad_stride * size))) {
      sizes.back() *= size;
      logits_strides.back() = stride;
      grad_strides.back() = grad_stride;
      return;
    }
    sizes.push_back(size);
    logits_strides.push_back(stride);
    grad_strides.push_back(grad_stride);
  }

  RowLayout view() const {
    return {static_cast<int>(sizes.size()),
            sizes.data(),
            logits_strides.data(),
            grad_strides.data(),
            logits_class_stride,
            grad_class_stride};
  }
};

// ---------------------------------------------------------------------------------------------------------
// Running a Task

// Scratch that a thread keeps between calls, up to a few megabytes.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, size_);
      if (!memory_) size_ = 0;
      TORCH_CHECK(memory_, "out of memory: ", bytes, " bytes of scratch");
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

constexpr int64_t kScratchKept = int64_t(4) << 20;
constexpr int64_t kGrainElements = 32768;  // less work than this per thread costs more than it saves

// Sum of the rows' losses. Chunks have a size of their own, and their sums are added in order, so the result
// does not depend on the number of threads.
double run_rows(const Kernels& kernels, const Task& task) {
  int64_t chunk = kGrainElements / std::max<int64_t>(task.classes, 1);
  chunk = std::max<int64_t>(chunk / 16 * 16, chunk >= 16 ? 16 : std::max<int64_t>(chunk, 1));
  const int64_t chunks = (task.rows + chunk - 1) / chunk;
  const int64_t bytes = kernels.scratch_bytes(task);
  c10::SmallVector<double, 64> sums(chunks, 0.0);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(chunk * task.classes, 1));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch kept;
    Scratch own;
    void* scratch = (bytes <= kScratchKept ? kept : own).get(bytes);
    for (int64_t i = begin; i < end; ++i) {
      sums[i] = kernels.run(task, i * chunk, std::min((i + 1) * chunk, task.rows), scratch);
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template <class S>
double weight_of_labels(const Tensor& weight, const Tensor& y, int64_t ignore_index) {
  const S* w = weight.const_data_ptr<S>();
  const int64_t* labels = y.const_data_ptr<int64_t>();
  double sum = 0;
  for (int64_t i = 0; i < y.numel(); ++i) {
    if (labels[i] != ignore_index) sum += static_cast<double>(w[labels[i]]);
  }
  return sum;
}

// Lazy negation (of an imaginary part that was conjugated, say) is invisible to a reader of the memory.
Tensor in_memory(const Tensor& t) { return t.is_neg() ? t.resolve_neg() : t; }

Tensor to_accumulator(const Tensor& t, at::ScalarType type) {
  return t.defined() ? in_memory(t).to(type).contiguous() : t;
}

// The value of a tensor whose elements are all the same one (an expanded scalar, say).
double single_value(const Tensor& t) {
  if (!t.is_neg() && t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>();
  if (!t.is_neg() && t.scalar_type() == at::kDouble) return *t.const_data_ptr<double>();
  return t.detach().as_strided({}, {}, t.storage_offset()).to(at::kDouble).item<double>();
}

// Losses, and what else is wanted. `upstream`, if defined, multiplies the gradient: one value, or one per row.
Result compute(const Tensor& logits_in, const Tensor& y_in, const Tensor& weight_in, const Tensor& tau_in,
               const Config& config, const Wanted& wanted, const Tensor& upstream_in = {}) {
  check_shapes(logits_in, y_in, weight_in, tau_in);
  const Tensor logits = in_memory(logits_in);
  const Kernels& cpu = kernels();
  const at::ScalarType type = accumulator_type(logits);
  const auto options = logits.options().dtype(type);
  const Tensor y = in_memory(y_in).to(at::kLong).contiguous();
  const Tensor weight = to_accumulator(weight_in, type);
  const bool tau_per_row = tau_in.defined() && tau_in.dim() > 0;
  const Tensor tau_rows = tau_per_row ? to_accumulator(tau_in, type) : Tensor();
  const Tensor upstream = to_accumulator(upstream_in, type);

  Task task{};
  task.dtype = *kernel_dtype(logits.scalar_type());
  task.truth = config.truth;
  task.distance = config.distance;
  task.q = config.q;
  task.scale = config.scale;
  task.margin = config.margin;
  task.smoothing = config.label_smoothing;
  task.rows = y.numel();
  task.classes = logits.size(class_dim(logits));
  task.ignore_index = config.ignore_index;
  task.tau = tau_in.defined() && !tau_per_row ? single_value(tau_in) : config.tau_value;
  TORCH_CHECK_VALUE(std::isfinite(task.tau), "tau is ", task.tau);
  TORCH_CHECK_VALUE(!tau_per_row || at::isfinite(tau_in).all().item<bool>(), "tau has a value that is not finite");
  const bool penalised = task.distance != Distance::none && (tau_per_row || task.tau != 0);
  if (!penalised) task.tau = 0;
  if (!penalised && !wanted.stats && !wanted.tau_grad) task.distance = Distance::none;
  if (wanted.stats && task.distance == Distance::none) task.distance = Distance::uniform;

  const int64_t* labels = y.const_data_ptr<int64_t>();
  const LabelScan scan = cpu.scan_labels(labels, task.rows, task.classes, config.ignore_index);
  TORCH_CHECK_INDEX(!scan.out_of_range, "y holds a label outside [0, ", task.classes, ")");
  TORCH_CHECK(task.classes <= std::numeric_limits<int32_t>::max(), "more than 2^31 - 1 classes");

  Result result;
  double denominator = 1;
  if (config.reduction == Reduction::mean) {
    denominator = static_cast<double>(scan.counted);
    if (weight.defined()) {
      denominator = type == at::kDouble ? weight_of_labels<double>(weight, y, config.ignore_index)
                                        : weight_of_labels<float>(weight, y, config.ignore_index);
    }
    // The mean over no row at all is NaN, but nothing depends on it.
    result.grad_scale = scan.counted == 0 ? 0 : 1 / denominator;
  }
  if (wanted.grad) result.grad = at::empty_like(logits);
  if (wanted.tau_grad) result.tau_grad = at::zeros({task.rows}, options);
  const bool per_row = config.reduction == Reduction::none;
  // An unbatched row may come with a target of shape (1,): the loss is a scalar all the same.
  result.loss =
      per_row ? at::empty(logits.dim() == 1 ? at::IntArrayRef{} : y.sizes(), options) : at::empty({}, options);
  if (wanted.stats) {
    std::vector<int64_t> shape{3};
    if (logits.dim() > 1) shape.insert(shape.end(), y_in.sizes().begin(), y_in.sizes().end());
    result.stats = at::empty(shape, options);
  }

  const Layout layout(logits, result.grad);
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const auto read = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  task.layout = layout.view();
  task.logits = logits.const_data_ptr();
  task.labels = labels;
  task.class_weights = read(weight);
  task.tau_rows = penalised ? read(tau_rows) : nullptr;
  task.grad_scale = result.grad_scale;
  task.upstream = read(upstream);
  task.upstream_stride = upstream.defined() && upstream.dim() > 0 && upstream.numel() > 1 ? 1 : 0;
  task.grad = data(result.grad);
  task.loss = per_row ? data(result.loss) : nullptr;
  task.tau_grad = config.distance == Distance::none ? nullptr : data(result.tau_grad);
  if (wanted.stats) {
    char* const stats = static_cast<char*>(data(result.stats));
    const int64_t step = task.rows * static_cast<int64_t>(result.stats.element_size());
    task.cross_entropy = stats;
    task.distance_out = stats + step;
    task.margin_out = stats + 2 * step;
  }
  const double sum = run_rows(cpu, task);
  if (!per_row) {
    const double loss = sum / denominator;
    if (type == at::kDouble) *result.loss.mutable_data_ptr<double>() = loss;
    else *result.loss.mutable_data_ptr<float>() = static_cast<float>(loss);
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------------
// Autograd

// The loss in plain PyTorch (registered from Python), through which second derivatives go.
Tensor reference_loss(const Tensor& logits, const Tensor& y, const Tensor& weight, const Tensor& tau,
                      const Config& config) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("drsl_kernels::reference_loss", "")
          .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                        double, int64_t, double, int64_t, double, double, int64_t, int64_t, double)>();
  const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
  return op.call(logits, y, optional(weight), optional(tau), config.tau_value, static_cast<int64_t>(config.truth),
                 config.q, static_cast<int64_t>(config.distance), config.scale, config.margin, config.ignore_index,
                 static_cast<int64_t>(config.reduction), config.label_smoothing);
}

// Half precision has too little range to hold a gradient before it is scaled (by a loss scale of 2^16, say), so
// its gradient is computed when the scale is known.
bool gradient_waits(const Tensor& logits) { return logits.scalar_type() == at::kHalf; }

// All upstream gradients are one value: reduced losses, and expanded scalars from a later sum or mean.
bool is_single_value(const Tensor& upstream) {
  for (int64_t d = 0; d < upstream.dim(); ++d) {
    if (upstream.size(d) != 1 && upstream.stride(d) != 0) return false;
  }
  return upstream.numel() > 0;
}

// False for wrappers without memory of their own: a batch of upstream gradients under vmap, say.
bool is_readable(const Tensor& t) {
  constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                          c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Python});
  return t.device().is_cpu() && !t.key_set().has_any(wrappers);
}

struct SoftmaxLossBackward : torch::autograd::Node {
  Config config;
  torch::autograd::SavedVariable logits, y, weight, tau;
  Tensor grad;      // d loss / d logits for an upstream gradient of 1, until handed over
  Tensor tau_grad;  // d row loss / d tau, per row, before the reduction
  double grad_scale = 1;
  bool released = false;

  std::string name() const override { return "SoftmaxLossBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    logits.reset_data();
    y.reset_data();
    weight.reset_data();
    tau.reset_data();
    grad.reset();
    tau_grad.reset();
    released = true;
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstreams) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor& upstream = upstreams[0];
    torch::autograd::variable_list grads(num_outputs());
    if (!upstream.defined()) return grads;
    if (at::GradMode::is_enabled() || !is_readable(upstream)) return differentiable(upstream);
    if (task_should_compute_output(0)) grads[0] = logits_gradient(upstream);
    if (grads.size() > 1 && task_should_compute_output(1)) grads[1] = tau_gradient(upstream);
    return grads;
  }

  Tensor logits_gradient(const Tensor& upstream) {
    const bool single = is_single_value(upstream);
    const double factor = single ? single_value(upstream) : 0;
    if (single && factor == 1 && grad.defined()) return take(torch::autograd::get_current_graph_task_keep_graph());
    if (!grad.defined() || at::isReducedFloatingType(grad.scalar_type())) {
      // Scaling a rounded gradient would round it twice.
      const Tensor one_value = single ? at::scalar_tensor(factor, upstream.options()) : upstream;
      return compute(logits.unpack(), y.unpack(), weight.unpack(), tau.unpack(), config, Wanted{true, false, false},
                     one_value)
          .grad;
    }
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    if (single) return keep ? grad.mul(factor) : take(false).mul_(factor);
    const Tensor rows = (grad.dim() == 1 ? upstream.reshape({}) : upstream.unsqueeze(1)).to(grad.scalar_type());
    return keep ? grad.mul(rows) : take(false).mul_(rows);
  }

  // The buffer itself where nobody needs it again, a copy where a later backward pass will.
  Tensor take(bool keep) { return keep ? grad.clone() : std::move(grad); }

  Tensor tau_gradient(const Tensor& upstream) {
    const Tensor like = tau.unpack();
    const Tensor rows = tau_grad * upstream.to(tau_grad.scalar_type()).reshape({-1}) * grad_scale;
    return (like.dim() == 0 ? rows.sum() : rows.reshape(like.sizes())).to(like.scalar_type());
  }

  torch::autograd::variable_list differentiable(const Tensor& upstream) {
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode record(true);
    const Tensor z = logits.unpack(), t = tau.unpack();
    const Tensor loss = reference_loss(z, y.unpack(), weight.unpack(), t, config);
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

Config make_config(double tau_value, int64_t truth, double q, int64_t distance, double scale, double margin,
                   int64_t ignore_index, int64_t reduction, double label_smoothing) {
  TORCH_CHECK(truth >= 0 && truth <= static_cast<int64_t>(Truth::log_odds), "truth has code ", truth);
  TORCH_CHECK(distance >= 0 && distance <= static_cast<int64_t>(Distance::kl), "distance has code ", distance);
  TORCH_CHECK(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::sum), "reduction has code ", reduction);
  return {static_cast<Truth>(truth),
          q,
          static_cast<Distance>(distance),
          scale,
          margin,
          ignore_index,
          static_cast<Reduction>(reduction),
          label_smoothing,
          tau_value};
}

std::tuple<Tensor, Tensor> softmax_loss(const Tensor& logits, const Tensor& y, const std::optional<Tensor>& weight_in,
                                        const std::optional<Tensor>& tau_in, double tau_value, int64_t truth, double q,
                                        int64_t distance, double scale, double margin, int64_t ignore_index,
                                        int64_t reduction, double label_smoothing, bool return_stats) {
  const Tensor weight = weight_in.value_or(Tensor()), tau = tau_in.value_or(Tensor());
  const Config config =
      make_config(tau_value, truth, q, distance, scale, margin, ignore_index, reduction, label_smoothing);
  const bool for_logits = at::GradMode::is_enabled() && logits.requires_grad();
  const bool for_tau = at::GradMode::is_enabled() && tau.defined() && tau.requires_grad();

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Wanted wanted{for_logits && !gradient_waits(logits), for_tau, return_stats};
  Result result = compute(logits, y, weight, tau, config, wanted);
  if (for_logits || for_tau) {
    auto node = make_node<SoftmaxLossBackward>();
    node->config = config;
    node->logits = torch::autograd::SavedVariable(logits, false);
    node->y = torch::autograd::SavedVariable(y, false);
    node->weight = torch::autograd::SavedVariable(weight, false);
    node->tau = torch::autograd::SavedVariable(tau, false);
    node->grad = std::move(result.grad);
    node->tau_grad = std::move(result.tau_grad);
    node->grad_scale = result.grad_scale;
    node->set_next_edges(tau.defined() ? torch::autograd::collect_next_edges(logits, tau)
                                       : torch::autograd::collect_next_edges(logits));
    torch::autograd::set_history(result.loss, node);
  }
  return {std::move(result.loss), std::move(result.stats)};
}

std::string cpu_capability() { return kernels().name; }

}  // namespace
}  // namespace drsl

TORCH_LIBRARY(drsl_kernels, m) {
  m.def(
      "softmax_loss(Tensor logits, Tensor y, Tensor? weight, Tensor? tau, float tau_value, int truth, float q, "
      "int distance, float scale, float margin, int ignore_index, int reduction, float label_smoothing, "
      "bool return_stats) -> (Tensor, Tensor)");
  m.def("cpu_capability() -> str", drsl::cpu_capability);
}

TORCH_LIBRARY_IMPL(drsl_kernels, AutogradCPU, m) { m.impl("softmax_loss", drsl::softmax_loss); }
TORCH_LIBRARY_IMPL(drsl_kernels, CPU, m) { m.impl("softmax_loss", drsl::softmax_loss); }
