// The loss in pieces, on the kernels of any device: a gradient in the place of the logits, and rows whose classes lie in
// several places. Held against the same kernels with a gradient in a buffer of its own, and against the truth of whole
// rows (kernel_truth.h). For test_pieces.cpp and test_cuda_pieces.cpp.
#pragma once

#include "kernel_checks.h"

// What the checks need of a device: `run` a task, with scratch of exactly its size, and write a task's row statistics.
struct Engine {
  virtual ~Engine() = default;
  virtual const char* name() const = 0;
  virtual void run(const drsl::Task& task) const = 0;
  virtual void row_stats(const drsl::Task& task, void* out) const = 0;
};

// Layouts in which no two rows share memory.
constexpr Kind kApart[] = {Kind::contiguous, Kind::padded_rows, Kind::class_gaps,
                           Kind::images,     Kind::transposed,  Kind::scattered};

namespace pieces {

// Rows' own losses: there is no mean over them, and nothing on a device is read from the host.
inline void for_any_device(drsl::Task& task) {
  task.grad_scale = 1;
  task.tau_stride = 1;
}

inline std::vector<ExpectedRow> expected_rows(const Problem& p) {
  std::vector<ExpectedRow> rows;
  for (int64_t row = 0; row < p.task.rows; ++row) rows.push_back(expected_row(p, row));
  return rows;
}

inline void check_rows(const Problem& p, const std::vector<ExpectedRow>& want) {
  for (int64_t row = 0; row < p.task.rows; ++row) {
    check_values(p, row, want[size_t(row)]);
    check_gradient(p, row, want[size_t(row)]);
  }
}

// Outputs as before a run; the gradient's memory, gaps and all, holds the logits.
inline void start_with_logits(Problem& p) {
  p.clear_outputs();
  std::memcpy(p.task.grad, p.task.logits, size_t(p.layout.grad.extent * size_of(p.task.dtype)));
}

// Some of a problem's classes, in memory of their own, as the process that holds them sees them.
class Part {
 public:
  drsl::Task task;
  int64_t first;

  Part(const Problem& p, int64_t first, int64_t classes, Place place)
      : task(p.task),
        first(first),
        size_(size_of(p.task.dtype)),
        row_stride_(classes),
        logits_(p.task.rows * classes * size_, place, size_),
        labels_(p.task.rows * 8, place, 8),
        stats_(p.task.rows * drsl::kRowStats * size_of(p.acc), place, size_of(p.acc)) {
    const drsl::Task& whole = p.task;
    for (int64_t row = 0; row < whole.rows; ++row) {
      const int64_t y = whole.labels[row], local = y - first;
      labels_.as<int64_t>()[row] = y == whole.ignore_index ? y : local >= 0 && local < classes ? local : -1;
      std::memcpy(logits(row), in_whole(p, whole.logits, row), size_t(classes * size_));
    }
    task.classes = classes;
    task.logits = logits_.as<void>();
    task.labels = labels_.as<int64_t>();
    task.layout.logits_strides = &row_stride_;
  }
  Part(const Part&) = delete;

  // Where the part's classes of a row lie among those of the whole.
  const char* in_whole(const Problem& p, const void* matrix, int64_t row) const {
    return static_cast<const char*>(matrix) + (p.layout.offset(p.layout.logits, row) + first) * size_;
  }
  char* logits(int64_t row) { return logits_.as<char>() + row * row_stride_ * size_; }

  const void* find_stats(const Engine& engine) {
    drsl::Task alone = task;
    alone.grad = nullptr;
    if (alone.distance == drsl::Distance::none) alone.distance = drsl::Distance::uniform;
    stats_.fill(kUntouched);
    engine.row_stats(alone, stats_.as<void>());
    return stats_.as<void>();
  }

 private:
  int64_t size_, row_stride_;
  Buffer logits_, labels_, stats_;
};

}  // namespace pieces

