// The entry points of launch.h: what the current device can do, and which storage format a task has. Relies on plan.h
// and run.cuh; compiles no kernel itself.
#include "launch.h"

#include <vector>

#include "run.cuh"

namespace drsl {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

std::vector<Device> query_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  std::vector<Device> devices;
  for (int i = 0; i < count; ++i) {
    devices.push_back(
        {attribute(cudaDevAttrMultiProcessorCount, i), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i),
         attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, i), attribute(cudaDevAttrL2CacheSize, i)});
  }
  return devices;
}

// Asked once: a device's limits do not change, and asking takes longer than a small launch.
const Device& current_device() {
  static const std::vector<Device> devices = query_devices();
  static const Device unknown{1, 0, 0, 0};
  int current = -1;
  const bool found = cudaGetDevice(&current) == cudaSuccess && size_t(current) < devices.size();
  return found ? devices[size_t(current)] : unknown;
}

}  // namespace

bool saves_stats(const Task& task) { return task.classes > group_classes(accumulator_bytes(task.dtype)); }

bool shares_rows(const Task& task) {
  DeviceTask work{};
  work.task = task;
  return make_plan(work, current_device()).slices > 1;
}

int64_t scratch_bytes(const DeviceTask& task) { return make_plan(task, current_device()).scratch_bytes; }

const char* run(const DeviceTask& task, void* stream_pointer) {
  const Plan plan = make_plan(task, current_device());
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  switch (task.task.dtype) {
    case DType::float64:
      return run_format<double>(task, plan, stream);
    case DType::bfloat16:
      return run_format<BFloat16>(task, plan, stream);
    case DType::float16:
      return run_format<Half>(task, plan, stream);
    default:
      return run_format<float>(task, plan, stream);
  }
}

}  // namespace cuda
}  // namespace drsl
