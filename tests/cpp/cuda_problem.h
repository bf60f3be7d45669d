// A problem as the CUDA launcher takes it, run in every way that it can be: fused, without gradient, from saved
// statistics, skipped, with the threads of a block in several orders. For test_cuda_kernels.cpp.
#pragma once

#include "cuda/launch.h"
#include "cuda_shim/cuda_runtime.h"
#include "cuda_shim/shim.h"
#include "kernel_checks.h"

constexpr int kDeviceCount = sizeof(cuda_shim::kDevices) / sizeof(cuda_shim::kDevices[0]);

enum class Mean { none, found, known };

// A problem as a DeviceTask, with what a device needs besides.
struct DeviceProblem {
  Problem& problem;
  drsl::cuda::DeviceTask device{};
  Buffer reduced_loss, denominator, stats;

  DeviceProblem(Problem& p, Mean mean)
      : problem(p),
        reduced_loss(size_of(p.acc), Place::before_guard, size_of(p.acc)),
        denominator(8, Place::before_guard, 8),
        stats(p.task.rows * drsl::cuda::kSavedStats * size_of(p.acc), Place::before_guard, size_of(p.acc)) {
    for (Buffer* buffer : {&reduced_loss, &denominator, &stats}) buffer->fill(kUntouched);
    problem.task.tau_stride = 1;
    device.reduced_loss = reduced_loss.as<void>();
    device.mean = mean != Mean::none;
    device.denominator_known = mean == Mean::known;
    device.denominator = denominator.as<double>();
    const double found = weight_of_labels();
    if (device.denominator_known) *device.denominator = 1.25 * found + 1;
    problem.task.grad_scale = mean == Mean::none ? 1 : 1 / (mean == Mean::found ? found : *device.denominator);
  }

  bool is_wrong(int64_t row) const {
    const int64_t y = problem.task.labels[row];
    return y != problem.task.ignore_index && (y < 0 || y >= problem.task.classes);
  }

  double weight_of_labels() const {
    const drsl::Task& t = problem.task;
    double sum = 0;
    for (int64_t row = 0; row < t.rows; ++row) {
      if (t.labels[row] == t.ignore_index) continue;
      sum += t.soft || is_wrong(row) ? 1 : problem.class_weight(row, t.labels[row]);
    }
    return sum;
  }

  void run() {
    device.task = problem.task;
    device.task.grad_scale = NAN;  // to be ignored
    Buffer scratch(drsl::cuda::scratch_bytes(device), Place::heap, 256);
    scratch.fill(0xff);  // NaN
    device.scratch = scratch.as<void>();
    const char* const error = drsl::cuda::run(device, nullptr);
    CHECK(!error, "%s; %s", error, running);
  }

  std::vector<char> all_outputs() {
    std::vector<char> all = problem.output_bytes();
    for (Buffer* buffer : {&reduced_loss, &denominator, &stats}) {
      all.insert(all.end(), buffer->as<char>(), buffer->as<char>() + buffer->bytes());
    }
    return all;
  }
};

inline void check_rows(const DeviceProblem& d, bool values) {
  const Problem& p = d.problem;
  const drsl::Task& t = p.task;
  const bool no_weight = d.device.mean && std::isinf(t.grad_scale);  // gradients are 0 / 0 then
  double sum = 0, slack = 0;
  for (int64_t row = 0; row < t.rows; ++row) {
    if (d.is_wrong(row)) {
      ExpectedRow wrong{};
      wrong.counts = wrong.any_nan = true;
      if (values) check_values(p, row, wrong);
      for (int64_t k = 0; t.grad && k < t.classes; ++k) {
        const int64_t at = p.layout.offset(p.layout.grad, row) + k * p.layout.grad.class_stride;
        CHECK(std::isnan(get(t.dtype, t.grad, at)), "row %d has a wrong label; %s", int(row), running);
      }
      sum = NAN;
      continue;
    }
    const ExpectedRow want = expected_row(p, row);
    if (values) check_values(p, row, want);
    if (!no_weight || !want.counts) check_gradient(p, row, want);
    sum += want.counts && want.any_nan ? NAN : want.loss.value;
    slack += want.loss.slack;
  }
  if (!values) return;
  const double mean = d.device.mean ? *d.device.denominator : 1, got = get(p.acc, d.device.reduced_loss, 0);
  const double want = sum / mean, rounding = p.acc == DType::float32 ? 0x1p-23 : 0x1p-52;
  CHECK(check::close(got, want, slack / mean + rounding * std::fabs(want)), "reduced loss %.12g, not %.12g; %s", got,
        want, running);
  if (d.device.mean && !d.device.denominator_known) {
    const double found = d.weight_of_labels();
    CHECK(check::close(mean, found, 1e-12 * found), "denominator %.17g, not %.17g; %s", mean, found, running);
  }
}

