// What the tests of all kernels share: random choices, the comparison of a problem's outputs with kernel_truth.h, and
// matrices with far strides. For test_kernels.cpp and test_cuda_kernels.cpp.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "check.h"
#include "kernel_problem.h"
#include "kernel_truth.h"

constexpr drsl::Truth kTruths[] = {drsl::Truth::ce, drsl::Truth::gce, drsl::Truth::mae, drsl::Truth::log_odds};
constexpr drsl::Distance kDistances[] = {
    drsl::Distance::none,        drsl::Distance::uniform, drsl::Distance::non_target, drsl::Distance::non_target_logits,
    drsl::Distance::conditional, drsl::Distance::kl,      drsl::Distance::kl_softmax};
constexpr drsl::Distance kSoftDistances[] = {drsl::Distance::none, drsl::Distance::uniform, drsl::Distance::kl_softmax};
constexpr Place kPlaces[] = {Place::heap, Place::before_guard, Place::after_guard};

inline char running[600];  // the problem at hand, for messages

inline void describe(const char* kernels, const Problem& p, Kind kind, Place place) {
  const Choice& c = p.choice;
  std::snprintf(
      running, sizeof(running),
      "%s %s: %d rows, %d classes, layout %d, place %d, truth %d, distance %d, smoothing %g, scale %g, margin %g, "
      "threshold %g, activation %d, class weights %d, class margins %d, probabilities %d, tau per row %d, gradient %d, "
      "upstream stride %d, outputs %d",
      kernels, name_of(c.dtype), int(p.task.rows), int(p.task.classes), int(kind), int(place), int(c.truth),
      int(c.distance), c.smoothing, c.scale, c.margin, c.threshold, int(c.activation), c.class_weights, c.class_margins,
      c.soft, c.tau_rows, c.grad, c.upstream_stride, int(c.outputs));
}

// Where a guard page is touched, say by which problem. AddressSanitizer has a handler of its own.
inline void name_problem_on_fault() {
#if !defined(__SANITIZE_ADDRESS__)
  std::signal(SIGSEGV, [](int) {
    const char text[] = "memory outside of a buffer was touched by\n";
    if (write(2, text, sizeof(text) - 1) < 0 || write(2, running, std::strlen(running)) < 0) std::abort();
    std::signal(SIGSEGV, SIG_DFL);
  });
#endif
}

inline bool is_untouched(const void* data, int64_t bytes) {
  const unsigned char* const p = static_cast<const unsigned char*>(data);
  return std::all_of(p, p + bytes, [](int byte) { return byte == kUntouched; });
}

// Outputs of rows outside [begin, end), and memory between the gradients of rows, are as they were before.
inline void check_untouched(const Problem& p, int64_t begin, int64_t end) {
  const drsl::Task& t = p.task;
  const auto untouched = [](const void* data, int64_t size, int64_t i) {
    return is_untouched(static_cast<const char*>(data) + i * size, size);
  };
  for (const void* out : {t.loss, t.cross_entropy, t.distance_out, t.margin_out, t.tau_grad}) {
    if (!out) continue;
    for (int64_t row = 0; row < t.rows; ++row) {
      CHECK(untouched(out, size_of(p.acc), row) == (row < begin || row >= end), "row %d of %s", int(row), running);
    }
  }
  if (!t.grad) return;
  std::vector<char> written(size_t(p.layout.grad.extent), 0);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = p.layout.offset(p.layout.grad, row);
    for (int64_t k = 0; k < t.classes; ++k) written[size_t(first + k * p.layout.grad.class_stride)] = 1;
  }
  for (size_t i = 0; i < written.size(); ++i) {
    CHECK(written[i] || untouched(t.grad, size_of(t.dtype), int64_t(i)), "gradient element %d of %s", int(i), running);
  }
}

inline void check_value(const Problem& p, const void* out, int64_t row, const ExpectedRow& want,
                        const Expected& expected, const char* what) {
  if (!out) return;
  const double got = get(p.acc, out, row), value = want.counts && want.any_nan ? NAN : expected.value;
  CHECK(check::close(got, value, expected.slack), "%s of row %d: %.12g, not %.12g +- %.2g; %s", what, int(row), got,
        value, expected.slack, running);
}

