// csrc/cpu's kernels on a loss in pieces: gradients over the logits, and statistics of some of the classes, in every
// storage format, for every instruction set that this build holds and this processor has. The checks are those of
// pieces_checks.h.
#include "pieces_checks.h"

namespace {

using namespace drsl;

class CpuEngine : public Engine {
 public:
  explicit CpuEngine(const Kernels& kernels) : kernels_(kernels) {}

  const char* name() const override { return kernels_.name; }
  void run(const Task& task) const override {
    Buffer scratch = exact_scratch(task);
    kernels_.run(task, 0, task.rows, scratch.as<void>());
  }
  void row_stats(const Task& task, void* out) const override {
    Buffer scratch = exact_scratch(task);
    const int64_t cut = task.rows > 16 ? 16 : 0;  // ranges of rows, as threads take them
    kernels_.row_stats(task, 0, cut, scratch.as<void>(), out);
    kernels_.row_stats(task, cut, task.rows, scratch.as<void>(), out);
  }

 private:
  // AddressSanitizer knows the ends of what lies on the heap; elsewhere a page without access rights follows.
  Buffer exact_scratch(const Task& task) const {
    return Buffer(kernels_.scratch_bytes(task), check::kSanitized ? Place::heap : Place::before_guard, 64);
  }

  const Kernels& kernels_;
};

// Few classes go through tiles, more through blocks of rows, then one row at a time, in one chunk or several.
void test_in_place(const Engine& engine, DType dtype) {
  check::Random random(51);
  for (const int64_t classes : {1, 2, 10, 130, 400, 2500, 9000}) {
    // Longer rows of an exact format are copied only where they are overwritten; else sums run in another order.
    const bool same_bits = classes < 2500 || dtype == DType::bfloat16 || dtype == DType::float16;
    for (const Distance distance : kDistances) {
      Choice c;
      c.dtype = dtype;
      c.distance = distance;
      c.ignored = c.masked = 0.05;
      c.upstream_stride = int(random.below(3)) - 1;
      c.tau_rows = random.chance(0.5);
      if (random.chance(0.3)) c.activation = Activation::sigsoftmax;
      if (random.chance(0.3)) c.smoothing = 0.1, c.class_weights = true;
      const Kind kind = random.chance(0.5) ? Kind::contiguous : Kind::padded_rows;
      check_in_place(engine, random, c, kind, classes > 400 ? 2 : 19, classes, same_bits);
    }
  }
  for (const Kind kind : {Kind::class_gaps, Kind::images, Kind::transposed, Kind::scattered}) {
    for (const int64_t classes : {7, 350}) {
      check_in_place(engine, random, piece_choice(random, dtype), kind, 18, classes, true);
    }
  }
}

void test_parts(const Engine& engine, DType dtype) {
  check::Random random(52);
  const std::vector<int64_t> splits[] = {{5, 5}, {1, 2, 7}, {17, 400, 1}, {2500, 41}, {9000, 3, 2100}};
  for (const std::vector<int64_t>& sizes : splits) {
    for (const Distance distance : kDistances) {
      Choice c = piece_choice(random, dtype);
      c.distance = distance;
      check_parts(engine, random, c, sizes[0] > 400 ? 3 : 18, sizes);
    }
  }
}

}  // namespace

int main() {
  name_problem_on_fault();
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const Kernels* const found = kernels_for(name);
    if (!found) {
      std::printf("skipped: no kernels for %s in this build or on this processor\n", name);
      continue;
    }
    const CpuEngine engine(*found);
    for (const DType dtype : kDTypes) {
      test_in_place(engine, dtype);
      test_parts(engine, dtype);
    }
  }
  return check::report();
}
