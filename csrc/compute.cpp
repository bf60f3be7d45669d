// From tensors to a Task for the kernels of their device, and back. Relies on arguments.h, on_cpu.h and cuda/launch.h.
#include "compute.h"

#include "arguments.h"
#include "cpu/kernels.h"
#include "on_cpu.h"
#ifdef DRSL_WITH_CUDA
#include "cuda/launch.h"
#endif

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#if defined(DRSL_WITH_CUDA) && !defined(DRSL_CUDA_ON_HOST)
// torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h), which that header shows only where USE_CUDA is
// defined.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace drsl {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------------------
// Tensors -> Task

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

constexpr size_t kMaxDeviceDims = 4;  // of rows, in a gradient that is laid out as the logits are

// Where the rows and everything that is read or written lie, but for what depends on the device.
struct Inputs {
  Tensor logits, y, weight, margins, tau, upstream, label_logits, stats;
  at::ScalarType acc;
  bool penalised;
};

Task make_task(const Inputs& in, const Config& config, const Wanted& wanted, const Result& result,
               const Layout& layout) {
  Task task{};
  task.dtype = *kernel_dtype(in.logits.scalar_type());
  task.truth = config.truth;
  task.distance = config.distance;
  if (!in.penalised && !wanted.stats && !wanted.tau_grad) task.distance = Distance::none;
  if (wanted.stats && task.distance == Distance::none) task.distance = Distance::uniform;
  task.activation = config.activation;
  task.q = config.q;
  task.threshold = config.threshold;
  task.scale = config.scale;
  task.margin = config.margin;
  task.smoothing = config.label_smoothing;
  task.soft = config.soft;
  task.rows = in.y.numel();
  task.classes = in.logits.size(class_dim(in.logits));
  task.ignore_index = config.ignore_index;
  task.layout = layout.view();

  const auto read = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  const auto step = [](const Tensor& t) { return t.defined() && t.dim() > 0 && t.numel() > 1 ? 1 : 0; };
  task.logits = in.logits.const_data_ptr();
  task.labels = in.y.const_data_ptr<int64_t>();
  task.class_weights = read(in.weight);
  task.class_margins = read(in.margins);
  task.tau = in.penalised ? config.tau_value : 0;
  task.tau_rows = in.penalised ? read(in.tau) : nullptr;
  task.tau_stride = step(in.tau);
  task.saved = in.logits.is_cpu() ? data(result.saved) : nullptr;
  task.from_saved = task.saved && !wanted.saved;
  task.label_logits = read(in.label_logits);
  task.stats = read(in.stats);
  task.stats_parts = in.stats.defined() ? in.stats.size(1) : 0;
  task.upstream = read(in.upstream);
  task.upstream_stride = step(in.upstream);
  task.grad_scale = result.grad_scale;
  task.grad = data(result.grad);
  const bool per_row = config.reduction == Reduction::none && wanted.loss;
  task.loss = per_row ? data(result.loss) : nullptr;
  task.tau_grad = config.distance == Distance::none ? nullptr : data(result.tau_grad);
  if (wanted.stats) {
    char* const stats = static_cast<char*>(data(result.stats));
    const int64_t bytes = task.rows * static_cast<int64_t>(result.stats.element_size());
    task.cross_entropy = stats;
    task.distance_out = stats + bytes;
    task.margin_out = stats + 2 * bytes;
  }
  return task;
}

// ---------------------------------------------------------------------------------------------------------
// On the CPU

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

// What the mean divides by; 1 for the other reductions.
double scan_labels(const Inputs& in, const Config& config, Result& result) {
  const int64_t classes = in.logits.size(class_dim(in.logits));
  const LabelScan scan =
      kernels().scan_labels(in.y.const_data_ptr<int64_t>(), in.y.numel(), classes, config.ignore_index);
  TORCH_CHECK_INDEX(!scan.out_of_range, "y holds a label outside [0, ", classes, ")");
  if (config.reduction != Reduction::mean) return 1;
  double denominator = static_cast<double>(scan.counted);
  if (in.weight.defined() && !config.soft) {
    denominator = in.acc == at::kDouble ? weight_of_labels<double>(in.weight, in.y, config.ignore_index)
                                        : weight_of_labels<float>(in.weight, in.y, config.ignore_index);
  }
  // The mean over no row at all is NaN, but nothing depends on it.
  result.grad_scale = scan.counted == 0 ? 0 : 1 / denominator;
  return denominator;
}

void compute_on_cpu(const Task& task, const Config& config, double denominator, const Result& result) {
  const double sum = run_on_cpu(task);
  if (!result.loss.defined() || config.reduction == Reduction::none) return;
  const double loss = sum / denominator;
  if (result.loss.scalar_type() == at::kDouble) *result.loss.mutable_data_ptr<double>() = loss;
  else *result.loss.mutable_data_ptr<float>() = static_cast<float>(loss);
}

// ---------------------------------------------------------------------------------------------------------
// On a device

#ifdef DRSL_WITH_CUDA

