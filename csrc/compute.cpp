// From tensors to a Task for the CPU kernels, over the threads, and back. Relies on compute.h.
#include "compute.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <vector>

namespace drsl {
namespace {

using at::Tensor;

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

}  // namespace

double single_value(const Tensor& t) {
  if (!t.is_neg() && t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>();
  if (!t.is_neg() && t.scalar_type() == at::kDouble) return *t.const_data_ptr<double>();
  return t.detach().as_strided({}, {}, t.storage_offset()).to(at::kDouble).item<double>();
}

Result compute(const Tensor& logits_in, const Tensor& y_in, const Tensor& weight_in, const Tensor& tau_in,
               const Config& config, const Wanted& wanted, const Tensor& upstream_in) {
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

}  // namespace drsl
