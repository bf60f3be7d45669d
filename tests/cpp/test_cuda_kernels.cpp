// csrc/cuda's kernels, run on the CPU by the stand-in of cuda_shim/: all losses, storage formats, layouts, optional
// arguments and kinds of run against row_loss.h in double (kernel_truth.h), on buffers of exact size, on devices small
// and large, with the threads of a block in several orders.
#include "cuda_problem.h"

namespace {

using namespace drsl;

// ---------------------------------------------------------------------------------------------------------
// Sets of problems

void test_all_losses(DType dtype) {
  check::Random random(31);
  for (const Truth truth : kTruths) {
    for (const Distance distance : kDistances) {
      for (const double smoothing : {0.0, 0.1}) {
        if (smoothing > 0 && truth != Truth::ce) continue;
        for (const bool weights : {false, true}) {
          for (const int64_t classes : {2, 10, 100, 1100}) {
            if (check::kSanitized && classes % 100 != 0) continue;
            Choice c;
            c.dtype = dtype;
            c.truth = truth;
            c.distance = distance;
            c.smoothing = smoothing;
            c.class_weights = weights;
            check_problem(random, c, Kind::contiguous, classes > 1000 ? 2 : 9, classes, {});
          }
        }
      }
    }
  }
  for (const Distance distance : kSoftDistances) {
    for (const int64_t classes : {1, 2, 10, 100, 1100}) {
      Choice c;
      c.dtype = dtype;
      c.distance = distance;
      c.soft = true;
      c.masked = 0.05;
      check_problem(random, c, Kind::contiguous, classes > 1000 ? 3 : 9, classes, {});
    }
  }
  for (const Truth truth : kTruths) {
    for (const Distance distance : kDistances) {
      for (const int64_t classes : {2, 10, 1100}) {
        if (check::kSanitized && classes == 2) continue;
        Choice c;
        c.dtype = dtype;
        c.truth = truth;
        c.distance = distance;
        c.activation = Activation::sigsoftmax;
        c.threshold = truth == Truth::gce ? 0.3 : 0;
        c.class_margins = true;
        c.masked = 0.05;
        check_problem(random, c, Kind::contiguous, classes > 1000 ? 2 : 9, classes, {});
      }
    }
  }
}

// Around every threshold of the tables: lanes times elements, packs, chunks.
void test_few_classes(DType dtype) {
  check::Random random(32);
  for (const int64_t classes :
       {1,   2,   3,   4,   5,   7,   8,   9,   10,  12,  15,  16,  17,  24,   32,   33,   63,   64,  65,
        100, 120, 127, 128, 129, 136, 200, 255, 256, 257, 264, 511, 512, 1000, 1003, 1016, 1023, 1024}) {
    for (const int64_t rows : {1, 7, 40}) {
      if (check::kSanitized && rows != 7) continue;
      check_problem(random, random_choice(random, dtype), Kind::contiguous, rows, classes, random_setting(random));
      check_problem(random, random_choice(random, dtype), random.pick(kKinds), rows, classes, random_setting(random));
    }
  }
}

void test_many_classes(DType dtype) {
  check::Random random(33);
  for (const int64_t classes : {1025, 1027, 1032, 1280, 2047, 2048, 2050, 3072, 4096, 4099, 8191, 8200}) {
    for (const int64_t rows : {1, 4}) {
      check_problem(random, random_choice(random, dtype), Kind::contiguous, rows, classes, random_setting(random));
      check_problem(random, random_choice(random, dtype), random.pick(kKinds), rows, classes, random_setting(random));
    }
  }
  for (const int64_t classes : {16384, 16391, 40001}) {  // 40001: in shared memory in part
    for (int device = 0; device < kDeviceCount; ++device) {
      check_problem(random, random_choice(random, dtype), Kind::padded_rows, 1 + device % 2, classes, {device});
    }
  }
}

// Rows of about 48 KiB in shared memory, where what a block declares decides whether it must ask for more, and longer
// ones. On a device that keeps them whole, and as many that no row is split.
void test_shared_limit(DType dtype) {
  check::Random random(42);
  const int64_t width = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  for (const int64_t bytes : {44 << 10, 46 << 10, 48 << 10, 49 << 10, 60 << 10}) {
    for (const Distance distance : {Distance::none, Distance::uniform}) {
      Choice c;
      c.dtype = dtype;
      c.distance = distance;
      check_problem(random, c, Kind::contiguous, 33, bytes / width, {3});
    }
  }
}

// Rows split over many blocks, and one block over many rows. float32 only: the formats differ in nothing of it.
void test_large() {
  check::Random random(34);
  Choice c;
  c.distance = Distance::kl;
  c.upstream_stride = 0;
  for (const int device : {0, 2, 3}) {
    if (check::kSanitized && device != 2) continue;
    check_problem(random, c, Kind::contiguous, 1, (1 << 18) + 1, {device});
  }
  c.distance = Distance::uniform;
  c.ignored = 0.1;
  c.class_weights = true;
  check_problem(random, c, Kind::contiguous, 3, (1 << 17) + 3, {0});
  for (const Mean mean : {Mean::none, Mean::found, Mean::known}) {
    if (check::kSanitized && mean != Mean::found) continue;
    check_problem(random, c, Kind::contiguous, 3000, 10, {2, mean});  // more rows than groups
    check_problem(random, c, Kind::contiguous, 5000, 3, {0, mean});   // label weights by a kernel of their own
  }
  check_problem(random, c, Kind::images, 4200, 21, {0});
  c.dtype = DType::float64;
  if (!check::kSanitized) check_problem(random, c, Kind::contiguous, 8200, 257, {0});  // more rows than blocks
}

void test_at_random(DType dtype) {
  check::Random random(35);
  for (int i = 0; i < (check::kSanitized ? 60 : 250); ++i) {
    const int64_t classes = 1 + (random.chance(0.7) ? random.below(40) : random.below(300));
    check_problem(random, random_choice(random, dtype), random.pick(kKinds), 1 + random.below(40), classes,
                  random_setting(random));
  }
}

// tau from the device, one value for all rows.
void test_shared_tau() {
  check::Random random(36);
  for (const int64_t classes : {10, 1100}) {
    Choice c;
    c.distance = Distance::uniform;
    c.tau_rows = true;
    Problem p(random, c, make_layout(random, Kind::contiguous, 5, classes), classes, Place::before_guard);
    describe("shared tau", p, Kind::contiguous, Place::before_guard);
    cudaSetDevice(0);
    DeviceProblem d(p, Mean::found);
    p.task.tau_stride = 0;
    d.run();
    p.task.tau = get(p.acc, p.task.tau_rows, 0);
    p.task.tau_rows = nullptr;
    check_rows(d, true);
  }
}

// Masked classes in blocks: threads, chunks and whole slices with nothing to sum.
void test_masked_ranges(DType dtype) {
  check::Random random(37);
  for (const int64_t classes : {9, 200, 1000, 1500, 6000, 20000}) {
    for (const Distance distance : kDistances) {
      for (const bool weights : {false, true}) {
        Choice c;
        c.dtype = dtype;
        c.distance = distance;
        c.soft = weights && random.chance(0.5);
        c.smoothing = weights && !c.soft ? 0.1 : 0;
        c.class_weights = weights;
        constexpr int64_t kRows = 6;
        Problem p(random, c, make_layout(random, Kind::contiguous, kRows, classes), classes, Place::before_guard);
        const Setting setting{int(random.below(kDeviceCount)), Mean::found};
        describe("masked ranges", p, Kind::contiguous, Place::before_guard);
        int64_t* const labels = const_cast<int64_t*>(p.task.labels);
        const auto mask = [&](int64_t row, int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) put(dtype, const_cast<void*>(p.task.logits), row * classes + k, -kInf);
        };
        mask(0, 0, classes / 2), labels[0] = classes - 1;
        mask(1, classes / 2, classes), labels[1] = 0;
        mask(2, 0, classes - 1), labels[2] = 0;             // the label masked, one class left
        mask(3, 0, classes - 2), labels[3] = classes - 1;   // label and one class left
        mask(4, 1, classes), labels[4] = 0;                 // nothing left but the label
        mask(5, 0, classes), labels[5] = classes / 2;       // nothing left at all
        cudaSetDevice(setting.device);
        DeviceProblem d(p, setting.mean);
        d.run();
        check_rows(d, true);
        check_gradient_from_stats(d, cuda::saves_stats(p.task));
      }
    }
  }
}