inline void check_values(const Problem& p, int64_t row, const ExpectedRow& want) {
  check_value(p, p.task.loss, row, want, want.loss, "loss");
  check_value(p, p.task.cross_entropy, row, want, want.cross_entropy, "cross entropy");
  check_value(p, p.task.distance_out, row, want, want.distance, "distance");
  check_value(p, p.task.margin_out, row, want, want.margin, "margin");
  check_value(p, p.task.tau_grad, row, want, want.tau_grad, "gradient to tau");
}

inline void check_gradient(const Problem& p, int64_t row, const ExpectedRow& want) {
  if (!p.task.grad) return;
  const int64_t first = p.layout.offset(p.layout.grad, row);
  for (int64_t k = 0; k < p.task.classes; ++k) {
    const double got = get(p.choice.dtype, p.task.grad, first + k * p.layout.grad.class_stride);
    const auto [value, slack] = want.grad[size_t(k)];
    if (want.counts && want.any_nan) {
      const bool masked = p.logit(row, k) == -kInf && k != p.task.labels[row];
      CHECK(std::isnan(got) || (masked && got == 0), "row %d with NaN, class %d: %g; %s", int(row), int(k), got,
            running);
    } else if (p.choice.dtype == DType::float16 && std::fabs(value) + slack >= 65504) {
      CHECK(got * value > 0, "gradient too large for float16: %g; %s", got, running);
    } else {
      CHECK(check::close(got, value, slack), "gradient of row %d, class %d (label %d): %.12g, not %.12g +- %.2g; %s",
            int(row), int(k), int(p.task.labels[row]), got, value, slack, running);
    }
  }
}

inline Choice random_choice(check::Random& random, DType dtype) {
  constexpr double kSpreads[] = {0.5, 3, 20}, kOffsets[] = {0, 0, 0, 100, -1e4};
  constexpr double kShares[] = {0, 0, 0.1, 0.5};
  Choice c;
  c.dtype = dtype;
  c.truth = random.pick(kTruths);
  c.distance = random.pick(kDistances);
  c.smoothing = c.truth == drsl::Truth::ce && random.chance(0.4) ? random.uniform(0.01, 1) : 0;
  c.q = random.uniform(0.05, 1);
  if (random.chance(0.3)) c.scale = random.uniform(0.5, 2);
  if (random.chance(0.3)) c.margin = random.uniform(-1, 1);
  c.class_margins = random.chance(0.15);
  if (c.truth == drsl::Truth::gce && random.chance(0.4)) c.threshold = random.uniform(0.01, 0.9);
  c.class_weights = random.chance(0.4);
  if (random.chance(0.15)) {
    c.soft = true;
    c.truth = drsl::Truth::ce;
    c.distance = random.pick(kSoftDistances);
    c.scale = 1;
    c.smoothing = c.margin = 0;
    c.class_margins = false;
  }
  c.tau_rows = random.chance(0.4);
  c.grad = random.chance(0.8);
  c.upstream_stride = int(random.below(3)) - 1;
  c.outputs = random.chance(0.6) ? 31 : random.bits() % 32;
  c.ignored = random.pick(kShares);
  c.masked = random.pick(kShares);
  c.nan = random.pick(kShares) / 2;
  c.spread = random.pick(kSpreads);
  c.offset = random.pick(kOffsets);
  if (random.chance(0.2) && c.offset > -1e4) c.activation = drsl::Activation::sigsoftmax;
  c.ignore_index = random.chance(0.5) ? -100 : random.below(3);
  return c;
}

// A matrix with more than 2^31 elements between rows or between classes; only the pages in use become memory.
class FarMatrix {
 public:
  FarMatrix(int64_t elements) : bytes_(size_t(elements) * sizeof(float)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~FarMatrix() {
    if (*this) munmap(data_, bytes_);
  }
  FarMatrix(const FarMatrix&) = delete;
  FarMatrix& operator=(const FarMatrix&) = delete;
  explicit operator bool() const { return data_ != MAP_FAILED; }
  float* data() { return static_cast<float*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};