// A member of the family that classes in several places can compute: no weights or margins of single classes.
inline Choice piece_choice(check::Random& random, DType dtype) {
  Choice c;
  c.dtype = dtype;
  c.truth = random.pick(kTruths);
  c.distance = random.pick(kDistances);
  if (c.truth == drsl::Truth::ce && random.chance(0.4)) c.smoothing = 0.1;
  if (random.chance(0.3)) c.scale = 1.3;
  if (random.chance(0.3)) c.margin = 0.2;
  c.tau_rows = random.chance(0.4);
  c.upstream_stride = int(random.below(3)) - 1;
  c.ignored = c.masked = 0.1;
  c.nan = random.chance(0.2) ? 0.2 : 0;
  return c;
}

// The gradient over the logits is that in a buffer of its own, with `same_bits` to the last bit; so is everything else.
inline void check_in_place(const Engine& engine, check::Random& random, const Choice& choice, Kind kind, int64_t rows,
                           int64_t classes, bool same_bits) {
  Layout layout = make_layout(random, kind, rows, classes);
  layout.grad = layout.logits;
  const Place place = random.pick(kPlaces);
  Problem p(random, choice, layout, classes, place);
  pieces::for_any_device(p.task);
  describe(engine.name(), p, kind, place);
  const std::vector<ExpectedRow> want = pieces::expected_rows(p);

  pieces::start_with_logits(p);
  engine.run(p.task);
  const std::vector<char> apart = p.output_bytes();
  pieces::check_rows(p, want);

  pieces::start_with_logits(p);
  drsl::Task task = p.task;
  task.logits = task.grad;
  engine.run(task);
  pieces::check_rows(p, want);
  CHECK(!same_bits || p.output_bytes() == apart, "in the place of the logits: other bits; %s", running);
  CHECK(p.inputs_unchanged(), "an input was written; %s", running);
}

// Rows in parts of the given sizes: statistics of each, then from all of them loss and gradient by each part's classes,
// in a buffer of its own and over the logits.
inline void check_parts(const Engine& engine, check::Random& random, const Choice& choice, int64_t rows,
                        const std::vector<int64_t>& sizes) {
  int64_t classes = 0;
  for (const int64_t size : sizes) classes += size;
  const Place place = random.pick(kPlaces);
  Problem p(random, choice, make_layout(random, Kind::contiguous, rows, classes), classes, place);
  pieces::for_any_device(p.task);
  describe(engine.name(), p, Kind::contiguous, place);
  const std::vector<ExpectedRow> want = pieces::expected_rows(p);

  const int64_t count = int64_t(sizes.size()), width = size_of(p.acc), bytes = drsl::kRowStats * width;
  Buffer stats(rows * count * bytes, place, width), label_logits(rows * width, place, width);
  std::vector<std::unique_ptr<pieces::Part>> parts;
  for (int64_t i = 0, first = 0; i < count; first += sizes[size_t(i)], ++i) {
    parts.push_back(std::make_unique<pieces::Part>(p, first, sizes[size_t(i)], place));
    const char* const found = static_cast<const char*>(parts.back()->find_stats(engine));
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(stats.as<char>() + (row * count + i) * bytes, found + row * bytes, size_t(bytes));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = p.task.labels[row];
    put(p.acc, label_logits.as<void>(), row, y == p.task.ignore_index ? 0 : p.logit(row, y));
  }

  std::vector<char> outputs;
  for (const auto& part : parts) {
    drsl::Task task = part->task;
    task.stats = stats.as<void>();
    task.stats_parts = count;
    task.label_logits = label_logits.as<void>();
    task.grad = static_cast<char*>(p.task.grad) + part->first * size_of(p.task.dtype);
    engine.run(task);
    for (int64_t row = 0; row < rows; ++row) check_values(p, row, want[size_t(row)]);
    task.grad = const_cast<void*>(task.logits);
    task.layout.grad_strides = task.layout.logits_strides;
    engine.run(task);
    for (int64_t row = 0; row < rows; ++row) {
      CHECK(!std::memcmp(part->logits(row), part->in_whole(p, p.task.grad, row),
                         size_t(task.classes * size_of(task.dtype))),
            "row %d of the part at class %d: other bits over the logits; %s", int(row), int(part->first), running);
    }
  }
  pieces::check_rows(p, want);
  CHECK(p.inputs_unchanged(), "an input was written; %s", running);
}
