// A Task on the CPU: its rows in chunks, which torch's threads share, and the memory that this takes. Relies on
// cpu/kernels.h and on at::parallel_for; compute.cpp relies on it.
#include "on_cpu.h"

#include "cpu/kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace drsl {
namespace {

constexpr int64_t kScratchKept = int64_t(4) << 20;  // bytes
constexpr int64_t kGrainElements = 32768;  // less work than this per thread costs more than it saves
constexpr size_t kLargePagesBytes = size_t(4) << 20;  // two large pages and more

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

// The rows of a task in chunks of a size of their own, which does not depend on the number of threads.
struct Chunks {
  int64_t size, count, grain;

  explicit Chunks(const Task& task) {
    size = kGrainElements / std::max<int64_t>(task.classes, 1);
    size = std::max<int64_t>(size / 16 * 16, size >= 16 ? 16 : std::max<int64_t>(size, 1));
    count = (task.rows + size - 1) / size;
    grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(size * task.classes, 1));
  }
};

// take(chunk, first row, end, scratch) for every chunk, in parallel.
template <class Take>
void for_chunks(const Kernels& kernels, const Task& task, const Chunks& chunks, Take take) {
  const int64_t bytes = kernels.scratch_bytes(task);
  at::parallel_for(0, chunks.count, chunks.grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch kept;
    Scratch own;
    void* scratch = (bytes <= kScratchKept ? kept : own).get(bytes);
    for (int64_t i = begin; i < end; ++i) {
      take(i, i * chunks.size, std::min((i + 1) * chunks.size, task.rows), scratch);
    }
  });
}

}  // namespace

double run_on_cpu(const Task& task) {
  const Kernels& cpu = kernels();
  const Chunks chunks(task);
  c10::SmallVector<double, 64> sums(chunks.count, 0.0);
  for_chunks(cpu, task, chunks, [&](int64_t i, int64_t begin, int64_t end, void* scratch) {
    sums[i] = cpu.run(task, begin, end, scratch);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void row_stats_on_cpu(const Task& task, void* out) {
  const Kernels& cpu = kernels();
  for_chunks(cpu, task, Chunks(task), [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    cpu.row_stats(task, begin, end, scratch, out);
  });
}

void ask_for_large_pages([[maybe_unused]] const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (t.nbytes() < kLargePagesBytes) return;
  const uintptr_t page = sysconf(_SC_PAGESIZE), start = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + t.nbytes()) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace drsl
