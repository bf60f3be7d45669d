// csrc/cpu's kernels, for every instruction set that this build holds and this processor has: all losses, storage
// formats, layouts and optional arguments against row_loss.h in double (kernel_truth.h), on buffers of exact size.
#include "kernel_checks.h"

namespace {

using namespace drsl;

// ---------------------------------------------------------------------------------------------------------
// One problem

double run(const Kernels& kernels, const Problem& p, int64_t begin, int64_t end) {
  Buffer scratch(kernels.scratch_bytes(p.task), Place::heap, 64);
  scratch.fill(0xff);  // NaN
  const double sum = kernels.run(p.task, begin, end, scratch.as<void>());
  volatile long double one = 1;
  CHECK(one + one == 2, "MMX instructions left the x87 registers taken; %s", running);
  return sum;
}

// The gradient in a run of its own, from what one of the loss saved, or one of loss and gradient.
void check_later_gradient(const Kernels& kernels, Problem& p, const std::vector<ExpectedRow>& want) {
  const Task before = p.task;
  for (void* const grad : {static_cast<void*>(nullptr), before.grad}) {
    Buffer saved(saved_fields(before) * before.rows * size_of(p.acc), grad ? Place::before_guard : Place::after_guard,
                 size_of(p.acc));
    saved.fill(kUntouched);
    p.task.saved = saved.as<void>();
    p.task.grad = grad;
    p.task.upstream = nullptr;
    run(kernels, p, 0, before.rows);

    p.clear_outputs();
    p.task = before;
    p.task.saved = saved.as<void>();
    p.task.from_saved = true;
    const int64_t cut = before.rows > 16 ? 16 : 0;
    run(kernels, p, 0, cut);
    run(kernels, p, cut, before.rows);
    p.task = before;
    for (int64_t row = 0; row < before.rows; ++row) check_gradient(p, row, want[size_t(row)]);
    for (const void* out :
         {before.loss, before.cross_entropy, before.distance_out, before.margin_out, before.tau_grad}) {
      CHECK(!out || is_untouched(out, before.rows * size_of(p.acc)), "more than the gradient; %s", running);
    }
  }
}

// The whole task at once, then again in pieces: the same bits.
void check_problem(const Kernels& kernels, check::Random& random, const Choice& choice, Kind kind, int64_t rows,
                   int64_t classes) {
  const Place place = random.pick(kPlaces);
  Problem p(random, choice, make_layout(random, kind, rows, classes), classes, place);
  describe(kernels.name, p, kind, place);

  p.clear_outputs();
  const double sum = run(kernels, p, 0, rows);
  check_untouched(p, 0, rows);
  double want_sum = 0, sum_slack = 0;
  std::vector<ExpectedRow> expected;
  for (int64_t row = 0; row < rows; ++row) {
    const ExpectedRow& want = expected.emplace_back(expected_row(p, row));
    check_values(p, row, want);
    check_gradient(p, row, want);
    want_sum += want.counts && want.any_nan ? NAN : want.loss.value;
    sum_slack += want.loss.slack;
  }
  CHECK(check::close(sum, want_sum, sum_slack), "sum %.12g, not %.12g +- %.2g; %s", sum, want_sum, sum_slack, running);

  if (rows > 16) {
    const std::vector<char> whole = p.output_bytes();
    p.clear_outputs();
    const int64_t cut = 16 * (1 + random.below((rows - 1) / 16));
    double pieces = run(kernels, p, 0, cut);
    check_untouched(p, 0, cut);
    pieces += run(kernels, p, cut, rows);
    CHECK(p.output_bytes() == whole, "cut at row %d: other bits; %s", int(cut), running);
    CHECK(check::close(pieces, sum, 1e-12 * double(rows) * std::fabs(sum) + 1e-12), "sum of the pieces; %s", running);
  }
  if (p.task.dtype == DType::float16 && p.task.grad && p.task.activation == Activation::softmax)
    check_later_gradient(kernels, p, expected);
  CHECK(p.inputs_unchanged(), "an input was written; %s", running);
}

// ---------------------------------------------------------------------------------------------------------
// Sets of problems

void test_all_losses(const Kernels& kernels, DType dtype) {
  check::Random random(21);
  for (const Truth truth : kTruths) {
    for (const Distance distance : kDistances) {
      for (const double smoothing : {0.0, 0.1}) {
        if (smoothing > 0 && truth != Truth::ce) continue;
        for (const bool weights : {false, true}) {
          for (const int64_t classes : {2, 10, 130}) {
            Choice c;
            c.dtype = dtype;
            c.truth = truth;
            c.distance = distance;
            c.smoothing = smoothing;
            c.class_weights = weights;
            check_problem(kernels, random, c, Kind::contiguous, 18, classes);
          }
        }
      }
    }
  }
  for (const Distance distance : kSoftDistances) {
    for (const int64_t classes : {1, 2, 10, 130}) {
      Choice c;
      c.dtype = dtype;
      c.distance = distance;
      c.soft = true;
      c.masked = 0.05;
      check_problem(kernels, random, c, Kind::contiguous, 18, classes);
    }
  }
  for (const Truth truth : kTruths) {
    for (const Distance distance : kDistances) {
      for (const int64_t classes : {2, 10, 331}) {
        Choice c;
        c.dtype = dtype;
        c.truth = truth;
        c.distance = distance;
        c.activation = Activation::sigsoftmax;
        c.threshold = truth == Truth::gce ? 0.3 : 0;
        c.class_margins = true;
        c.masked = 0.05;
        check_problem(kernels, random, c, Kind::contiguous, 18, classes);
      }
    }
  }
}

void test_shapes(const Kernels& kernels, DType dtype) {
  check::Random random(22);
  for (const int64_t classes : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 129}) {
    for (const int64_t rows : {1, 15, 16, 17, 33}) {
      for (const Kind kind : kKinds) check_problem(kernels, random, random_choice(random, dtype), kind, rows, classes);
    }
  }
  for (const int64_t classes : {161, 321, 1003}) {
    for (const int64_t rows : {1, 17}) {
      for (const Kind kind : kKinds) check_problem(kernels, random, random_choice(random, dtype), kind, rows, classes);
    }
  }
  for (const int64_t classes : {2048, 2049, 5003, 8192, 8195, 17003}) {  // copied or not, one chunk or several
    check_problem(kernels, random, random_choice(random, dtype), Kind::padded_rows, 3, classes);
    check_problem(kernels, random, random_choice(random, dtype), Kind::contiguous, 2, classes);
  }
  check_problem(kernels, random, random_choice(random, dtype), Kind::images, 3 * 32 * 2, 5);
}

