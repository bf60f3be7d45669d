// The choice of kernel and launch shape. Relies on plan.h; launch.cu calls it.
#include "plan.h"

#include <algorithm>

namespace drsl {
namespace cuda {
namespace {

// Up to this many logits, one block does everything in one launch.
constexpr int64_t kOneBlockElements = 16384;

// A multiprocessor holds this many threads; a grid of groups covers the device once, each group taking row after row.
constexpr int64_t kResidentThreads = 2048;

// The denominator of few labels is found by each block itself, as long as all blocks together read no more than this.
constexpr int64_t kOwnLabels = 4096, kOwnLabelReads = int64_t(1) << 21;
constexpr int64_t kLabelsPerWeightBlock = 2048, kMaxWeightBlocks = 256;

constexpr int64_t kMaxBlocks = 8192;      // of the block kernel: each leaves a sum of losses
constexpr int64_t kSliceClasses = 8192;   // at least, of a row that is split

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

void plan_groups(const Task& t, const Device& device, Plan& plan) {
  const auto fits = [&](GroupShape shape) {
    return shape.classes() >= t.classes && has_shape(shape, accumulator_bytes(t.dtype));
  };
  while (t.rows > 0 && !fits(kGroupShapes[plan.shape])) ++plan.shape;
  const GroupShape shape = kGroupShapes[plan.shape];
  const int64_t most = group_threads(accumulator_bytes(t.dtype), shape.elements, has_moments(t), has_weighted_mean(t));
  const int64_t wanted = std::max<int64_t>(t.rows, 1) * shape.lanes;
  if (t.rows * t.classes <= kOneBlockElements) {
    plan.threads = int(clamp(ceil_div(wanted, 32) * 32, 32, most));
    plan.blocks = 1;
    return;
  }
  plan.threads = 256;
  while (plan.threads > 64 && ceil_div(wanted, plan.threads) < device.multiprocessors) plan.threads /= 2;
  plan.blocks = std::min(ceil_div(wanted, plan.threads), device.multiprocessors * (kResidentThreads / plan.threads));
}

// Shared memory for the logits of a row: what a block gets when the multiprocessor holds as many blocks as it shall, or
// when it holds two, where the rest of the rows at work would not stay in the cache. With fewer it would have too few
// loads in flight.
int64_t shared_for_row(int64_t row_bytes, int residents, const Device& device) {
  for (int64_t blocks = residents;; --blocks) {
    const int64_t share = std::min(device.shared_per_multiprocessor / blocks, int64_t(device.shared_per_block));
    const int64_t cached = clamp(share - kOwnShared, 0, row_bytes);
    const int64_t rest = blocks * device.multiprocessors * (row_bytes - cached);
    if (blocks <= 2 || rest <= device.cache_bytes / 2) return cached / 16 * 16;
  }
}

void plan_blocks(const DeviceTask& task, const Device& device, Plan& plan) {
  const Task& t = task.task;
  const int64_t row_bytes = t.classes * element_bytes(t.dtype);
  plan.shape = -1;
  plan.threads = 128;  // so that no thread is left without a chunk of four packs
  while (plan.threads < kBlockThreads && plan.threads * 64 < row_bytes) plan.threads *= 2;
  const bool few_rows = t.rows * 2 <= device.multiprocessors;
  if (few_rows && !task.stats_alone)
    plan.slices = int(clamp(2 * device.multiprocessors / t.rows, 1, t.classes / kSliceClasses));
  plan.slices = std::max(plan.slices, 1);
  const bool stats_known = task.stats_known || t.stats;
  if (task.stats_alone || (plan.slices > 1 && !stats_known)) plan.part_blocks = int(t.rows) * plan.slices;
  const bool sweeps_twice = t.grad && !stats_known && plan.slices == 1 && t.layout.logits_class_stride == 1;
  if (sweeps_twice)
    plan.shared_bytes = shared_for_row(row_bytes, block_residents(accumulator_bytes(t.dtype), has_moments(t)), device);
  plan.blocks = std::min(t.rows * (t.grad ? plan.slices : 1), kMaxBlocks);
}

}  // namespace

Plan make_plan(const DeviceTask& task, const Device& device) {
  const Task& t = task.task;
  Plan plan{};
  plan.slices = 1;
  plan.shared_limit = std::max<int64_t>(device.shared_per_block - kOwnShared, 0);
  const bool groups = t.classes <= group_classes(accumulator_bytes(t.dtype)) && !t.stats && !task.stats_alone;
  if (groups || t.rows == 0) plan_groups(t, device, plan);
  else plan_blocks(task, device, plan);

  if (task.mean && !task.denominator_known && (t.rows > kOwnLabels || t.rows * plan.blocks > kOwnLabelReads)) {
    plan.weight_blocks = int(clamp(ceil_div(t.rows, kLabelsPerWeightBlock), 1, kMaxWeightBlocks));
  }
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  plan.loss_sums_at = aligned(plan.weight_blocks * 8);
  plan.parts_at = plan.loss_sums_at + (plan.blocks > 1 ? aligned(plan.blocks * 8) : 0);
  const int64_t parts = task.stats_alone ? 0 : plan.part_blocks;
  plan.scratch_bytes = plan.parts_at + parts * kSavedStats * int64_t(accumulator_bytes(t.dtype));
  return plan;
}

}  // namespace cuda
}  // namespace drsl