void* current_stream([[maybe_unused]] at::Device device) {
#ifdef DRSL_CUDA_ON_HOST
  return nullptr;
#else
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0, "no current stream of ", device);
  return stream;
#endif
}

void launch_on_device(cuda::DeviceTask& work, const at::TensorOptions& options) {
  const c10::DeviceGuard guard(options.device());
  const Tensor scratch = at::empty({cuda::scratch_bytes(work)}, options.dtype(at::kByte));
  work.scratch = scratch.mutable_data_ptr();
  const char* const error = cuda::run(work, current_stream(options.device()));
  TORCH_CHECK(!error, "CUDA error: ", error);
}

void run_on_device(const Task& task, const at::TensorOptions& options, const Config& config, const Wanted& wanted,
                   const Later& later, Result& result) {
  const c10::DeviceGuard guard(options.device());
  const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  cuda::DeviceTask work{};
  work.task = task;
  work.reduced_loss = config.reduction == Reduction::none ? nullptr : data(result.loss);
  work.mean = config.reduction == Reduction::mean;
  work.denominator_known = later.denominator.defined();
  if (work.mean) {
    result.denominator = work.denominator_known ? later.denominator : at::empty({}, options.dtype(at::kDouble));
    work.denominator = result.denominator.mutable_data_ptr<double>();
  }
  work.skip_unit_upstream = later.grad.defined() && task.upstream_stride == 0;
  work.stats_known = later.saved.defined();
  if (work.stats_known) result.saved = later.saved;
  else if (wanted.saved && cuda::saves_stats(task)) {
    result.saved = at::empty({task.rows, cuda::kSavedStats}, options);
  }
  work.stats = data(result.saved);
  launch_on_device(work, options);
}

#endif

void check_elsewhere(const Tensor& logits, const Tensor& y, const Tensor& weight, const Tensor& margins,
                     const Config& config, const Elsewhere& elsewhere) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1, "some classes of rows must be an ordinary matrix");
  TORCH_CHECK(!weight.defined() && !margins.defined() && !config.soft && config.activation == Activation::softmax &&
                  config.reduction == Reduction::none,
              "a loss that some of the classes cannot compute");
  const Tensor &stats = elsewhere.stats, &label_logits = elsewhere.label_logits;
  TORCH_CHECK(stats.dim() == 3 && stats.size(0) == y.numel() && stats.size(1) > 0 && stats.size(2) == kRowStats &&
                  stats.device() == logits.device(),
              "stats have shape ", stats.sizes());
  TORCH_CHECK(label_logits.defined() && label_logits.sizes() == y.sizes() && label_logits.device() == logits.device(),
              "label_logits must be one per row");
}

// A batch without rows, or rows without classes: no label is one, so all but ignored rows are NaN.
void fill_empty(const Inputs& in, const Config& config, const Result& result) {
  if (result.stats.defined()) result.stats.zero_();
  if (!result.loss.defined()) return;
  const Tensor rows = at::where(in.y == config.ignore_index, 0.0, std::nan("")).to(result.loss.scalar_type());
  if (config.reduction == Reduction::none) result.loss.copy_(rows.reshape(result.loss.sizes()));
  else if (config.reduction == Reduction::sum) result.loss.copy_(rows.sum());
  else result.loss.fill_(std::nan(""));
}

}  // namespace

bool on_device([[maybe_unused]] const Tensor& t) {
#if defined(DRSL_CUDA_ON_HOST)
  return true;
#elif defined(DRSL_WITH_CUDA)
  return t.is_cuda();
#else
  return false;
#endif
}