void test_at_random(const Kernels& kernels, DType dtype) {
  check::Random random(23);
  for (int i = 0; i < 300; ++i) {
    const int64_t classes = 1 + (random.chance(0.7) ? random.below(40) : random.below(300));
    check_problem(kernels, random, random_choice(random, dtype), random.pick(kKinds), 1 + random.below(50), classes);
  }
}

// Logits whose differences overflow: a penalty of strength 0 stays away, and cross-entropy has its limits.
void test_huge_logits(const Kernels& kernels, DType dtype, int64_t classes) {
  check::Random random(25);
  const double huge = dtype == DType::float64 ? 1.5e308 : dtype == DType::float16 ? 65504 : 3e38;
  for (const Distance distance : kDistances) {
    Choice c;
    c.dtype = dtype;
    c.distance = distance;
    Problem p(random, c, make_layout(random, Kind::contiguous, 2, classes), classes, Place::before_guard);
    describe(kernels.name, p, Kind::contiguous, Place::before_guard);
    void* const logits = const_cast<void*>(p.task.logits);
    int64_t* const labels = const_cast<int64_t*>(p.task.labels);
    for (int64_t i = 0; i < 2 * classes; ++i) put(dtype, logits, i, -huge);
    put(dtype, logits, 1, huge);
    put(dtype, logits, classes + 1, huge);
    labels[0] = 1;  // the label far above the rest, and one of the rest far above the label
    labels[1] = classes - 1;
    p.task.tau = 0;
    p.task.grad_scale = 1;
    run(kernels, p, 0, 2);
    const bool overflows = dtype != DType::float16;
    CHECK(get(p.acc, p.task.loss, 0) == 0, "%s", running);
    CHECK(get(p.acc, p.task.loss, 1) == (overflows ? kInf : 2 * huge), "%s", running);
    for (int64_t k = 0; k < classes; ++k) {
      const double first = get(dtype, p.task.grad, k), second = get(dtype, p.task.grad, classes + k);
      CHECK(first == 0, "class %d: %g; %s", int(k), first, running);
      CHECK(second == (k == 1) - (k == labels[1]), "class %d: %g; %s", int(k), second, running);
    }
  }
}

