// Loading and storing vectors: every storage format, whole and partial vectors, and the square transpose that
// turns rows into lanes. Relies on simd.h; call.h, quads.h and sweeps.h rely on it.
#pragma once

#include "simd.h"

namespace drsl {
inline namespace DRSL_ISA {

// The type in which a storage format is computed with.
template <class D>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class D>
using Accumulator = typename AccumulatorOf<D>::type;

// ---------------------------------------------------------------------------------------------------------
// Whole vectors of 16-bit formats, as the integers that hold them

using Lanes16 = Vec<float>;
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

DRSL_FN Vec<float> widen_bfloat16(Bits16 bits) {
  return (Lanes16::Native)(__builtin_convertvector(bits, Bits32) << 16);
}

// Bits of floats, rounded to nearest, ties to even, in the upper half; something else in the lower one. A NaN must be
// quiet: of one that has its bits in the lower half, nothing would be left.
template <class Bits>
DRSL_FN Bits round_to_upper_half(Bits bits) {
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// The same numbers, and a NaN that rounds to NaN.
template <class S>
DRSL_FN Vec<S> quiet(Vec<S> x) {
  return select(x == x, x, infinity<Vec<S>>() - infinity<Vec<S>>());
}

// Round to nearest, ties to even; NaN becomes the quiet NaN.
DRSL_FN Bits16 narrow_bfloat16(Vec<float> x) {
  const Bits32 rounded = round_to_upper_half((Bits32)x.v) >> 16;
  const Bits32 quiet = rounded - rounded + 0x7fc0u;
  const Bits32 is_nan = (Bits32)(x.v != x.v);
  return __builtin_convertvector((Bits32)((rounded & ~is_nan) | (quiet & is_nan)), Bits16);
}

#if defined(__AVX512F__)
DRSL_FN Vec<float> widen_half(Bits16 bits) { return Vec<float>(_mm512_cvtph_ps((__m256i)bits)); }
DRSL_FN Bits16 narrow_half(Vec<float> x) { return (Bits16)_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
DRSL_FN Vec<float> widen_half(Bits16 bits) { return Vec<float>(_mm256_cvtph_ps((__m128i)bits)); }
DRSL_FN Bits16 narrow_half(Vec<float> x) { return (Bits16)_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Place the 15 magnitude bits in a float and multiply by 2^112 to move the exponent's bias: exact, subnormals too.
DRSL_FN Vec<float> widen_half(Bits16 half) {
  const Bits32 bits = __builtin_convertvector(half, Bits32);
  const Bits32 magnitude = bits & 0x7fffu;
  const Vec<float> scaled = Vec<float>((Lanes16::Native)(magnitude << 13)) * Vec<float>(0x1p112f);
  const Bits32 special = (Bits32)(magnitude >= 0x7c00u);  // inf and NaN keep a full exponent
  const Bits32 result = (Bits32)scaled.v | (special & 0x7f800000u) | ((bits & 0x8000u) << 16);
  return (Lanes16::Native)result;
}

// Round to nearest, ties to even. Adding 2^(13+e) aligns the mantissa so that the hardware rounds for us.
DRSL_FN Bits16 narrow_half(Vec<float> x) {
  const Bits32 bits = (Bits32)x.v;
  const Bits32 sign = (bits >> 16) & 0x8000u;
  const Bits32 magnitude = bits & 0x7fffffffu;
  const Bits32 overflow = (Bits32)(magnitude >= 0x477ff000u);   // 65520 and more round to infinity
  const Bits32 is_nan = (Bits32)(magnitude > 0x7f800000u);
  const Bits32 tiny = (Bits32)(magnitude < 0x38800000u);        // below 2^-14: subnormal in half
  const Vec<float> small = Vec<float>((Lanes16::Native)magnitude) + Vec<float>(0.5f);
  const Bits32 subnormal = (Bits32)small.v - 0x3f000000u;
  const Bits32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  Bits32 result = (subnormal & tiny) | (normal & ~tiny);
  result = (result & ~overflow) | (overflow & 0x7c00u) | (is_nan & 0x200u);
  return __builtin_convertvector((Bits32)(result | sign), Bits16);
}
#endif

// ---------------------------------------------------------------------------------------------------------
// Vectors in memory: D is the storage format

template <class D>
DRSL_FN Vec<Accumulator<D>> load(const D* p) {
  return (typename Vec<D>::Native)(*reinterpret_cast<const typename Vec<D>::Unaligned*>(p));
}
template <> DRSL_FN Vec<float> load(const BFloat16* p) { return widen_bfloat16(*reinterpret_cast<const Bits16*>(p)); }
template <> DRSL_FN Vec<float> load(const Half* p) { return widen_half(*reinterpret_cast<const Bits16*>(p)); }

template <class D>
DRSL_FN void store(D* p, Vec<Accumulator<D>> x) {
  *reinterpret_cast<typename Vec<D>::Unaligned*>(p) = x.v;
}
template <> DRSL_FN void store(BFloat16* p, Vec<float> x) { *reinterpret_cast<Bits16*>(p) = narrow_bfloat16(x); }
template <> DRSL_FN void store(Half* p, Vec<float> x) { *reinterpret_cast<Bits16*>(p) = narrow_half(x); }

// Two vectors, one behind the other; a NaN in them is `quiet`, or comes from the same storage format.
template <class D>
DRSL_FN void store_two_quiet(D* p, Vec<Accumulator<D>> x, Vec<Accumulator<D>> y) {
  store(p, x);
  store(p + Vec<Accumulator<D>>::kLanes, y);
}

#if defined(__AVX2__)
template <>
DRSL_FN void store_two_quiet(BFloat16* p, Vec<float> x, Vec<float> y) {
  const Bits32 a = round_to_upper_half((Bits32)x.v), b = round_to_upper_half((Bits32)y.v);
#if defined(__AVX512F__)
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  const Halves both = __builtin_shufflevector((Halves)a, (Halves)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                              29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#else
  const __m256i halves = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));  // of each 128 bits by themselves
  const __m256i both = _mm256_permute4x64_epi64(halves, 0b11011000);
#endif
  memcpy(static_cast<void*>(p), &both, sizeof(both));
}
#endif

// The first n lanes from memory, 0 in the others; nothing beyond them is touched.
template <class D>
DRSL_FN Vec<Accumulator<D>> load_first(const D* p, int64_t n) {
  D lanes[Vec<Accumulator<D>>::kLanes] = {};
  memcpy(lanes, p, n * sizeof(D));
  return load(static_cast<const D*>(lanes));
}

template <class D>
DRSL_FN void store_first(D* p, Vec<Accumulator<D>> x, int64_t n) {
  D lanes[Vec<Accumulator<D>>::kLanes];
  store(static_cast<D*>(lanes), x);
  memcpy(p, lanes, n * sizeof(D));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
DRSL_FN uint32_t first_bits(int64_t n) { return (1u << n) - 1u; }

template <> DRSL_FN Vec<float> load_first(const float* p, int64_t n) {
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16(first_bits(n)), p));
}
template <> DRSL_FN Vec<double> load_first(const double* p, int64_t n) {
  return Vec<double>(_mm512_maskz_loadu_pd(__mmask8(first_bits(n)), p));
}
template <> DRSL_FN Vec<float> load_first(const BFloat16* p, int64_t n) {
  return widen_bfloat16((Bits16)_mm256_maskz_loadu_epi16(__mmask16(first_bits(n)), p));
}
template <> DRSL_FN Vec<float> load_first(const Half* p, int64_t n) {
  return widen_half((Bits16)_mm256_maskz_loadu_epi16(__mmask16(first_bits(n)), p));
}
template <> DRSL_FN void store_first(float* p, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16(first_bits(n)), x.v);
}
template <> DRSL_FN void store_first(double* p, Vec<double> x, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8(first_bits(n)), x.v);
}
template <> DRSL_FN void store_first(BFloat16* p, Vec<float> x, int64_t n) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_bits(n)), (__m256i)narrow_bfloat16(x));
}
template <> DRSL_FN void store_first(Half* p, Vec<float> x, int64_t n) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_bits(n)), (__m256i)narrow_half(x));
}
#elif defined(__AVX2__)
DRSL_FN __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <> DRSL_FN Vec<float> load_first(const float* p, int64_t n) {
  return Vec<float>(_mm256_maskload_ps(p, first_lanes(n)));
}
template <> DRSL_FN void store_first(float* p, Vec<float> x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
#endif

// The line of p, which may lie anywhere, comes into the cache: to be read, or to be written.
DRSL_FN void prefetch(const void* p) { __builtin_prefetch(p, 0); }
DRSL_FN void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// Element at p, and element back: through a vector, so that the rounding is the one of whole vectors.
template <class D>
DRSL_FN Accumulator<D> load_one(const D* p) {
  if constexpr (sizeof(D) == sizeof(Accumulator<D>)) return *p;
  else return load_first(p, 1).v[0];
}

template <class D>
DRSL_FN void store_one(D* p, Accumulator<D> x) {
  if constexpr (sizeof(D) == sizeof(Accumulator<D>)) *p = x;
  else store_first(p, Vec<Accumulator<D>>(x), 1);
}

// ---------------------------------------------------------------------------------------------------------
// Transpose of kLanes x kLanes elements in registers: log2(kLanes) rounds, each interleaving vector i with
// vector i + kLanes/2.

template <int... I>
struct Numbers {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Numbers<I...>;
};

// Lane j of the result: lane offset + j/2 of a for even j, of b for odd j.
template <class S, int Offset, int... J>
DRSL_FN Vec<S> interleave(Vec<S> a, Vec<S> b, Numbers<J...>) {
  return Vec<S>(__builtin_shufflevector(a.v, b.v, (Offset + J / 2 + (J % 2) * Vec<S>::kLanes)...));
}

template <class S>
DRSL_FN void transpose(Vec<S> (&rows)[Vec<S>::kLanes]) {
  constexpr int kLanes = Vec<S>::kLanes;
  using Lanes = typename CountTo<kLanes>::type;
  Vec<S> next[kLanes];
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<S, 0>(rows[i], rows[i + kLanes / 2], Lanes());
      next[2 * i + 1] = interleave<S, kLanes / 2>(rows[i], rows[i + kLanes / 2], Lanes());
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace DRSL_ISA
}  // namespace drsl
