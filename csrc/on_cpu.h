// A Task on the CPU, by as many threads as torch has for it. on_cpu.cpp tells how; compute.cpp relies on it.
#pragma once

#include <ATen/ATen.h>

#include "task.h"

namespace drsl {

// Sum of the rows' losses. It does not depend on the number of threads: the chunks' sums are added in order.
double run_on_cpu(const Task& task);

// Statistics of the rows: (rows, kRowStats) of the accumulator's type.
void row_stats_on_cpu(const Task& task, void* out);

// For a tensor that is still to be written. The system hands out fresh memory page by page, on the first write to each:
// 4 KB at a time that takes longer than the loss. Where large pages are to be had on request, this is the request; a
// refusal changes nothing.
void ask_for_large_pages(const at::Tensor& t);

}  // namespace drsl
