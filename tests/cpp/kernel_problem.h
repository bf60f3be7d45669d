// A task for the CPU kernels with every buffer it needs, each of exactly the size that kernels.h promises, filled at
// random. For kernel_truth.h, which says what must come out, and test_kernels.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "cpu/kernels.h"
#include "formats.h"

using drsl::DType;

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
constexpr double kInf = INFINITY;
constexpr int kUntouched = 0x5a;  // what outputs hold before a run

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[int(dtype)];
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline DType accumulator_of(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

inline double get(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::float64:
      return static_cast<const double*>(p)[i];
    case DType::float32:
      return static_cast<const float*>(p)[i];
    case DType::bfloat16:
      return kBFloat16.widen(static_cast<const uint16_t*>(p)[i]);
    case DType::float16:
      return kHalf.widen(static_cast<const uint16_t*>(p)[i]);
  }
  return 0;
}

inline void put(DType dtype, void* p, int64_t i, double x) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(p)[i] = x;
      return;
    case DType::float32:
      static_cast<float*>(p)[i] = static_cast<float>(x);
      return;
    case DType::bfloat16:
      static_cast<uint16_t*>(p)[i] = kBFloat16.narrow(x);
      return;
    case DType::float16:
      static_cast<uint16_t*>(p)[i] = kHalf.narrow(x);
      return;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Where rows and classes lie

enum class Kind {
  contiguous,
  padded_rows,
  class_gaps,
  gradient_class_gaps,
  images,
  transposed,
  repeated_row,
  scattered
};
constexpr Kind kKinds[] = {Kind::contiguous, Kind::padded_rows, Kind::class_gaps,   Kind::gradient_class_gaps,
                           Kind::images,     Kind::transposed,  Kind::repeated_row, Kind::scattered};

// A matrix of rows and classes in memory. `strides` has one entry per dimension of the rows.
struct Placement {
  std::vector<int64_t> strides;
  int64_t class_stride, extent;  // extent: elements from the first to the last
};

struct Layout {
  std::vector<int64_t> sizes;
  Placement logits, grad;

  int64_t rows() const {
    int64_t product = 1;
    for (const int64_t n : sizes) product *= n;
    return product;
  }
  int64_t offset(const Placement& placement, int64_t row) const {
    int64_t at = 0;
    for (size_t d = sizes.size(); d-- > 0; row /= sizes[d]) at += row % sizes[d] * placement.strides[d];
    return at;
  }
};

inline Placement placement(const std::vector<int64_t>& sizes, int64_t classes, std::vector<int64_t> strides,
                           int64_t class_stride) {
  int64_t extent = 1 + (classes - 1) * class_stride;
  for (size_t d = 0; d < sizes.size(); ++d) extent += (sizes[d] - 1) * strides[d];
  return {strides, class_stride, extent};
}

// Dimensions of the rows and that of the classes nested in random order, some with gaps.
inline Placement random_placement(check::Random& random, const std::vector<int64_t>& sizes, int64_t classes) {
  const size_t dims = sizes.size();
  std::vector<size_t> order(dims + 1);
  for (size_t i = 0; i <= dims; ++i) order[i] = i;
  for (size_t i = dims; i > 0; --i) std::swap(order[i], order[size_t(random.below(int64_t(i) + 1))]);
  std::vector<int64_t> strides(dims + 1);
  int64_t stride = random.chance(0.7) ? 1 : 1 + random.below(3);
  for (const size_t d : order) {
    strides[d] = stride;
    stride = stride * (d < dims ? sizes[d] : classes) + (random.chance(0.3) ? random.below(4) : 0);
  }
  const int64_t class_stride = strides[dims];
  strides.pop_back();
  return placement(sizes, classes, strides, class_stride);
}

