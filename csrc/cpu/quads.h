// Between rows of adjacent 32- or 16-bit classes in memory and a tile: sixteen bytes of each of eight rows at a time, a
// "quad" of four words per row. Shuffles within 128 bits suffice for that, two per vector, where a square transpose takes
// one per halving; and a row that does not end with a quad costs one more quad that reaches back, with no masks. Vectors
// are never longer than 32 bytes here, even for AVX-512: eight row pointers stay in registers, sixteen do not.
// Relies on memory.h; tiles.h relies on it.
#pragma once

#include "memory.h"

namespace drsl {
inline namespace DRSL_ISA {

constexpr int kTileLanes = Vec<float>::kLanes;
constexpr int kQuadRows = kTileLanes < 8 ? kTileLanes : 8;
typedef uint32_t QuadWords __attribute__((vector_size(4 * kQuadRows)));
typedef float QuadFloats __attribute__((vector_size(4 * kQuadRows)));
typedef float QuadFloatsUnaligned __attribute__((vector_size(4 * kQuadRows), aligned(4), may_alias));

// Classes in a quad; 0: this format has none.
template <class D>
constexpr int64_t kQuadClasses = sizeof(D) <= 4 ? 16 / sizeof(D) : 0;

template <class D>
DRSL_FN bool quads_fit(int64_t classes, int64_t class_stride) {
  return kQuadClasses<D> > 0 && class_stride == 1 && classes >= kQuadClasses<D>;
}

// visit(first class) for groups of kStep classes that cover a row.
template <int64_t kStep, class Visit>
DRSL_FN void sweep_groups(int64_t classes, Visit visit) {
  for (int64_t c = 0; c + kStep <= classes; c += kStep) visit(c);
  if (classes % kStep) visit(classes - kStep);
}

typedef uint64_t QuadPairs __attribute__((vector_size(4 * kQuadRows)));

template <int... I>
DRSL_FN QuadWords pick_pairs(QuadWords a, QuadWords b, Numbers<I...>) {
  return (QuadWords)__builtin_shufflevector((QuadPairs)a, (QuadPairs)b, I...);
}

template <int... I>
DRSL_FN QuadWords pick(QuadWords a, QuadWords b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, I...);
}

#if defined(__AVX2__)
using LowWords = Numbers<0, 8, 1, 9, 4, 12, 5, 13>;
using HighWords = Numbers<2, 10, 3, 11, 6, 14, 7, 15>;
using LowPairs = Numbers<0, 4, 2, 6>;
using HighPairs = Numbers<1, 5, 3, 7>;
#else
using LowWords = Numbers<0, 4, 1, 5>;
using HighWords = Numbers<2, 6, 3, 7>;
using LowPairs = Numbers<0, 2>;
using HighPairs = Numbers<1, 3>;
#endif

// Each 128 bits by themselves: four rows of four words become four words of four rows, and back.
DRSL_FN void transpose_quad(QuadWords (&v)[4]) {
  const QuadWords a = pick(v[0], v[1], LowWords()), b = pick(v[0], v[1], HighWords());
  const QuadWords c = pick(v[2], v[3], LowWords()), d = pick(v[2], v[3], HighWords());
  v[0] = pick_pairs(a, c, LowPairs());
  v[1] = pick_pairs(a, c, HighPairs());
  v[2] = pick_pairs(b, d, LowPairs());
  v[3] = pick_pairs(b, d, HighPairs());
}

// Vector i of a quad holds rows i and, where there are eight, 4 + i.
DRSL_FN QuadWords load_rows(const void* row, [[maybe_unused]] const void* row4) {
#if defined(__AVX2__)
  const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(row)));
  return (QuadWords)_mm256_inserti128_si256(low, _mm_loadu_si128(static_cast<const __m128i*>(row4)), 1);
#else
  QuadWords words;
  memcpy(&words, row, sizeof(words));
  return words;
#endif
}

DRSL_FN void store_rows(void* row, [[maybe_unused]] void* row4, QuadWords words) {
#if defined(__AVX2__)
  _mm_storeu_si128(static_cast<__m128i*>(row), _mm256_castsi256_si128((__m256i)words));
  _mm_storeu_si128(static_cast<__m128i*>(row4), _mm256_extracti128_si256((__m256i)words, 1));
#else
  memcpy(row, &words, sizeof(words));
#endif
}

// Four floats from each; `high` counts where a vector has eight.
DRSL_FN QuadFloats load_floats(const float* low, const float* high) { return (QuadFloats)load_rows(low, high); }
DRSL_FN QuadFloats both(float low, float high) {
  const float lows[4] = {low, low, low, low}, highs[4] = {high, high, high, high};
  return load_floats(lows, highs);
}
DRSL_FN void store_floats(float* p, QuadWords x) { *reinterpret_cast<QuadFloatsUnaligned*>(p) = (QuadFloats)x; }

// ---------------------------------------------------------------------------------------------------------
// A word of eight rows: one class, or two of a 16-bit format, of which the lower half is the first

template <class D>
struct Format {};

template <class D>
DRSL_FN void words_to_tile(QuadWords words, float* tile) {
  store_floats(tile, words);
}

// give(j): the floats of the j-th class of the word.
template <class D, class Give>
DRSL_FN QuadWords words_of(Format<D>, Give give) {
  return (QuadWords)give(0);
}

