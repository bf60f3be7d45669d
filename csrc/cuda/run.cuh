// Puts one task of one storage format on a stream: DeviceTask and Plan -> Call -> launches. Each format is compiled by
// itself (float32.cu and its like). Relies on the kernels and on plan.h; launch.cu chooses among the formats.
#pragma once

#include <utility>

#include "block_kernel.cuh"
#include "group_kernel.cuh"

namespace drsl {
namespace cuda {

// Returns null, or what CUDA says went wrong.
template <class D>
const char* run_format(const DeviceTask& task, const Plan& plan, cudaStream_t stream);

extern template const char* run_format<float>(const DeviceTask&, const Plan&, cudaStream_t);
extern template const char* run_format<double>(const DeviceTask&, const Plan&, cudaStream_t);
extern template const char* run_format<BFloat16>(const DeviceTask&, const Plan&, cudaStream_t);
extern template const char* run_format<Half>(const DeviceTask&, const Plan&, cudaStream_t);

// ---------------------------------------------------------------------------------------------------------

// Launches in order, until one fails.
class Launcher {
 public:
  Launcher(cudaStream_t stream, int64_t shared_limit) : stream_(stream), shared_limit_(shared_limit) {}

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, const A&... args) {
    constexpr int64_t kAlwaysAllowed = (48 << 10) - kOwnShared;
    if (error_ == cudaSuccess && shared_bytes > kAlwaysAllowed) {
      // Not this launch's size: another thread's smaller one could come between here and the launch.
      error_ = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_limit_));
    }
    if (error_ != cudaSuccess) {
      cudaGetLastError();  // reported here, and not again by the next call
      return;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, args...);
    const cudaError_t last = cudaGetLastError();
    if (error_ == cudaSuccess) error_ = last;
  }

  void fail(cudaError_t error) { error_ = error; }

  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  cudaStream_t stream_;
  int64_t shared_limit_;
  cudaError_t error_ = cudaSuccess;
};

inline Strides strides_of(const RowLayout& layout) {
  Strides strides{};
  strides.dims = layout.dims;
  for (int d = 0; d < layout.dims; ++d) {
    strides.sizes[d] = layout.sizes[d];
    strides.logits[d] = layout.logits_strides[d];
    strides.grad[d] = layout.grad_strides[d];
  }
  strides.logits_class = layout.logits_class_stride;
  strides.grad_class = layout.grad_class_stride;
  return strides;
}

// Whether rows start and end with whole packs of `width` elements.
template <class D>
bool whole_packs(const D* rows, const int64_t* strides, int64_t class_stride, const Task& t, int width) {
  bool whole = class_stride == 1 && t.classes % width == 0;
  whole &= reinterpret_cast<uintptr_t>(rows) % (width * sizeof(D)) == 0;
  for (int d = 0; d < t.layout.dims; ++d) whole &= strides[d] % width == 0;
  return whole;
}

template <class D>
Call<D> make_call(const DeviceTask& task, const Plan& plan) {
  using S = Accumulator<D>;
  const Task& t = task.task;
  char* const scratch = static_cast<char*>(task.scratch);
  Call<D> call{};
  call.params = {t.truth, t.distance, S(t.q), S(t.threshold), S(t.scale), S(t.smoothing), t.soft};
  call.rows = t.rows;
  call.ignore_index = t.ignore_index;
  call.classes = int(t.classes);
  call.strides = strides_of(t.layout);
  call.logits = static_cast<const D*>(t.logits);
  call.labels = t.labels;
  call.class_weights = static_cast<const S*>(t.class_weights);
  call.class_margins = static_cast<const S*>(t.class_margins);
  call.label_margin = S(t.margin);
  call.tau = S(t.tau);
  call.tau_rows = static_cast<const S*>(t.tau_rows);
  call.tau_stride = t.tau_stride;
  call.upstream = static_cast<const S*>(t.upstream);
  call.upstream_stride = t.upstream_stride;
  call.skip_unit_upstream = task.skip_unit_upstream;
  call.grad = static_cast<D*>(t.grad);
  call.loss = static_cast<S*>(t.loss);
  call.cross_entropy = static_cast<S*>(t.cross_entropy);
  call.distance = static_cast<S*>(t.distance_out);
  call.margin = static_cast<S*>(t.margin_out);
  call.tau_grad = static_cast<S*>(t.tau_grad);
  call.reduced_loss = static_cast<S*>(task.reduced_loss);
  call.mean = task.mean;
  call.denominator_known = task.denominator_known;
  call.denominator = task.denominator;
  call.weight_sums = plan.weight_blocks ? reinterpret_cast<double*>(scratch) : nullptr;
  call.weight_sum_count = plan.weight_blocks;
  call.loss_sums = reinterpret_cast<double*>(scratch + plan.loss_sums_at);
  const bool own_parts = plan.part_blocks && !task.stats_alone;
  call.parts = own_parts ? reinterpret_cast<S*>(scratch + plan.parts_at) : static_cast<S*>(task.stats);
  call.parts_per_row = own_parts ? plan.slices : 1;
  if (t.stats) {
    call.parts = static_cast<S*>(const_cast<void*>(t.stats));
    call.parts_per_row = int(t.stats_parts);
  }
  call.slices = plan.slices;
  call.slice_classes = (call.classes + plan.slices - 1) / plan.slices;
  call.stats = task.stats_known || task.stats_alone || t.grad ? nullptr : static_cast<S*>(task.stats);
  call.label_logits = static_cast<const S*>(t.label_logits);
  call.cached_packs = int(plan.shared_bytes / kPackBytes);
  if (plan.shape >= 0) {
    const int elements = kGroupShapes[plan.shape].elements;
    const int width = elements < kPackWidth<D> ? elements : kPackWidth<D>;
    call.packs = whole_packs(call.logits, t.layout.logits_strides, t.layout.logits_class_stride, t, width) &&
                 (!t.grad || whole_packs(call.grad, t.layout.grad_strides, t.layout.grad_class_stride, t, width));
  }
  return call;
}