// Logits whose differences overflow: a penalty of strength 0 stays away, and cross-entropy has its limits.
void test_huge_logits(DType dtype) {
  check::Random random(38);
  const double huge = dtype == DType::float64 ? 1.5e308 : dtype == DType::float16 ? 65504 : 3e38;
  for (const int64_t classes : {4, 133, 1000, 1500, 17000}) {
    for (const Distance distance : kDistances) {
      Choice c;
      c.dtype = dtype;
      c.distance = distance;
      Problem p(random, c, make_layout(random, Kind::contiguous, 2, classes), classes, Place::before_guard);
      describe("huge logits", p, Kind::contiguous, Place::before_guard);
      void* const logits = const_cast<void*>(p.task.logits);
      int64_t* const labels = const_cast<int64_t*>(p.task.labels);
      for (int64_t i = 0; i < 2 * classes; ++i) put(dtype, logits, i, -huge);
      put(dtype, logits, 1, huge);
      put(dtype, logits, classes + 1, huge);
      labels[0] = 1;  // the label far above the rest, and one of the rest far above the label
      labels[1] = classes - 1;
      p.task.tau = 0;
      cudaSetDevice(int(random.below(kDeviceCount)));
      DeviceProblem d(p, Mean::none);
      d.run();
      CHECK(get(p.acc, p.task.loss, 0) == 0, "%s", running);
      CHECK(get(p.acc, p.task.loss, 1) == (dtype != DType::float16 ? kInf : 2 * huge), "%s", running);
      for (int64_t k = 0; k < classes; ++k) {
        const double first = get(dtype, p.task.grad, k), second = get(dtype, p.task.grad, classes + k);
        CHECK(first == 0, "class %d: %g; %s", int(k), first, running);
        CHECK(second == (k == 1) - (k == labels[1]), "class %d: %g; %s", int(k), second, running);
      }
    }
  }
}