// The backward pass of a loss whose statistics are known, where they are worth keeping: other bits than a fused run may
// give, and held to the same truth.
inline void check_gradient_from_stats(DeviceProblem& d, bool keeps) {
  if (!keeps || !d.problem.task.grad) return;
  drsl::Task& t = d.problem.task;
  void* const grad = t.grad;
  d.problem.clear_outputs();
  t.grad = nullptr;
  d.device.stats = d.stats.as<void>();
  d.run();
  check_rows(d, true);

  t.grad = grad;
  d.problem.clear_outputs();
  const bool was_known = d.device.denominator_known;
  void* const reduced_loss = d.device.reduced_loss;
  d.device.denominator_known = d.device.stats_known = true;
  d.device.reduced_loss = nullptr;
  d.run();
  check_rows(d, false);
  d.device.denominator_known = was_known;
  d.device.stats_known = false;
  d.device.reduced_loss = reduced_loss;
  d.device.stats = nullptr;
}

// skip_unit_upstream: nothing is written where the upstream gradient is 1, everything where it is not.
inline void check_skipping(DeviceProblem& d) {
  drsl::Task& t = d.problem.task;
  if (!t.upstream || t.upstream_stride || !t.grad) return;
  const std::vector<char> before = d.all_outputs();
  void* const upstream = const_cast<void*>(t.upstream);
  const double was = get(d.problem.acc, upstream, 0);
  d.device.skip_unit_upstream = true;
  put(d.problem.acc, upstream, 0, 1);
  d.problem.clear_outputs();
  const std::vector<char> cleared = d.all_outputs();
  d.run();
  CHECK(d.all_outputs() == cleared, "a run that was to be skipped has written; %s", running);
  put(d.problem.acc, upstream, 0, was);
  d.run();
  CHECK(d.all_outputs() == before, "a run that was not to be skipped gave other bits; %s", running);
  d.device.skip_unit_upstream = false;
}

struct Setting {
  int device = 0;
  Mean mean = Mean::found;
  double wrong = 0;  // share of rows with a label out of range
};

inline void check_problem(check::Random& random, const Choice& choice, Kind kind, int64_t rows, int64_t classes,
                          const Setting& setting) {
  const Place place = random.pick(kPlaces);
  Problem p(random, choice, make_layout(random, kind, rows, classes), classes, place);
  char name[40];
  std::snprintf(name, sizeof(name), "device %d mean %d", setting.device, int(setting.mean));
  describe(name, p, kind, place);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t wrong[] = {classes, -1, INT64_MIN, INT64_MAX, classes + (int64_t(1) << 32)};
    if (random.chance(setting.wrong)) const_cast<int64_t*>(p.task.labels)[row] = random.pick(wrong);
  }
  DeviceProblem d(p, setting.mean);
  cudaSetDevice(setting.device);
  cuda_shim::set_order(cuda_shim::Order::forward);
  p.clear_outputs();
  d.run();
  check_untouched(p, 0, rows);
  check_rows(d, true);

  const std::vector<char> forward = d.all_outputs();
  p.clear_outputs();
  cuda_shim::set_order(random.chance(0.5) ? cuda_shim::Order::backward : cuda_shim::Order::shuffled, random.bits());
  d.run();
  CHECK(d.all_outputs() == forward, "another order of threads: other bits; %s", running);
  if (setting.wrong == 0) CHECK(p.inputs_unchanged(), "an input was written; %s", running);

  check_skipping(d);
  check_gradient_from_stats(d, drsl::cuda::saves_stats(p.task));
}

inline Setting random_setting(check::Random& random) {
  constexpr Mean kMeans[] = {Mean::none, Mean::found, Mean::found, Mean::known};
  return {int(random.below(kDeviceCount)), random.pick(kMeans), random.chance(0.2) ? 0.2 : 0};
}
