// Loops over the vectors of a row, and what remains of a vector for each of several rows. Relies on memory.h; row_passes.h
// relies on it.
#pragma once

#include "memory.h"

namespace drsl {
inline namespace DRSL_ISA {

template <int I>
struct Slot {
  static constexpr int kIndex = I;
};
// Independent accumulators, to cover the latency of an addition, as far as registers go.
constexpr int kSlots = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kGroup = 4;  // vectors per turn of a loop

template <class S>
struct Slots {
  Vec<S> of[kSlots];

  DRSL_FN explicit Slots(Vec<S> start) {
    for (Vec<S>& x : of) x = start;
  }
  DRSL_FN Vec<S>& operator[](int i) { return of[i]; }
  DRSL_FN Vec<S> sum() const {
    if constexpr (kSlots == 2) return of[0] + of[1];
    else return (of[0] + of[1]) + (of[2] + of[3]);
  }
  DRSL_FN Vec<S> max() const {
    Vec<S> x = max_(of[0], of[1]);
    for (int i = 2; i < kSlots; ++i) x = max_(x, of[i]);
    return x;
  }
};

// visit(j, slot) for j < count.
template <class Visit>
DRSL_FN void sweep(int64_t count, Visit visit) {
  int64_t j = 0;
  for (; j + kGroup <= count; j += kGroup) {
    visit(j, Slot<0>());
    visit(j + 1, Slot<1>());
    visit(j + 2, Slot<2 % kSlots>());
    visit(j + 3, Slot<3 % kSlots>());
  }
  for (; j < count; ++j) visit(j, Slot<0>());
}

// Visit the n classes of a chunk: full(k, slot) where all kLanes classes from k on are in it and none is the label,
// edge(k, count, keep) for the others: `count` classes from k on, of which those in `keep` are not the label. A label
// that is not in the chunk is any number outside [0, n).
template <class S, class Full, class Edge>
DRSL_FN void sweep_rest(int64_t n, int64_t label, Full full, Edge edge) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  const int64_t vectors = n / kLanes, whole = vectors * kLanes, groups = vectors / kGroup;
  const int64_t block = uint64_t(label) < uint64_t(n) ? label / kLanes : n;  // the label's vector
  const int64_t own = block / kGroup;
  // Arithmetic passes over the label's group, and then over its vector: a loop that ends there is mispredicted in every
  // row.
  for (int64_t g = 0; g < groups - (own < groups); ++g) {
    const int64_t k = (g + (g >= own)) * kGroup * kLanes;
    full(k, Slot<0>());
    full(k + kLanes, Slot<1>());
    full(k + 2 * kLanes, Slot<2 % kSlots>());
    full(k + 3 * kLanes, Slot<3 % kSlots>());
  }
  const auto single = [&](int64_t first, int64_t last) {
    const bool inside = first <= block && block < last;
    for (int64_t j = first; j < last - inside; ++j) full((j + (inside & (j >= block))) * kLanes, Slot<0>());
  };
  if (own < groups) single(own * kGroup, (own + 1) * kGroup);
  single(groups * kGroup, vectors);
  const auto keep = [&](int64_t k, int64_t count) {
    return Mask<S>{lane_below<S>(count).v & ~lane_is<S>(label - k).v};
  };
  if (block < vectors) edge(block * kLanes, kLanes, keep(block * kLanes, kLanes));
  if (whole < n) edge(whole, n - whole, keep(whole, n - whole));
}

// Lane i: the lanes of part[i] combined; 0 from lane n on.
template <class S, class Combine, class Reduce>
DRSL_FN Vec<S> across_lanes(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n, Combine combine, Reduce reduce) {
  constexpr int kLanes = Vec<S>::kLanes;
  if (n <= kLanes / 4) {  // too few rows for a transpose
    S row[kLanes] = {};
    for (int i = 0; i < n; ++i) row[i] = reduce(part[i]);
    return load(static_cast<const S*>(row));
  }
  Vec<S> square[kLanes];
  for (int i = 0; i < kLanes; ++i) square[i] = i < n ? part[i] : Vec<S>(S(0));
  transpose(square);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) square[i] = combine(square[i], square[i + half]);
  }
  return square[0];
}

template <class S>
DRSL_FN Vec<S> sums_of(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n) {
  return across_lanes(part, n, [](Vec<S> a, Vec<S> b) { return a + b; }, [](Vec<S> x) { return reduce_add(x); });
}

template <class S>
DRSL_FN Vec<S> maxima_of(const Vec<S> (&part)[Vec<S>::kLanes], int64_t n) {
  return across_lanes(part, n, [](Vec<S> a, Vec<S> b) { return max_(a, b); }, [](Vec<S> x) { return reduce_max(x); });
}

}  // namespace DRSL_ISA
}  // namespace drsl