template <class Terms, class D>
void launch_groups(const Call<D>& call, const Plan& plan, Launcher& launch) {
  const auto in_shape = [&]<int kShape>(std::integral_constant<int, kShape>) {
    constexpr GroupShape shape = kGroupShapes[kShape];
    if constexpr (has_shape(shape, sizeof(Accumulator<D>))) {
      if (plan.shape == kShape) {
        // A device refuses more threads than the kernel was compiled for; so does whoever stands in for one.
        constexpr int kMost =
            group_threads(sizeof(Accumulator<D>), shape.elements, Terms::kMoments, Terms::kWeightedMean);
        if (plan.threads > kMost) return launch.fail(cudaErrorInvalidValue);
        launch(group_kernel<D, Terms, shape.lanes, shape.elements>, plan.blocks, plan.threads, 0, call);
      }
    }
  };
  [&]<int... kShapes>(std::integer_sequence<int, kShapes...>) {
    (in_shape(std::integral_constant<int, kShapes>()), ...);
  }(std::make_integer_sequence<int, kGroupShapeCount>());
}

template <class Terms, class D>
void launch_blocks(Call<D> call, const Plan& plan, const DeviceTask& task, Launcher& launch) {
  if (plan.part_blocks) launch(part_kernel<D, Terms>, plan.part_blocks, plan.threads, 0, call);
  if (task.stats_alone) return;
  if (!call.grad) call.slices = 1, call.slice_classes = call.classes;  // a row's loss needs one block only
  if (plan.part_blocks || task.stats_known || task.task.stats)
    launch(block_kernel<D, Terms, false>, plan.blocks, plan.threads, 0, call);
  else launch(block_kernel<D, Terms, true>, plan.blocks, plan.threads, plan.shared_bytes, call);
}

template <class Terms, class D>
void launch_terms(const Call<D>& call, const Plan& plan, const DeviceTask& task, Launcher& launch) {
  if (plan.shape >= 0) launch_groups<Terms>(call, plan, launch);
  else launch_blocks<Terms>(call, plan, task, launch);
}

template <class D>
const char* run_format(const DeviceTask& task, const Plan& plan, cudaStream_t stream) {
  const Task& t = task.task;
  const Call<D> call = make_call<D>(task, plan);
  Launcher launch(stream, plan.shared_limit);
  if (plan.weight_blocks) {
    launch(weight_kernel<D>, plan.weight_blocks, kWeightThreads, 0, call, static_cast<double*>(task.scratch));
  }
  if (is_transformed(t) && has_weighted_mean(t)) {
    launch_terms<TermSet<true, true, true, true>>(call, plan, task, launch);
  } else if (is_transformed(t)) {
    launch_terms<TermSet<true, true, false, true>>(call, plan, task, launch);
  } else if (has_weighted_mean(t)) {
    launch_terms<TermSet<true, true, true>>(call, plan, task, launch);
  } else if (has_moments(t)) {
    launch_terms<TermSet<true, true, false>>(call, plan, task, launch);
  } else if (needs_squares(t.distance)) {
    launch_terms<TermSet<true, false, false>>(call, plan, task, launch);
  } else {
    launch_terms<TermSet<false, false, false>>(call, plan, task, launch);
  }
  if (call.reduced_loss && plan.blocks > 1) launch(finish_kernel<D>, 1, kFinishThreads, 0, call, plan.blocks);
  return launch.error();
}

}  // namespace cuda
}  // namespace drsl
