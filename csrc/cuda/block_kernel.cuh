// Rows with many classes: one block per row, or several where there are few rows. Each thread sums up the packs that it
// reads, the threads merge their sums in a fixed order, and a second sweep writes the gradient: from shared memory as
// far as that reaches, from the cache beyond. Relies on row.cuh; run.cuh launches it.
#pragma once

#include "plan.h"
#include "row.cuh"

namespace drsl {
namespace cuda {

// Some neighbouring classes of a row: single classes up to the first address that is a multiple of a pack, whole packs,
// and the single classes left over. Where the classes are not adjacent they are all single.
template <class D>
struct Segment {
  static constexpr int W = kPackWidth<D>;
  const D* logits;
  int64_t logits_stride, grad_stride;
  D* grad;
  int first;  // number of its first class in the row
  int head, packs;  // single classes before the packs; packs
  int singles;  // before and after
  int label;  // counted from `first`; -1: not in this segment
  bool store_packs;  // the gradient's packs are aligned as well

  DRSL_DEVICE Segment(const Call<D>& call, int64_t row, int slice, int label_number) {
    const int64_t begin = int64_t(slice) * call.slice_classes;
    const int classes = int(call.classes - begin < call.slice_classes ? call.classes - begin : call.slice_classes);
    const RowOffsets at = row_offsets(call.strides, row);
    first = int(begin);
    logits_stride = call.strides.logits_class;
    grad_stride = call.strides.grad_class;
    logits = call.logits + at.logits + begin * logits_stride;
    grad = call.grad ? call.grad + at.grad + begin * grad_stride : nullptr;
    label = label_number >= first && label_number < first + classes ? label_number - first : -1;
    head = logits_stride == 1 ? to_alignment(logits) : classes;
    packs = (classes - head) / W;
    singles = classes - packs * W;
    store_packs = grad && grad_stride == 1 && to_alignment(grad) == to_alignment(logits);
  }

  DRSL_DEVICE int64_t single(int64_t i) const { return i < head ? i : i + int64_t(packs) * W; }
  DRSL_DEVICE int in_pack(int pack) const { return head + pack * W; }

 private:
  DRSL_DEVICE static int to_alignment(const D* p) {
    return int((0 - reinterpret_cast<uintptr_t>(p)) % kPackBytes / sizeof(D));
  }
};

constexpr int kChunk = 4;  // packs, or single classes, that a thread has in flight together

// Packs whose elements, with their weights, a thread holds widened at once: 64 bytes, or at least half of a chunk.
template <class D, class Terms>
constexpr int kTaken =
    kChunk * kPackWidth<D> * sizeof(Accumulator<D>) * (Terms::kWeightedMean ? 2 : 1) > 64 ? kChunk / 2 : kChunk;

// ---------------------------------------------------------------------------------------------------------
// First sweep: statistics

// This thread's part of a segment. The first `cached` packs stay in `cache`, where the same thread finds them again.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_DEVICE Part<S> sum_segment(const Segment<D>& segment, const S* class_weights, bool soft, uint4* cache,
                                int cached) {
  constexpr int W = kPackWidth<D>;
  const S lowest = -infinity<S>();
  Part<S> part = empty_part<S>();
  for (int base = threadIdx.x; base < segment.packs; base += kChunk * blockDim.x) {
    Pack<D, W> packs[kChunk];
    DRSL_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const int pack = base + j * int(blockDim.x);
      if (pack < segment.packs) packs[j] = Pack<D, W>::load(segment.logits + segment.in_pack(pack));
    }
    DRSL_UNROLL
    for (int j = 0; j < kChunk; j += kTaken<D, Terms>) {
      S z[kTaken<D, Terms> * W], u[kTaken<D, Terms> * W];
      DRSL_UNROLL
      for (int t = 0; t < kTaken<D, Terms>; ++t) {
        const int pack = base + (j + t) * int(blockDim.x), k = segment.in_pack(pack);
        const bool exists = pack < segment.packs;
        if (exists && pack < cached) cache[pack] = packs[j + t].raw;
        packs[j + t].widened(z + t * W);
        const bool has_label = unsigned(segment.label - k) < unsigned(W);
        if (!exists || has_label) {
          DRSL_UNROLL
          for (int i = 0; i < W; ++i) z[t * W + i] = !exists || k + i == segment.label ? lowest : z[t * W + i];
        }
        if constexpr (Terms::kWeightedMean) {
          DRSL_UNROLL
          for (int i = 0; i < W; ++i) {
            u[t * W + i] = exists && k + i != segment.label ? class_weights[segment.first + k + i] : S(0);
          }
        }
      }
      transform<Terms>(z);
      take<Terms>(part, z, u, soft);
    }
  }
  for (int64_t base = threadIdx.x; base < segment.singles; base += kChunk * blockDim.x) {
    S z[kChunk], u[kChunk];
    DRSL_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const int64_t i = base + j * int(blockDim.x), k = segment.single(i);
      const bool in_rest = i < segment.singles && k != segment.label;
      z[j] = in_rest ? load_one(segment.logits + k * segment.logits_stride) : lowest;
      if constexpr (Terms::kWeightedMean) u[j] = in_rest ? class_weights[segment.first + k] : S(0);
    }
    transform<Terms>(z);
    take<Terms>(part, z, u, soft);
  }
  return part;
}

