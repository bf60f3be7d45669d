// Tiles and memory: kLanes rows at a time become class by class what vectors hold, one row per lane, and back. By quads
// where the format has them, else by squares, whole vectors or single elements. Relies on quads.h; tile_kernel.h and
// activation.h rely on it.
#pragma once

#include "quads.h"

namespace drsl {
inline namespace DRSL_ISA {

// How the rows of a tile lie in memory.
enum class TileShape { adjacent_classes, adjacent_rows, scattered };

template <class S>
DRSL_FN TileShape tile_shape(const int64_t* offsets, int64_t n, int64_t class_stride) {
  if (class_stride == 1) return TileShape::adjacent_classes;
  bool adjacent = n == Vec<S>::kLanes;
  for (int64_t i = 1; i < n; ++i) adjacent &= offsets[i] == offsets[0] + i;
  return adjacent ? TileShape::adjacent_rows : TileShape::scattered;
}

// visit(first class, number of classes) for squares of kLanes classes that cover a row. The last one reaches back over
// classes that are done already, since a part of a vector costs more than a whole one; fewer classes are one part.
template <class S, class Visit>
DRSL_FN void sweep_squares(int64_t classes, Visit visit) {
  constexpr int64_t kLanes = Vec<S>::kLanes;
  if (classes < kLanes) return visit(int64_t(0), classes);
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) visit(c, kLanes);
  if (classes % kLanes) visit(classes - kLanes, kLanes);
}

// ---------------------------------------------------------------------------------------------------------
// Between memory and vectors across rows

// take(c, v) for every class c once: v has the class's elements of rows 0 .. n - 1 in its lanes; those from n on may hold
// any number. `tile` is room for a tile, which take may write from class c on.
template <class D, class Take, class S = Accumulator<D>>
DRSL_FN void read_tile(const D* base, const int64_t* offsets, int64_t n, int64_t classes, int64_t stride, S* tile,
                       Take take) {
  constexpr int kLanes = Vec<S>::kLanes;
  if constexpr (kQuadClasses<D> > 0) {
    if (quads_fit<D>(classes, stride)) {
      read_quads(base, offsets, n, classes, tile);
      for (int64_t c = 0; c < classes; ++c) take(c, load(static_cast<const S*>(tile) + c * kLanes));
      return;
    }
  }
  switch (tile_shape<S>(offsets, n, stride)) {
    case TileShape::adjacent_classes: {
      int64_t taken = 0;
      sweep_squares<S>(classes, [&](int64_t c, int64_t width) {
        Vec<S> square[kLanes];
        const auto row = [&](int i) { return base + offsets[i] + c; };
        if (n < kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = i < n ? load_first(row(i), width) : Vec<S>(S(0));
        } else if (width < kLanes) {
          for (int i = 0; i < kLanes; ++i) square[i] = load_first(row(i), width);
        } else {
          for (int i = 0; i < kLanes; ++i) square[i] = load(row(i));
        }
        transpose(square);
        for (int64_t j = taken - c; j < width; ++j) take(c + j, square[j]);
        taken = c + width;
      });
      return;
    }
    case TileShape::adjacent_rows:
      for (int64_t c = 0; c < classes; ++c) take(c, load(base + offsets[0] + c * stride));
      return;
    case TileShape::scattered:
      for (int64_t c = 0; c < classes; ++c) {
        S lanes[kLanes] = {};
        for (int i = 0; i < n; ++i) lanes[i] = load_one(base + offsets[i] + c * stride);
        take(c, load(static_cast<const S*>(lanes)));
      }
  }
}

// The way back: give(c) is the vector of class c. It may be asked for a class twice.
template <class D, class Give, class S = Accumulator<D>>
DRSL_FN void write_tile(D* base, const int64_t* offsets, int64_t n, int64_t classes, int64_t stride, Give give) {
  constexpr int kLanes = Vec<S>::kLanes;
  switch (tile_shape<S>(offsets, n, stride)) {
    case TileShape::adjacent_classes:
      sweep_squares<S>(classes, [&](int64_t c, int64_t width) {
        Vec<S> square[kLanes];
        const auto row = [&](int i) { return base + offsets[i] + c; };
        if (width < kLanes) {
          for (int j = 0; j < kLanes; ++j) square[j] = j < width ? give(c + j) : Vec<S>(S(0));
          transpose(square);
          for (int i = 0; i < n; ++i) store_first(row(i), square[i], width);
        } else {
          for (int j = 0; j < kLanes; ++j) square[j] = give(c + j);
          transpose(square);
          for (int i = 0; i < n; ++i) store(row(i), square[i]);
        }
      });
      return;
    case TileShape::adjacent_rows:
      for (int64_t c = 0; c < classes; ++c) store(base + offsets[0] + c * stride, give(c));
      return;
    case TileShape::scattered:
      for (int64_t c = 0; c < classes; ++c) {
        S lanes[kLanes];
        store(static_cast<S*>(lanes), give(c));
        for (int i = 0; i < n; ++i) store_one(base + offsets[i] + c * stride, lanes[i]);
      }
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