inline Layout make_layout(check::Random& random, Kind kind, int64_t rows, int64_t classes) {
  std::vector<int64_t> sizes = {rows};
  if (kind == Kind::images || kind == Kind::scattered) {
    // The largest divisor up to 3 (images: few, each with many positions), and for scattered another one up to 4.
    const auto split = [&](int64_t up_to) {
      int64_t divisor = 1;
      for (int64_t n = 2; n <= up_to; ++n) divisor = sizes.back() % n ? divisor : n;
      sizes.back() /= divisor;
      sizes.insert(sizes.end() - 1, divisor);
    };
    split(3);
    if (kind == Kind::scattered) split(4);
  }
  const Placement plain = placement({rows}, classes, {classes}, 1);
  switch (kind) {
    case Kind::contiguous:
      return {sizes, plain, plain};
    case Kind::padded_rows:
      return {sizes, placement(sizes, classes, {classes + 3}, 1), placement(sizes, classes, {classes + 1}, 1)};
    case Kind::class_gaps:
      return {sizes, placement(sizes, classes, {2 * classes + 1}, 2), plain};
    case Kind::gradient_class_gaps:
      return {sizes, plain, placement(sizes, classes, {3 * classes}, 3)};
    case Kind::transposed:
      return {sizes, placement(sizes, classes, {1}, rows), placement(sizes, classes, {1}, rows)};
    case Kind::repeated_row:
      return {sizes, placement(sizes, classes, {0}, 1), plain};
    case Kind::images: {
      const int64_t positions = sizes.back();
      const Placement nchw = placement(sizes, classes, {classes * positions, 1}, positions);
      return {sizes, nchw, nchw};
    }
    case Kind::scattered:
      break;
  }
  return {sizes, random_placement(random, sizes, classes), random_placement(random, sizes, classes)};
}

// ---------------------------------------------------------------------------------------------------------
// What to compute, and the memory for it

struct Choice {
  DType dtype = DType::float32;
  drsl::Truth truth = drsl::Truth::ce;
  drsl::Distance distance = drsl::Distance::none;
  drsl::Activation activation = drsl::Activation::softmax;
  double smoothing = 0, q = 0.7, threshold = 0, scale = 1, margin = 0;
  bool class_weights = false, class_margins = false, soft = false, tau_rows = false, grad = true;
  int upstream_stride = -1;  // -1: no upstream gradient
  uint64_t outputs = 31;     // bits: loss, cross entropy, distance, margin, gradient to tau
  double ignored = 0, masked = 0, nan = 0;  // shares of rows, of logits, of rows
  double spread = 3, offset = 0;
  int64_t ignore_index = -100;
};

class Problem {
 public:
  Choice choice;
  Layout layout;
  drsl::Task task;
  DType acc;

