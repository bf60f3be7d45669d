// Which kernel in which shape: tables of thresholds, the limits that kernels are compiled with, and what these come to
// for one task on one device. No CUDA headers. plan.cu has the function; run.cuh relies on it.
#pragma once

#include "launch.h"

namespace drsl {
namespace cuda {

// A group kernel's shape: how many lanes hold a row, and how many classes each of them.
struct GroupShape {
  int lanes, elements;
  constexpr int classes() const { return lanes * elements; }
};
constexpr GroupShape kGroupShapes[] = {{4, 4}, {8, 16}, {32, 8}, {32, 32}};
constexpr int kGroupShapeCount = 4;

// Whether a lane has registers for a shape.
constexpr bool has_shape(GroupShape shape, size_t accumulator_bytes) {
  return accumulator_bytes == 4 || shape.elements <= 8;
}

// Rows of more classes go to the block kernel.
constexpr int64_t group_classes(size_t accumulator_bytes) {
  int64_t most = 0;
  for (const GroupShape shape : kGroupShapes) most = has_shape(shape, accumulator_bytes) ? shape.classes() : most;
  return most;
}

// Threads per block that a group kernel is compiled for: 65536 registers are for all of them, and a thread needs some
// for its logits, as many for what becomes of them where there are moments, as many for weights, and some for the loss.
constexpr int group_threads(size_t accumulator_bytes, int elements, bool moments, bool weights) {
  const int held = int(accumulator_bytes) * elements * (1 + moments + weights) + (accumulator_bytes == 8 ? 32 : 0);
  return held <= 32 ? 1024 : held < 128 ? 512 : 256;
}

// The same for the block kernel, and how many of its blocks a multiprocessor shall hold at once.
constexpr int kBlockThreads = 256;
constexpr int block_residents(size_t accumulator_bytes, bool moments) { return 3 - (accumulator_bytes == 8) - moments; }

// Whether the softmax is of transformed logits: such kernels are compiled with moments alone.
constexpr bool is_transformed(const Task& t) { return t.activation != Activation::softmax; }

// Whether kernels are to sum weights of classes, and moments. Smoothing has a term in the mean logit, as some distances.
constexpr bool has_weighted_mean(const Task& t) { return t.soft || (t.smoothing > 0 && t.class_weights); }
constexpr bool has_moments(const Task& t) {
  return is_transformed(t) || t.soft || t.smoothing > 0 || needs_moments(t.distance);
}

// Bytes of shared memory that a block uses besides what is asked for at the launch, rounded up.
constexpr int64_t kOwnShared = 4096;

// A task on a device.
struct Plan {
  int shape;  // of the group kernel, in kGroupShapes; -1: the block kernel
  int threads;  // per block
  int64_t blocks;
  int64_t shared_bytes;  // dynamic shared memory per block
  int64_t shared_limit;  // what it is at most, whatever the task
  int slices;  // parts that each row is split into
  int part_blocks;  // blocks of a kernel that finds the parts' statistics first; 0: none is needed
  int weight_blocks;  // blocks of a kernel that sums the label weights first; 0: none is needed
  int64_t loss_sums_at, parts_at, scratch_bytes;  // scratch: weight sums, loss sums, parts
};

// What a plan depends on.
struct Device {
  int multiprocessors, shared_per_block, shared_per_multiprocessor, cache_bytes;
};

constexpr size_t accumulator_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

Plan make_plan(const DeviceTask& task, const Device& device);

}  // namespace cuda
}  // namespace drsl
