// Sums and maxima over the lanes of a group, a warp or a block, always in the same order; and what is summed over a
// whole batch: the denominator of the mean, and the reduced loss. Relies on call.cuh; the kernels rely on it.
#pragma once

#include "call.cuh"

namespace drsl {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

DRSL_DEVICE float max_(float x, float y) { return ::fmaxf(x, y); }
DRSL_DEVICE double max_(double x, double y) { return ::fmax(x, y); }
DRSL_DEVICE float min_(float x, float y) { return ::fminf(x, y); }
DRSL_DEVICE double min_(double x, double y) { return ::fmin(x, y); }

// Over L neighbouring lanes, a power of two; each of them gets the same bits. All lanes of the warp must take part.
template <int L, class S>
DRSL_DEVICE S group_max(S x) {
  DRSL_UNROLL
  for (int step = L / 2; step > 0; step /= 2) x = max_(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <int L, class S>
DRSL_DEVICE S group_sum(S x) {
  DRSL_UNROLL
  for (int step = L / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Over the block; every thread must take part, and gets the same bits.
DRSL_DEVICE double block_sum(double x) {
  __shared__ double warp_sums[kWarp];
  x = group_sum<kWarp>(x);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += warp_sums[warp];
  __syncthreads();  // before the next call writes
  return total;
}

// ---------------------------------------------------------------------------------------------------------
// The denominator of the mean

// This thread's share of the weights of the labels from `first` on, every `step`-th.
template <class D>
DRSL_DEVICE double label_weights(const Call<D>& call, int64_t first, int64_t step) {
  double sum = 0;
  for (int64_t row = first; row < call.rows; row += step) {
    const RowLabel y = call.label(row);
    if (y.counts) sum += double(call.share_of_mean(row, y));
  }
  return sum;
}

// 1 without `mean`. Every thread of every block gets the same bits; the first block hands it to the host's caller.
template <class D>
DRSL_DEVICE double batch_denominator(const Call<D>& call) {
  if (!call.mean) return 1;
  if (call.denominator_known) return *call.denominator;
  double sum = 0;
  if (call.weight_sums) {
    for (int i = threadIdx.x; i < call.weight_sum_count; i += blockDim.x) sum += call.weight_sums[i];
  } else {
    sum = label_weights(call, threadIdx.x, blockDim.x);
  }
  const double denominator = block_sum(sum);
  if (blockIdx.x == 0 && threadIdx.x == 0) *call.denominator = denominator;
  return denominator;
}

constexpr int kWeightThreads = 256, kWeightBlocks = 256;

// For batches of many labels: one partial sum per block.
template <class D>
__global__ void __launch_bounds__(kWeightThreads)
    weight_kernel(const __grid_constant__ Call<D> call, double* weight_sums) {
  if (call.nothing_to_do()) return;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const double sum = block_sum(label_weights(call, int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step));
  if (threadIdx.x == 0) weight_sums[blockIdx.x] = sum;
}

// ---------------------------------------------------------------------------------------------------------
// The reduced loss

// By a thread that has written the denominator, or in a later kernel.
template <class D>
DRSL_DEVICE void write_reduced_loss(const Call<D>& call, double sum) {
  *call.reduced_loss = Accumulator<D>(sum / (call.mean ? *call.denominator : 1));
}

// `sum`: this thread's losses. A block that is alone finishes the loss, others leave their sum to finish_kernel.
template <class D>
DRSL_DEVICE void reduce_loss(const Call<D>& call, double sum) {
  if (!call.reduced_loss) return;
  const double total = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) write_reduced_loss(call, total);
  else call.loss_sums[blockIdx.x] = total;
}

constexpr int kFinishThreads = 512;

template <class D>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ Call<D> call, int64_t count) {
  if (call.nothing_to_do()) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += call.loss_sums[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) write_reduced_loss(call, total);
}

}  // namespace cuda
}  // namespace drsl