  Problem(check::Random& random, const Choice& chosen, const Layout& where, int64_t classes, Place place)
      : choice(chosen), layout(where), task{}, acc(accumulator_of(chosen.dtype)), place_(place) {
    const int64_t rows = layout.rows();
    task.dtype = choice.dtype;
    task.truth = choice.truth;
    task.distance = choice.distance;
    task.activation = choice.activation;
    task.q = choice.q;
    task.threshold = choice.threshold;
    task.scale = choice.scale;
    task.margin = choice.margin;
    task.smoothing = choice.smoothing;
    task.rows = rows;
    task.classes = classes;
    task.ignore_index = choice.ignore_index;
    task.layout = {int(layout.sizes.size()),   layout.sizes.data(),        layout.logits.strides.data(),
                   layout.grad.strides.data(), layout.logits.class_stride, layout.grad.class_stride};
    task.labels = labels(random);
    task.logits = logits(random);
    task.tau = random.uniform(-1, 2);
    task.grad_scale = random.uniform(0.01, 1);
    task.soft = choice.soft;
    if (choice.soft) task.class_weights = numbers(random, rows * classes, 0, 1);
    else if (choice.class_weights) task.class_weights = numbers(random, classes, 0, 2);
    if (choice.class_margins) task.class_margins = numbers(random, classes, -1, 1);
    if (choice.tau_rows) task.tau_rows = numbers(random, rows, -1, 2);
    if (choice.upstream_stride >= 0) {
      task.upstream = numbers(random, choice.upstream_stride ? rows : 1, -2, 2);
      task.upstream_stride = choice.upstream_stride;
    }
    if (choice.grad) task.grad = output(layout.grad.extent, size_of(choice.dtype));
    void** const per_row[] = {&task.loss, &task.cross_entropy, &task.distance_out, &task.margin_out, &task.tau_grad};
    for (int i = 0; i < 5; ++i) {
      if (choice.outputs >> i & 1) *per_row[i] = output(rows, size_of(acc));
    }
    inputs_before_ = bytes_of(inputs_);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  void clear_outputs() {
    for (const auto& buffer : outputs_) buffer->fill(kUntouched);
  }
  std::vector<char> output_bytes() const { return bytes_of(outputs_); }
  bool inputs_unchanged() const { return bytes_of(inputs_) == inputs_before_; }
  // What the softmax is taken of, and its derivative by the logit in memory.
  double logit(int64_t row, int64_t k) const {
    const double z = in_memory(row, k);
    if (choice.activation == drsl::Activation::softmax) return z;
    return z > 0 ? z - std::log1p(std::exp(-z)) : 2 * z - std::log1p(std::exp(z));
  }
  double slope(int64_t row, int64_t k) const {
    return choice.activation == drsl::Activation::softmax ? 1 : 1 + 1 / (1 + std::exp(in_memory(row, k)));
  }
  double margin(int64_t k) const { return task.class_margins ? get(acc, task.class_margins, k) : task.margin; }
  double class_weight(int64_t row, int64_t k) const {
    if (!task.class_weights) return 1;
    return get(acc, task.class_weights, (task.soft ? row * task.classes : 0) + k);
  }

 private:
  double in_memory(int64_t row, int64_t k) const {
    return get(choice.dtype, task.logits, layout.offset(layout.logits, row) + k * layout.logits.class_stride);
  }

  using Buffers = std::vector<std::unique_ptr<Buffer>>;
  Place place_;
  Buffers inputs_, outputs_;
  std::vector<char> inputs_before_;

  static std::vector<char> bytes_of(const Buffers& buffers) {
    std::vector<char> all;
    for (const auto& buffer : buffers) all.insert(all.end(), buffer->as<char>(), buffer->as<char>() + buffer->bytes());
    return all;
  }

  void* output(int64_t count, int64_t size) {
    outputs_.push_back(std::make_unique<Buffer>(count * size, place_, size));
    return outputs_.back()->as<void>();
  }

  Buffer& input(int64_t count, int64_t size) {
    inputs_.push_back(std::make_unique<Buffer>(count * size, place_, size));
    return *inputs_.back();
  }

  void* numbers(check::Random& random, int64_t count, double low, double high) {
    void* const p = input(count, size_of(acc)).as<void>();
    for (int64_t i = 0; i < count; ++i) put(acc, p, i, random.chance(0.1) ? 0 : random.uniform(low, high));
    return p;
  }

  const int64_t* labels(check::Random& random) {
    int64_t* const p = input(task.rows, 8).as<int64_t>();
    const int64_t classes = task.classes;
    for (int64_t i = 0; i < task.rows; ++i) {
      // Often at an end of the row, where whole vectors begin and stop.
      const int64_t ends[] = {0, classes - 1, std::min<int64_t>(classes - 1, 15), std::max<int64_t>(0, classes - 17)};
      p[i] = random.chance(0.4) ? random.pick(ends) : random.below(classes);
      if (random.chance(choice.ignored)) p[i] = choice.ignore_index;
    }
    return p;
  }

  // Numbers between the rows and classes are NaN: nobody may read them as logits.
  const void* logits(check::Random& random) {
    void* const p = input(layout.logits.extent, size_of(choice.dtype)).as<void>();
    for (int64_t i = 0; i < layout.logits.extent; ++i) put(choice.dtype, p, i, NAN);
    for (int64_t row = 0; row < task.rows; ++row) {
      const int64_t first = layout.offset(layout.logits, row);
      const double spread = random.chance(0.15) ? 10 * choice.spread : choice.spread;  // some rows saturated
      const bool alone = random.chance(choice.masked / 4);  // nothing but the label is left
      for (int64_t k = 0; k < task.classes; ++k) {
        const double z = choice.offset + spread * random.normal();
        const bool masked = alone ? k != task.labels[row] : random.chance(choice.masked);
        put(choice.dtype, p, first + k * layout.logits.class_stride, masked ? -kInf : z);
      }
      if (!random.chance(choice.nan)) continue;
      const double bad[] = {NAN, NAN, kInf, -kInf};
      const double value = random.pick(bad);
      const int64_t k = random.chance(0.3) && task.labels[row] >= 0 && task.labels[row] < task.classes
                            ? task.labels[row]
                            : random.below(task.classes);
      put(choice.dtype, p, first + k * layout.logits.class_stride, value);
    }
    return p;
  }
};