void test_far_apart(const Kernels& kernels, int64_t classes, bool far_classes) {
  constexpr int64_t kRows = 3, kFar = (int64_t(1) << 31) + 5;
  check::Random random(24);
  Choice c;
  c.distance = Distance::non_target_logits;
  Problem p(random, c, make_layout(random, Kind::contiguous, kRows, classes), classes, Place::heap);
  const double sum = run(kernels, p, 0, kRows);

  const int64_t row_stride = far_classes ? 1 : kFar, class_stride = far_classes ? kFar : 1;
  const int64_t extent = 1 + (kRows - 1) * row_stride + (classes - 1) * class_stride;
  FarMatrix logits(extent), grad(extent);
  if (!logits || !grad) {
    std::printf("skipped: no %g GB of address space for far strides\n", 8e-9 * double(extent));
    return;
  }
  Task far = p.task;
  far.layout.logits_strides = far.layout.grad_strides = &row_stride;
  far.layout.logits_class_stride = far.layout.grad_class_stride = class_stride;
  far.logits = logits.data();
  far.grad = grad.data();
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < classes; ++k) logits.data()[row * row_stride + k * class_stride] = float(p.logit(row, k));
  }
  Buffer scratch(kernels.scratch_bytes(far), Place::heap, 64);
  CHECK(kernels.run(far, 0, kRows, scratch.as<void>()) == sum, "%s, far strides: other sum", kernels.name);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < classes; ++k) {
      CHECK(grad.data()[row * row_stride + k * class_stride] == static_cast<float*>(p.task.grad)[row * classes + k],
            "%s, far strides: gradient of row %d, class %d", kernels.name, int(row), int(k));
    }
  }
}

void test_scan_labels(const Kernels& kernels) {
  const auto scan = [&](const std::vector<int64_t>& labels, int64_t classes, int64_t ignore_index) {
    Buffer exact(int64_t(labels.size()) * 8, Place::before_guard, 8);
    std::copy(labels.begin(), labels.end(), exact.as<int64_t>());
    return kernels.scan_labels(exact.as<int64_t>(), int64_t(labels.size()), classes, ignore_index);
  };
  const auto is = [&](LabelScan got, int64_t counted, bool out_of_range) {
    CHECK(got.counted == counted && got.out_of_range == out_of_range, "%s: %d labels counted, out of range %d",
          kernels.name, int(got.counted), got.out_of_range);
  };
  is(scan({}, 3, -100), 0, false);
  is(scan({0, 1, 2}, 3, -100), 3, false);
  is(scan({0, 3, 2}, 3, -100), 3, true);
  is(scan({0, -1, 2}, 3, -100), 3, true);
  is(scan({-100, 1, -100}, 3, -100), 1, false);
  is(scan({-100, -100}, 3, -100), 0, false);
  is(scan({0, 1, 2, 1}, 3, 1), 2, false);   // ignore_index is a class
  is(scan({0, 3, 7}, 3, 3), 2, true);       // ignore_index is the number of classes
  is(scan({0, 3}, 3, 3), 1, false);
  is(scan({INT64_MAX}, INT64_MAX, -100), 1, true);
  is(scan({INT64_MIN, 0}, 3, -100), 2, true);
  is(scan({INT64_MIN, 0}, 3, INT64_MIN), 1, false);
  is(scan({int64_t(1) << 32}, 3, -100), 1, true);  // 0 in its lower half
  for (int n = 1; n < 40; ++n) {
    for (int at = 0; at < n; ++at) {
      std::vector<int64_t> labels(size_t(n), 2);
      labels[size_t(at)] = at % 2 ? -7 : 9;
      is(scan(labels, 9, -100), n, true);
      is(scan(labels, 9, labels[size_t(at)]), n - 1, false);
    }
  }
}

}  // namespace

int main() {
  name_problem_on_fault();
  CHECK(!kernels_for("sse9") && !kernels_for(""), "an unknown instruction set has no kernels");
  CHECK(kernels_for("baseline"));
  setenv("DRSL_KERNELS_CPU_CAPABILITY", "baseline", 1);
  CHECK(!std::strcmp(kernels().name, "baseline"));

  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const Kernels* const found = kernels_for(name);
    if (!found) {
      std::printf("skipped: no kernels for %s in this build or on this processor\n", name);
      continue;
    }
    CHECK(!std::strcmp(found->name, name));
    test_scan_labels(*found);
    test_far_apart(*found, 3, false);
    test_far_apart(*found, 3, true);
    test_far_apart(*found, 200, false);
    for (const DType dtype : kDTypes) {
      test_all_losses(*found, dtype);
      test_shapes(*found, dtype);
      test_at_random(*found, dtype);
      test_huge_logits(*found, dtype, 4);
      test_huge_logits(*found, dtype, 133);
    }
  }
  return check::report();
}