// The parts of all threads, merged; thread 0 gets the result. All threads must take part, and have passed another
// barrier before the next call.
template <class Terms, class S>
DRSL_DEVICE Part<S> merge_block(Part<S> part) {
  __shared__ Part<S> warps[kBlockThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  part = merge_warp<Terms>(part);
  if (lane == 0) warps[warp] = part;
  __syncthreads();
  if (warp == 0) part = merge_warp<Terms>(lane < int(blockDim.x / kWarp) ? warps[lane] : empty_part<S>());
  return part;
}

// ---------------------------------------------------------------------------------------------------------
// Statistics in memory: between the kernels of a split row, and from a forward to its backward pass

template <class S>
DRSL_DEVICE void write_part(S* p, const Part<S>& part) {
  const RowStats<S>& s = part.stats;
  const S numbers[kSavedStats] = {s.max,      s.sum_exp, s.sum_exp2,  s.depth,
                                  s.variance, s.count,   part.weight, part.weighted_depth};
  DRSL_UNROLL
  for (int i = 0; i < kSavedStats; ++i) p[i] = numbers[i];
}

template <class S>
DRSL_DEVICE Part<S> read_part(const S* p) {
  return {{p[0], p[1], p[2], p[3], p[4], p[5]}, p[6], p[7]};
}

// The merge of `count` parts; thread 0 gets the result, and only its warp works.
template <class Terms, class S>
DRSL_DEVICE Part<S> merge_saved(const S* parts, int count) {
  Part<S> part = empty_part<S>();
  if (threadIdx.x >= kWarp) return part;
  for (int i = threadIdx.x; i < count; i += kWarp) {
    const Part<S> other = read_part(parts + i * kSavedStats);
    part = i == int(threadIdx.x) ? other : merge_parts<Terms>(part, other);
  }
  return count == 1 ? part : merge_warp<Terms>(part);
}

// ---------------------------------------------------------------------------------------------------------
// Second sweep: gradient

// An ignored row's logits and class weights may be anything; they are not looked at.
template <class D>
DRSL_DEVICE void clear_segment(const Segment<D>& segment) {
  const int64_t classes = segment.single(segment.singles);
  for (int64_t k = threadIdx.x; k < classes; k += blockDim.x) {
    store_one(segment.grad + k * segment.grad_stride, Accumulator<D>(0));
  }
}

// The packs of a row are visited from its end, which was read last and is still in the cache.
template <class Terms, class D, class S = Accumulator<D>>
DRSL_DEVICE void write_segment(const Segment<D>& segment, const S* class_weights, bool soft, const RowGrad<S>& row,
                               const uint4* cache, int cached) {
  constexpr int W = kPackWidth<D>;
  const auto gradient_at = [&](S logit, int64_t k) {
    S u = 0;
    if constexpr (Terms::kWeightedMean) u = class_weights[segment.first + k];
    const S z = transformed<Terms>(logit);
    return gradient<Terms>(row, z, row_exp(z - row.shift), u, soft) * slope_at<Terms>(z);
  };
  const int step = kChunk * int(blockDim.x);
  const int chunks = (segment.packs + step - 1) / step;
  for (int base = (chunks - 1) * step + int(threadIdx.x); base >= 0; base -= step) {
    Pack<D, W> packs[kChunk];
    DRSL_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const int pack = base + j * int(blockDim.x);
      if (pack >= segment.packs) continue;
      if (pack < cached) packs[j].raw = cache[pack];
      else packs[j] = Pack<D, W>::load(segment.logits + segment.in_pack(pack));
    }
    DRSL_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const int pack = base + j * int(blockDim.x), k = segment.in_pack(pack);
      if (pack >= segment.packs) continue;
      S z[W], g[W];
      packs[j].widened(z);
      DRSL_UNROLL
      for (int i = 0; i < W; ++i) g[i] = gradient_at(z[i], k + i);
      if (unsigned(segment.label - k) < unsigned(W)) {
        DRSL_UNROLL
        for (int i = 0; i < W; ++i) g[i] = k + i == segment.label ? row.label : g[i];
      }
      if (segment.store_packs) {
        Pack<D, W>::narrowed(g).store_streaming(segment.grad + k);
      } else {
        DRSL_UNROLL
        for (int i = 0; i < W; ++i) store_one(segment.grad + (k + i) * segment.grad_stride, g[i]);
      }
    }
  }
  for (int64_t i = threadIdx.x; i < segment.singles; i += blockDim.x) {
    const int64_t k = segment.single(i);
    const S z = load_one(segment.logits + k * segment.logits_stride);
    store_one(segment.grad + k * segment.grad_stride, k == segment.label ? row.label : gradient_at(z, k));
  }
}

