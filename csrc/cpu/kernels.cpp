// Chooses kernel and variant for a task. This file is compiled once per instruction set: DRSL_ISA names the set,
// and with it the namespace of everything that the headers define. Relies on row_kernel.h, part_kernel.h,
// tile_kernel.h and activation.h; dispatch.cpp picks one of the resulting tables at run time.
#include "activation.h"
#include "part_kernel.h"
#include "row_kernel.h"
#include "tile_kernel.h"

#include <algorithm>
#include <type_traits>

#define DRSL_QUOTE(x) #x
#define DRSL_NAME(x) DRSL_QUOTE(x)

namespace drsl {
inline namespace DRSL_ISA {
namespace {

// Rows of at most this many adjacent classes go through tiles: that costs less than the reductions and the ragged end of
// each row. Measured with 130 to 1000 classes.
template <class D>
constexpr int64_t kTileClasses = kVectorBytes == 32 && sizeof(D) == 4 ? 160 : 320;

template <class D>
bool use_tiles(const Task& t) {
  return t.classes <= kTileClasses<D> || t.layout.logits_class_stride != 1 ||
         (t.grad && t.layout.grad_class_stride != 1);
}

template <class D, class S = Accumulator<D>>
int64_t scratch_bytes_of(const Task& t) {
  const bool tiles = use_tiles<D>(t), grad = t.grad != nullptr;
  if (t.activation == Activation::softmax) {
    const int64_t rows = row_scratch_elements<S>(t.classes, grad, use_copies<D>(t));
    if (!grad && tiles) return sizeof(S) * std::max(rows, tile_scratch_elements<S>(t));  // `row_stats` goes by rows
    return sizeof(S) * (tiles ? tile_scratch_elements<S>(t) : rows);
  }
  const bool copies = t.classes <= kCopiedClasses;
  const int64_t inner = tiles ? tile_scratch_elements<S>(t) : row_scratch_elements<S>(t.classes, grad, copies);
  return sizeof(S) * (block_elements<S>(t, block_strides<S>(t.classes, tiles)) + inner);
}

int64_t scratch_bytes(const Task& t) {
  if (t.dtype == DType::float64) return scratch_bytes_of<double>(t);
  return t.dtype == DType::float32 ? scratch_bytes_of<float>(t) : scratch_bytes_of<BFloat16>(t);
}

// The gradient alone, from what an earlier run saved.
template <class Terms, class D>
void run_from_saved(const Task& t, int64_t begin, int64_t end, void* scratch) {
  using S = Accumulator<D>;
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const Call<D> call(t);
  const bool tiles = use_tiles<D>(t);
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t n = end - row < kLanes ? end - row : kLanes;
    if (tiles) tile_block_from_saved<Terms>(call, row, n, static_cast<S*>(scratch));
    else row_block_from_saved<Terms>(call, row, n);
  }
}

// The loss and its gradient by some of the classes.
template <class Terms, bool kGrad, class D>
double run_from_stats(const Task& t, int64_t begin, int64_t end) {
  using S = Accumulator<D>;
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const Call<D> call(t);
  LossSum<S> sum;
  for (int64_t row = begin; row < end; row += kLanes) {
    row_block_from_stats<Terms, kGrad>(call, row, end - row < kLanes ? end - row : kLanes, sum);
  }
  return sum.total();
}

template <class Terms, bool kGrad, class D>
double run_terms(const Task& t, int64_t begin, int64_t end, void* scratch) {
  using S = Accumulator<D>;
  if constexpr (!Terms::kWeightedMean) {
    if (t.stats) return run_from_stats<Terms, kGrad, D>(t, begin, end);
  }
  if constexpr (kGrad && std::is_same_v<D, Half>) {  // nothing else is saved for
    if (t.from_saved) {
      run_from_saved<Terms, D>(t, begin, end, scratch);
      return 0;
    }
  }
  const Call<D> call(t);
  LossSum<S> sum;
  S* const workspace = static_cast<S*>(scratch);
  if (use_tiles<D>(t)) {
    for (int64_t row = begin; row < end; row += Vec<S>::kLanes) {
      const int64_t n = end - row < Vec<S>::kLanes ? end - row : Vec<S>::kLanes;
      tile_block<Terms, kGrad>(call, row, n, workspace, sum);
    }
  } else {
    const int64_t step = block_rows<S>(t.classes);
    for (int64_t row = begin; row < end; row += step) {
      const int64_t n = end - row < step ? end - row : step;
      if (sizeof(D) != sizeof(S) || use_copies<D>(t)) {
        row_block<Terms, kGrad, true>(call, row, n, workspace, sum);
      } else if constexpr (sizeof(D) == sizeof(S)) {
        row_block<Terms, kGrad, false>(call, row, n, workspace, sum);
      }
    }
  }
  return sum.total();
}

template <class D, bool kGrad>
double run_typed(const Task& t, int64_t begin, int64_t end, void* scratch) {
  if (t.soft || (t.smoothing > 0 && t.class_weights)) {
    return run_terms<TermSet<true, true, true>, kGrad, D>(t, begin, end, scratch);
  }
  if (t.smoothing > 0 || needs_moments(t.distance)) {
    return run_terms<TermSet<true, true, false>, kGrad, D>(t, begin, end, scratch);
  }
  if (needs_squares(t.distance)) return run_terms<TermSet<true, false, false>, kGrad, D>(t, begin, end, scratch);
  return run_terms<TermSet<false, false, false>, kGrad, D>(t, begin, end, scratch);
}

// With another activation than softmax.
template <class D, bool kGrad>
double run_transformed(const Task& t, int64_t begin, int64_t end, void* scratch) {
  using S = Accumulator<D>;
  const Call<D> call(t);
  const bool tiles = use_tiles<D>(t);
  const BlockStrides block = block_strides<S>(t.classes, tiles);
  S *const logits = static_cast<S*>(scratch), *const workspace = logits + block_elements<S>(t, block);
  double sum = 0;
  for (int64_t row = begin; row < end; row += block.rows) {
    const int64_t n = end - row < block.rows ? end - row : block.rows;
    const TransformedTask<S> inner(t, row, n, block, logits);
    const auto run = [&](const Task& task) { return run_typed<S, kGrad>(task, 0, n, workspace); };
    sum += tiles ? transformed_tile<kGrad>(call, row, inner, run) : transformed_rows<kGrad>(call, row, inner, run);
  }
  return sum;
}

template <class D>
double run_dtype(const Task& t, int64_t begin, int64_t end, void* scratch) {
  if (t.activation != Activation::softmax) {
    return t.grad ? run_transformed<D, true>(t, begin, end, scratch)
                  : run_transformed<D, false>(t, begin, end, scratch);
  }
  return t.grad ? run_typed<D, true>(t, begin, end, scratch) : run_typed<D, false>(t, begin, end, scratch);
}

double run(const Task& t, int64_t begin, int64_t end, void* scratch) {
  switch (t.dtype) {
    case DType::float64:
      return run_dtype<double>(t, begin, end, scratch);
    case DType::bfloat16:
      return run_dtype<BFloat16>(t, begin, end, scratch);
    case DType::float16:
      return run_dtype<Half>(t, begin, end, scratch);
    default:
      return run_dtype<float>(t, begin, end, scratch);
  }
}

template <class Terms, class D>
void stats_terms(const Task& t, int64_t begin, int64_t end, void* scratch, void* out) {
  using S = Accumulator<D>;
  const Call<D> call(t);
  const int64_t step = block_rows<S>(t.classes);
  for (int64_t row = begin; row < end; row += step) {
    const int64_t n = end - row < step ? end - row : step;
    stats_block<Terms>(call, row, n, static_cast<S*>(scratch), static_cast<S*>(out));
  }
}

template <class D>
void stats_typed(const Task& t, int64_t begin, int64_t end, void* scratch, void* out) {
  if (t.smoothing > 0 || needs_moments(t.distance)) {
    stats_terms<TermSet<true, true, false>, D>(t, begin, end, scratch, out);
  } else {
    stats_terms<TermSet<true, false, false>, D>(t, begin, end, scratch, out);
  }
}

void row_stats(const Task& t, int64_t begin, int64_t end, void* scratch, void* out) {
  switch (t.dtype) {
    case DType::float64:
      return stats_typed<double>(t, begin, end, scratch, out);
    case DType::bfloat16:
      return stats_typed<BFloat16>(t, begin, end, scratch, out);
    case DType::float16:
      return stats_typed<Half>(t, begin, end, scratch, out);
    default:
      return stats_typed<float>(t, begin, end, scratch, out);
  }
}

LabelScan scan_labels(const int64_t* labels, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t ignored = 0, wrong = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const bool is_ignored = labels[i] == ignore_index;
    ignored += is_ignored;
    wrong |= !is_ignored & (uint64_t(labels[i]) >= uint64_t(classes));
  }
  return {rows - ignored, wrong != 0};
}

}  // namespace

extern const Kernels kTable;
const Kernels kTable = {DRSL_NAME(DRSL_ISA), scratch_bytes, run, row_stats, scan_labels};

}  // namespace DRSL_ISA
}  // namespace drsl