double single_value(const Tensor& t) {
  if (t._is_zerotensor()) return 0;
  if (!t.is_neg() && t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>();
  if (!t.is_neg() && t.scalar_type() == at::kDouble) return *t.const_data_ptr<double>();
  return t.detach().as_strided({}, {}, t.storage_offset()).to(at::kDouble).item<double>();
}

Result compute(const Tensor& logits_in, const Tensor& y_in, const Tensor& weight_in, const Tensor& margins_in,
               const Tensor& tau_in, const Config& config_in, const Wanted& wanted, const Later& later,
               const Elsewhere& elsewhere) {
  check_shapes(logits_in, y_in, weight_in, margins_in, tau_in, config_in.soft);
  const bool is_part = elsewhere.stats.defined();
  if (is_part) check_elsewhere(logits_in, y_in, weight_in, margins_in, config_in, elsewhere);
  Config config = config_in;
  Inputs in;
  in.logits = in_memory(logits_in);
  in.acc = accumulator_type(in.logits);
  in.y = in_memory(y_in).to(at::kLong).contiguous();
  in.weight = to_accumulator(weight_in, in.acc);
  in.margins = to_accumulator(margins_in, in.acc);
  in.upstream = to_accumulator(later.upstream, in.acc);
  in.label_logits = to_accumulator(elsewhere.label_logits, in.acc);
  in.stats = to_accumulator(elsewhere.stats, in.acc);
  // One value that the host holds is passed as such, one on a device stays there.
  const bool tau_on_host = tau_in.defined() && tau_in.dim() == 0 && tau_in.is_cpu();
  if (tau_on_host) config.tau_value = single_value(tau_in);
  else in.tau = to_accumulator(tau_in, in.acc);
  const bool device = on_device(in.logits);
  TORCH_CHECK_VALUE(std::isfinite(config.tau_value), "tau is ", config.tau_value);
  TORCH_CHECK_VALUE(!in.tau.defined() || !in.tau.is_cpu() || at::isfinite(tau_in).all().item<bool>(),
                    "tau has a value that is not finite");
  TORCH_CHECK_VALUE(!in.margins.defined() || !in.margins.is_cpu() || all_finite(in.margins),
                    "margin has a value that is not finite");
  in.penalised = config.distance != Distance::none && (in.tau.defined() || config.tau_value != 0);
  TORCH_CHECK(in.logits.size(class_dim(in.logits)) <= std::numeric_limits<int32_t>::max(),
              "more than 2^31 - 1 classes");

  Result result;
  const auto options = in.logits.options().dtype(in.acc);
  const bool known = device || later.saved.defined() || is_part;
  const double denominator = known ? 1 : scan_labels(in, config, result);
  if (device && in.logits.dim() > static_cast<int64_t>(kMaxDeviceDims) + 1) {
    // The gradient of a view may be laid out in another way than the view.
    const Tensor grad = later.grad.defined() ? later.grad : at::empty_like(in.logits, options.device(at::kMeta));
    if (Layout(in.logits, grad).sizes.size() > kMaxDeviceDims) in.logits = in.logits.contiguous();
  }
  if (wanted.grad) {
    TORCH_CHECK(!wanted.over_logits || in.logits.is_same(logits_in), "logits cannot be written to");
    result.grad = wanted.over_logits ? in.logits : later.grad.defined() ? later.grad : at::empty_like(in.logits);
    if (!device && !wanted.over_logits) ask_for_large_pages(result.grad);
  }
  if (wanted.tau_grad) result.tau_grad = at::zeros({in.y.numel()}, options);
  if (wanted.loss) {
    // An unbatched row may come with a target of shape (1,): the loss is a scalar all the same.
    const bool scalar = config.reduction != Reduction::none || in.logits.dim() == 1;
    result.loss = at::empty(scalar ? at::IntArrayRef{} : y_in.sizes(), options);
  }
  if (wanted.stats) {
    std::vector<int64_t> shape{3};
    if (in.logits.dim() > 1) shape.insert(shape.end(), y_in.sizes().begin(), y_in.sizes().end());
    result.stats = at::empty(shape, options);
  }

  if (!device) result.saved = later.saved;
  if (!device && wanted.saved) result.saved = at::empty({kSavedFields, in.y.numel()}, options);

  const Layout layout(in.logits, result.grad);
  TORCH_CHECK(!device || layout.sizes.size() <= kMaxDeviceDims, "a layout of ", layout.sizes.size(), " dimensions");
  Task task = make_task(in, config, wanted, result, layout);
  if (!device) compute_on_cpu(task, config, denominator, result);
#ifdef DRSL_WITH_CUDA
  else if (in.logits.numel() > 0) {
    Tensor apart;  // of rows that several blocks share, one may still read what another has written
    if (wanted.over_logits && cuda::shares_rows(task)) {
      apart = at::empty_like(in.logits);
      task.grad = apart.mutable_data_ptr();
    }
    run_on_device(task, options, config, wanted, later, result);
    if (apart.defined()) in.logits.copy_(apart);
  }
#endif
  else
    fill_empty(in, config, result);
  return result;
}

Tensor row_stats(const Tensor& logits_in, const Tensor& y_in, const Config& config) {
  check_shapes(logits_in, y_in, {}, {}, {}, false);
  TORCH_CHECK(logits_in.dim() == 2, "logits have shape ", logits_in.sizes());
  TORCH_CHECK(config.activation == Activation::softmax && !config.soft, "statistics of parts are of plain logits");
  Inputs in;
  in.logits = in_memory(logits_in).contiguous();
  in.acc = accumulator_type(in.logits);
  in.y = in_memory(y_in).to(at::kLong).contiguous();
  in.penalised = true;
  const auto options = in.logits.options().dtype(in.acc);
  const Tensor stats = at::empty({in.y.numel(), kRowStats}, options);
  const Layout layout(in.logits, {});
  Task task = make_task(in, config, {}, {}, layout);
  if (task.distance == Distance::none) task.distance = Distance::uniform;  // which may be reported
  if (in.logits.numel() == 0) {
    const double nothing[kRowStats] = {-std::numeric_limits<double>::infinity()};
    return stats.copy_(at::tensor(at::ArrayRef<double>(nothing, kRowStats)));
  }
  if (!on_device(in.logits)) {
    row_stats_on_cpu(task, stats.mutable_data_ptr());
    return stats;
  }
#ifdef DRSL_WITH_CUDA
  cuda::DeviceTask work{};
  work.task = task;
  work.stats = stats.mutable_data_ptr();
  work.stats_alone = true;
  launch_on_device(work, options);
#endif
  return stats;
}

}  // namespace drsl