// Offsets beyond 2^31 elements.
void test_far_apart(int64_t classes, int64_t row_stride, int64_t class_stride) {
  constexpr int64_t kRows = 3;
  check::Random random(39);
  Choice c;
  c.distance = Distance::non_target_logits;
  Problem p(random, c, make_layout(random, Kind::contiguous, kRows, classes), classes, Place::heap);
  describe("far apart", p, Kind::contiguous, Place::heap);
  const int64_t extent = 1 + (kRows - 1) * row_stride + (classes - 1) * class_stride;
  FarMatrix logits(extent), grad(extent);
  if (!logits || !grad) {
    std::printf("skipped: no %g GB of address space for far strides\n", 8e-9 * double(extent));
    return;
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < classes; ++k) logits.data()[row * row_stride + k * class_stride] = float(p.logit(row, k));
  }
  cudaSetDevice(0);
  DeviceProblem d(p, Mean::found);
  float* const near = static_cast<float*>(p.task.grad);
  p.task.layout.logits_strides = p.task.layout.grad_strides = &row_stride;
  p.task.layout.logits_class_stride = p.task.layout.grad_class_stride = class_stride;
  const void* const near_logits = p.task.logits;
  p.task.logits = logits.data();
  p.task.grad = grad.data();
  d.run();
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < classes; ++k) near[row * classes + k] = grad.data()[row * row_stride + k * class_stride];
  }
  p.task.grad = near;
  p.task.logits = near_logits;
  check_rows(d, true);
}

void test_no_rows() {
  check::Random random(40);
  for (const Mean mean : {Mean::none, Mean::found}) {
    for (const int64_t classes : {10, 5000}) {
      Problem p(random, {}, make_layout(random, Kind::contiguous, 0, classes), classes, Place::before_guard);
      describe("no rows", p, Kind::contiguous, Place::before_guard);
      DeviceProblem d(p, mean);
      d.run();
      const double loss = get(p.acc, d.device.reduced_loss, 0);
      CHECK(mean == Mean::none ? loss == 0 : std::isnan(loss), "%g; %s", loss, running);
      if (mean == Mean::found) CHECK(*d.device.denominator == 0, "%s", running);
    }
  }
}

void test_launches() {
  const auto launches = [](int64_t rows, int64_t classes, Mean mean) {
    check::Random random(41);
    Choice c;
    c.distance = Distance::uniform;
    Problem p(random, c, make_layout(random, Kind::contiguous, rows, classes), classes, Place::heap);
    describe("launches", p, Kind::contiguous, Place::heap);
    cudaSetDevice(0);
    DeviceProblem d(p, mean);
    const int64_t before = cuda_shim::launches();
    d.run();
    return int(cuda_shim::launches() - before);
  };
  CHECK(launches(128, 10, Mean::found) == 1);
  CHECK(launches(128, 100, Mean::found) == 1);
  CHECK(launches(256, 1000, Mean::found) == 2);
  CHECK(launches(1, 1000, Mean::found) == 1);
  CHECK(launches(5000, 10, Mean::found) == 3);
  CHECK(launches(5000, 10, Mean::known) == 2);
  CHECK(launches(200, 2000, Mean::found) == 2);
  CHECK(launches(2, 40000, Mean::found) == 3);  // statistics of the slices, gradient, sum of the losses
}

}  // namespace

// Storage formats by name, without a name all of them; what does not depend on the format goes with float32.
int main(int argc, char** argv) {
  name_problem_on_fault();
  const auto chosen = [&](DType dtype) {
    const auto is_named = [&](const char* name) { return !std::strcmp(name, name_of(dtype)); };
    return argc == 1 || std::any_of(argv + 1, argv + argc, is_named);
  };
  for (const DType dtype : kDTypes) {
    if (!chosen(dtype)) continue;
    test_shared_limit(dtype);
    test_all_losses(dtype);
    test_few_classes(dtype);
    test_many_classes(dtype);
    test_at_random(dtype);
    test_masked_ranges(dtype);
    test_huge_logits(dtype);
  }
  if (!chosen(DType::float32)) return check::report();
  test_launches();
  test_no_rows();
  test_shared_tau();
  const int64_t far = (int64_t(1) << 31) + 5;
  test_far_apart(3, far, 1);
  test_far_apart(3, 1, far);
  test_far_apart(1100, far, 1);
  test_far_apart(1100, 1, int64_t(1) << 22);
  test_large();
  return check::report();
}