template <>
DRSL_FN void words_to_tile<BFloat16>(QuadWords words, float* tile) {
  store_floats(tile, words << 16);
  store_floats(tile + kTileLanes, words & 0xffff0000u);
}

// A NaN must be `quiet`, or come from bfloat16.
template <class Give>
DRSL_FN QuadWords words_of(Format<BFloat16>, Give give) {
  const QuadWords first = round_to_upper_half((QuadWords)give(0)), second = round_to_upper_half((QuadWords)give(1));
  return (first >> 16) | (second & 0xffff0000u);
}

#if defined(__AVX2__)
template <>
DRSL_FN void words_to_tile<Half>(QuadWords words, float* tile) {
  // The first halves of each 128 bits below the second ones, then the first halves of all below the second ones.
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)words, order), 0b11011000);
  store_floats(tile, (QuadWords)_mm256_cvtph_ps(_mm256_castsi256_si128(sorted)));
  store_floats(tile + kTileLanes, (QuadWords)_mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1)));
}

template <class Give>
DRSL_FN QuadWords words_of(Format<Half>, Give give) {
  const __m128i first = _mm256_cvtps_ph((__m256)give(0), _MM_FROUND_TO_NEAREST_INT);
  const __m128i second = _mm256_cvtps_ph((__m256)give(1), _MM_FROUND_TO_NEAREST_INT);
  const __m256i low = _mm256_castsi128_si256(_mm_unpacklo_epi16(first, second));
  return (QuadWords)_mm256_inserti128_si256(low, _mm_unpackhi_epi16(first, second), 1);
}
#else
template <>
DRSL_FN void words_to_tile<Half>(QuadWords words, float* tile) {
  store(tile, widen_half(__builtin_convertvector(words & 0xffffu, Bits16)));
  store(tile + kTileLanes, widen_half(__builtin_convertvector(words >> 16, Bits16)));
}

template <class Give>
DRSL_FN QuadWords words_of(Format<Half>, Give give) {
  const auto half = [](QuadFloats x) { return __builtin_convertvector(narrow_half(Vec<float>(x)), QuadWords); };
  return half(give(0)) | half(give(1)) << 16;
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Tiles: class by class, kTileLanes rows each

// Rows 0 .. n - 1 to the tile; lanes from n on repeat row 0.
template <class D>
DRSL_FN void read_quads(const D* base, const int64_t* offsets, int64_t n, int64_t classes, float* tile) {
  for (int from = 0; from < kTileLanes; from += kQuadRows) {
    const D* rows[kQuadRows];
    for (int i = 0; i < kQuadRows; ++i) rows[i] = base + offsets[from + i < n ? from + i : 0];
    sweep_groups<kQuadClasses<D>>(classes, [&](int64_t c) {
      QuadWords quad[4];
      for (int i = 0; i < 4; ++i) quad[i] = load_rows(rows[i] + c, rows[(i + 4) % kQuadRows] + c);
      transpose_quad(quad);
      for (int i = 0; i < 4; ++i) {
        words_to_tile<D>(quad[i], tile + (c + i * kQuadClasses<D> / 4) * kTileLanes + from);
      }
    });
  }
}

// The way back, from any function of the tile. group(low, high) is asked once for the rows from `low` on, four of them or,
// with those from `high` on, eight; what it returns is a function of the tile's element that begins each half of a vector.
// kWide: both halves belong to four rows, to which 32 bytes go at a time. `spare` has room for a row, for lanes from n on.
template <class D, bool kWide, class Group>
DRSL_FN void write_groups(D* base, const int64_t* offsets, int64_t n, int64_t classes, D* spare, Group group) {
  constexpr int kRows = kWide ? 4 : kQuadRows;
  constexpr int64_t kStep = (kWide ? 2 : 1) * kQuadClasses<D>, kWordClasses = kQuadClasses<D> / 4;
  constexpr int64_t kHigh = kWide ? kQuadClasses<D> * kTileLanes : kRows - 4;
  for (int from = 0; from < kTileLanes; from += kRows) {
    const auto give = group(from, kWide ? from : from + kRows - 4);
    D* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = from + i < n ? base + offsets[from + i] : spare;
    sweep_groups<kStep>(classes, [&](int64_t c) {
      QuadWords quad[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (c + i * kWordClasses) * kTileLanes + from;
        quad[i] = words_of(Format<D>(), [&](int j) { return give(at + j * kTileLanes, at + j * kTileLanes + kHigh); });
      }
      transpose_quad(quad);
      for (int i = 0; i < 4; ++i) {
        if constexpr (kWide) memcpy(static_cast<void*>(rows[i] + c), &quad[i], sizeof(QuadWords));
        else store_rows(rows[i] + c, rows[(i + 4) % kRows] + c, quad[i]);
      }
    });
  }
}

template <class D, class Group>
DRSL_FN void write_quads(D* base, const int64_t* offsets, int64_t n, int64_t classes, D* spare, Group group) {
  constexpr bool kCanBeWide = sizeof(QuadWords) == 32;
  if (kCanBeWide && classes >= 4 * kQuadClasses<D>) {
    write_groups<D, kCanBeWide>(base, offsets, n, classes, spare, group);
  } else {
    write_groups<D, false>(base, offsets, n, classes, spare, group);
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
