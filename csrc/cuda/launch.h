// What the rest of the project sees of the CUDA kernels: one call that puts a Task's work on a stream. No torch, and
// no CUDA headers either. compute.cpp relies on it.
#pragma once

#include "../task.h"

namespace drsl {
namespace cuda {

// A Task whose pointers are device pointers, and what only a device needs. Nothing here is ever read by the host:
// the work is put on the stream, in order, and may be captured in a CUDA graph. Results are the same bits every time.
struct DeviceTask {
  Task task;  // grad_scale is ignored: `denominator` stands in for it

  // The sum over rows of the loss, divided by the denominator where `mean` is set. acc (1,), may be null.
  void* reduced_loss;

  // With `mean`, every row's gradient is divided by the sum of the class weights (else the number) of the rows that
  // count; a batch without any such row gives loss NaN and gradient 0. `denominator` is (1,): computed from the labels
  // and written by the run, or only read by it where `denominator_known`.
  bool mean, denominator_known;
  double* denominator;

  // For a backward pass over a gradient that may be right already: return at once where upstream[0] == 1.
  bool skip_unit_upstream;

  // acc (rows, kSavedStats), may be null. Written by a run without task.grad; where `stats_known`, read in place of
  // the first pass over the logits. Left alone where saves_stats() is false.
  void* stats;
  bool stats_known;
  bool stats_alone;  // write `stats`, and nothing else

  void* scratch;  // scratch_bytes(...) bytes, aligned to 256
};

constexpr int64_t kSavedStats = kRowStats;

// Whether several blocks write the gradient of one row, each after having read the label's logit.
bool shares_rows(const Task& task);

// Whether a run with saved statistics is cheaper than one without, for this many classes.
bool saves_stats(const Task& task);

int64_t scratch_bytes(const DeviceTask& task);

// Put the work on `stream` (a cudaStream_t) of the current device. Returns null, or what CUDA says went wrong.
// A label that is neither ignore_index nor in [0, classes) is never used as an index: the row's loss and gradient are
// NaN, and it counts with weight 1.
const char* run(const DeviceTask& task, void* stream);

}  // namespace cuda
}  // namespace drsl