// ---------------------------------------------------------------------------------------------------------
// The kernels

// Statistics of one slice of one row per block.
template <class D, class Terms>
__global__ void __launch_bounds__(kBlockThreads, block_residents(sizeof(Accumulator<D>), Terms::kMoments))
    part_kernel(const __grid_constant__ Call<D> call) {
  using S = Accumulator<D>;
  if (call.nothing_to_do()) return;
  const int64_t row = blockIdx.x / call.slices;
  const RowLabel y = call.label(row);
  if (!y.counts) return;
  const Segment<D> segment(call, row, int(blockIdx.x % call.slices), y.number);
  const Part<S> part =
      merge_block<Terms>(sum_segment<Terms>(segment, call.weights_of_row(row), call.params.soft, nullptr, 0));
  if (threadIdx.x == 0) write_part(call.parts + blockIdx.x * kSavedStats, part);
}

// One slice of one row at a time. With kSweeps the slice is the whole row, and the block finds the statistics itself;
// else it merges those at call.parts.
template <class D, class Terms, bool kSweeps>
__global__ void __launch_bounds__(kBlockThreads, block_residents(sizeof(Accumulator<D>), Terms::kMoments))
    block_kernel(const __grid_constant__ Call<D> call) {
  using S = Accumulator<D>;
  __shared__ RowGrad<S> shared_row;
  __shared__ double loss_sum;  // thread 0 alone uses it, once a row
  if (call.nothing_to_do()) return;
  const S scale = S(1 / batch_denominator(call));
  uint4* const cache = dynamic_shared();
  if (threadIdx.x == 0) loss_sum = 0;
  for (int64_t item = blockIdx.x; item < call.rows * call.slices; item += gridDim.x) {
    const int64_t row = kSweeps ? item : item / call.slices;
    const int slice = kSweeps ? 0 : int(item - row * call.slices);
    const RowLabel y = call.label(row);
    const Segment<D> segment(call, row, slice, y.number);

    Part<S> rest = empty_part<S>();
    if constexpr (kSweeps) {
      if (y.counts) {
        rest = merge_block<Terms>(
            sum_segment<Terms>(segment, call.weights_of_row(row), call.params.soft, cache, call.cached_packs));
      }
    } else {
      if (y.counts) rest = merge_saved<Terms>(call.parts + row * call.parts_per_row * kSavedStats, call.parts_per_row);
    }
    if (threadIdx.x == 0) {
      const RowOffsets at = row_offsets(call.strides, row);
      const S own_logit =
          y.number >= 0 ? transformed<Terms>(load_one(call.logits + at.logits + y.number * call.strides.logits_class))
                        : S(NAN);
      const S label_logit = call.label_logits ? call.label_logits[row] : own_logit;
      shared_row = finish_row<Terms>(call, row, y, label_logit, rest, scale, slice == 0, loss_sum);
      if (call.stats && slice == 0) write_part(call.stats + row * kSavedStats, rest);
    }
    __syncthreads();
    const RowGrad<S> coefficients = shared_row;
    if (call.grad && y.counts) {
      write_segment<Terms>(segment, call.weights_of_row(row), call.params.soft, coefficients, cache, call.cached_packs);
    } else if (call.grad) {
      clear_segment(segment);
    }
    __syncthreads();  // before the next row's coefficients
  }
  reduce_loss(call, threadIdx.x == 0 ? loss_sum : 0);
}

}  // namespace cuda
}  // namespace drsl
