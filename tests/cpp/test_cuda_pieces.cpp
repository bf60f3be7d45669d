// csrc/cuda's kernels on a loss in pieces, run on the CPU by the stand-in of cuda_shim/: gradients over the logits, which
// a thread out of turn would read too late, and statistics of some of the classes. The checks are those of
// pieces_checks.h, with the threads of a block in several orders.
#include "cuda/launch.h"
#include "cuda_shim/cuda_runtime.h"
#include "cuda_shim/shim.h"
#include "pieces_checks.h"

namespace {

using namespace drsl;

class CudaEngine : public Engine {
 public:
  CudaEngine(check::Random& random, int device) : random_(random) { cudaSetDevice(device); }

  const char* name() const override { return "cuda"; }
  void run(const Task& task) const override {
    cuda::DeviceTask work{};
    work.task = task;
    launch(work);
  }
  void row_stats(const Task& task, void* out) const override {
    cuda::DeviceTask work{};
    work.task = task;
    work.stats = out;
    work.stats_alone = true;
    launch(work);
  }

 private:
  void launch(cuda::DeviceTask& work) const {
    constexpr cuda_shim::Order kOrders[] = {cuda_shim::Order::forward, cuda_shim::Order::backward,
                                            cuda_shim::Order::shuffled};
    cuda_shim::set_order(random_.pick(kOrders), random_.bits());
    Buffer scratch(cuda::scratch_bytes(work), Place::heap, 256);
    scratch.fill(0xff);  // NaN
    work.scratch = scratch.as<void>();
    const char* const error = cuda::run(work, nullptr);
    CHECK(!error, "%s; %s", error, running);
  }

  check::Random& random_;
};

// With few classes lanes hold whole rows; longer rows are in shared memory, or beyond it.
void test_in_place(DType dtype) {
  check::Random random(61);
  for (const int64_t classes : {1, 2, 10, 130, 400, 2500, 9000}) {
    const int device = classes == 9000 ? 1 : 0;
    const CudaEngine engine(random, device);
    for (const Distance distance : kDistances) {
      Choice c = piece_choice(random, dtype);
      c.distance = distance;
      if (random.chance(0.3)) c.activation = Activation::sigsoftmax;
      check_in_place(engine, random, c, random.pick(kApart), classes > 400 ? 2 : 9, classes, true);
    }
  }
}

void test_parts(DType dtype) {
  check::Random random(62);
  const std::vector<int64_t> splits[] = {{5, 5}, {1, 2, 7}, {17, 400, 1}, {2500, 41}};
  for (const std::vector<int64_t>& sizes : splits) {
    const CudaEngine engine(random, int(random.below(2)));
    for (const Distance distance : kDistances) {
      Choice c = piece_choice(random, dtype);
      c.distance = distance;
      check_parts(engine, random, c, sizes[0] > 400 ? 2 : 7, sizes);
    }
  }
}

// Where blocks share a row, one may read what another has written: whoever wants the gradient over the logits asks.
void test_shared_rows() {
  check::Random random(63);
  const auto shared = [&](int64_t rows, int64_t classes) {
    Choice c;
    c.distance = Distance::uniform;
    Problem p(random, c, make_layout(random, Kind::contiguous, rows, classes), classes, Place::heap);
    return cuda::shares_rows(p.task);
  };
  cudaSetDevice(0);
  CHECK(shared(2, 40000));
  CHECK(!shared(200, 40000) && !shared(2, 9000) && !shared(2, 10));
  // Statistics and labels that are known before leave nothing to read too late.
  check_parts(CudaEngine(random, 0), random, piece_choice(random, DType::float32), 2, {40000, 33});
}

}  // namespace

int main() {
  name_problem_on_fault();
  for (const DType dtype : kDTypes) {
    test_in_place(dtype);
    test_parts(dtype);
  }
  test_shared_rows();
  return check::report();
}
