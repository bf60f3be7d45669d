// A vector of float or double lanes for the CPU kernels, with the elementwise vocabulary of row_loss.h.
// Built on the compiler's vector extensions, so that one source serves SSE2, AVX2, AVX-512 and NEON; the few
// places where an instruction has no such spelling name it under #if. No torch.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../row_loss.h"

namespace drsl {
inline namespace DRSL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage formats of the logits besides float and double.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The compiler drops vector attributes from types that depend on a template argument, hence the two spellings.
template <class S>
struct LaneTypes;

template <>
struct LaneTypes<float> {
  using Int = int32_t;
  typedef float Native __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  typedef int32_t LabelPart __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct LaneTypes<double> {
  using Int = int64_t;
  typedef double Native __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef double Wide __attribute__((vector_size(kVectorBytes)));
  typedef int64_t LabelPart __attribute__((vector_size(kVectorBytes)));
};

template <class S>
struct Vec {
  static constexpr int kLanes = kVectorBytes / sizeof(S);
  using Int = typename LaneTypes<S>::Int;
  using Native = typename LaneTypes<S>::Native;
  using Bits = typename LaneTypes<S>::Bits;  // integers, and masks: all ones where true
  using Words = typename LaneTypes<S>::Words;  // integers that wrap around
  using Unaligned = typename LaneTypes<S>::Unaligned;
  using Wide = typename LaneTypes<S>::Wide;  // the same lanes in double

  Native v;

  Vec() = default;
  DRSL_FN Vec(Native native) : v(native) {}
  DRSL_FN explicit Vec(S x) : v(x - Native{}) {}  // x - 0, not 0 + x: keeps -0
};

template <class S>
struct Mask {
  typename Vec<S>::Bits v;
};

template <class S>
struct ScalarOf<Vec<S>> {
  using type = S;
};

template <class S> DRSL_FN Vec<S> operator+(Vec<S> a, Vec<S> b) { return a.v + b.v; }
template <class S> DRSL_FN Vec<S> operator-(Vec<S> a, Vec<S> b) { return a.v - b.v; }
template <class S> DRSL_FN Vec<S> operator*(Vec<S> a, Vec<S> b) { return a.v * b.v; }
template <class S> DRSL_FN Vec<S> operator/(Vec<S> a, Vec<S> b) { return a.v / b.v; }
template <class S> DRSL_FN Vec<S> operator-(Vec<S> a) { return -a.v; }
template <class S> DRSL_FN Mask<S> operator<(Vec<S> a, Vec<S> b) { return {a.v < b.v}; }
template <class S> DRSL_FN Mask<S> operator>(Vec<S> a, Vec<S> b) { return {a.v > b.v}; }
template <class S> DRSL_FN Mask<S> operator==(Vec<S> a, Vec<S> b) { return {a.v == b.v}; }
template <class S> DRSL_FN Mask<S> operator!=(Vec<S> a, Vec<S> b) { return {a.v != b.v}; }
template <class S> DRSL_FN Mask<S> operator&(Mask<S> a, Mask<S> b) { return {a.v & b.v}; }
template <class S> DRSL_FN Vec<S> select(Mask<S> c, Vec<S> a, Vec<S> b) { return c.v ? a.v : b.v; }

template <class S>
DRSL_FN Vec<S> abs_(Vec<S> x) {
  using Bits = typename Vec<S>::Bits;
  using Int = typename Vec<S>::Int;
  const Int keep = static_cast<Int>(~(Int(1) << (8 * sizeof(Int) - 1)));
  return (typename Vec<S>::Native)((Bits)x.v & keep);
}

// The larger; NaN if b is NaN.
template <class S>
DRSL_FN Vec<S> max_(Vec<S> a, Vec<S> b) {
  return a.v > b.v ? a.v : b.v;
}

// Lane numbers 0, 1, 2, ... in the integer type of the lanes.
template <class S>
DRSL_FN typename Vec<S>::Bits lane_numbers() {
  typename Vec<S>::Bits n;
  for (int i = 0; i < Vec<S>::kLanes; ++i) n[i] = i;
  return n;
}

template <class S>
DRSL_FN Mask<S> lane_is(int64_t lane) {
  using Int = typename Vec<S>::Int;
  return {lane_numbers<S>() == static_cast<Int>(lane)};
}

template <class S>
DRSL_FN Mask<S> lane_below(int64_t n) {
  using Int = typename Vec<S>::Int;
  return {lane_numbers<S>() < static_cast<Int>(n)};
}

// Is any lane true?
template <class S>
DRSL_FN bool any(Mask<S> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_test_epi32_mask((__m512i)m.v, (__m512i)m.v) != 0;
  else return _mm512_test_epi64_mask((__m512i)m.v, (__m512i)m.v) != 0;
#else
  typename Vec<S>::Int bits = 0;
  for (int i = 0; i < Vec<S>::kLanes; ++i) bits |= m.v[i];
  return bits != 0;
#endif
}

template <class S>
DRSL_FN S reduce_add(Vec<S> x) {
  S sum = S(0);
  if constexpr (Vec<S>::kLanes >= 4) {
    // Halves first, so that the additions of one level are independent.
    S part[Vec<S>::kLanes];
    memcpy(part, &x.v, sizeof(part));
    for (int n = Vec<S>::kLanes / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    sum = part[0];
  } else {
    for (int i = 0; i < Vec<S>::kLanes; ++i) sum += x.v[i];
  }
  return sum;
}

// The largest lane; NaN only if every comparison with it was lost, so do not use it to look for NaN.
template <class S>
DRSL_FN S reduce_max(Vec<S> x) {
  S part[Vec<S>::kLanes];
  memcpy(part, &x.v, sizeof(part));
  for (int n = Vec<S>::kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
  return part[0];
}

#if defined(__AVX512F__)
template <> DRSL_FN float reduce_add(Vec<float> x) { return _mm512_reduce_add_ps(x.v); }
template <> DRSL_FN double reduce_add(Vec<double> x) { return _mm512_reduce_add_pd(x.v); }
template <> DRSL_FN float reduce_max(Vec<float> x) { return _mm512_reduce_max_ps(x.v); }
template <> DRSL_FN double reduce_max(Vec<double> x) { return _mm512_reduce_max_pd(x.v); }
#endif

// ---------------------------------------------------------------------------------------------------------
// exp, log: about one unit in the last place. Coefficients: polynomials.py.

template <class S>
struct Tables;

template <>
struct Tables<float> {
  static constexpr float kExp[] = {0.5f, 0.1666657599f, 0.04166655336f, 0.008363345811f, 0.00139263919f};
#if defined(__AVX512F__)
  static constexpr float kExpNarrow[] = {0.500009793f, 0.1666686253f};  // on |r| <= ln(2)/32
#else
  static constexpr float kExpNarrow[] = {0.5f, 0.1666784077f, 0.04166862349f};  // on |r| <= ln(2)/16
#endif
  static constexpr float kLog1p[] = {0.6666666665f, 0.4000001077f, 0.2857030572f,
                                     0.2226471121f, 0.1746470247f, 0.2078761686f};
  static constexpr float kLog2e = 1.44269504089f;
  // ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLowest = -104.0f;     // exp of it rounds to 0
  static constexpr float kSmallestNormalLog = -87.33654f;
  static constexpr float kHighest = 88.72283f;  // exp of more overflows
  static constexpr int kMantissaBits = 23, kBias = 127;
};

template <>
struct Tables<double> {
  static constexpr double kExp[] = {0.50000000000000010509,     0.16666666666666667475,   0.041666666666623170383,
                                    0.0083333333333299881996,   0.0013888888917690603539, 0.00019841269863420350263,
                                    0.000024801520557017827897, 2.7557267891745530364e-6, 2.7620438948634418648e-7,
                                    2.5100655036066590055e-8};
  static constexpr double kLog1p[] = {0.66666666666666666661,  0.40000000000000015478,  0.28571428571421943297,
                                      0.22222222223331986844,  0.18181818086005655452,  0.15384620253804162399,
                                      0.1333317694913817845,   0.1176799776724103616,   0.10480399234365274052,
                                      0.099420248965547346282, 0.063341108517702453959, 0.15231262619428984839};
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLowest = -746.0;
  static constexpr double kSmallestNormalLog = -708.39641853226408;
  static constexpr double kHighest = 709.78271289338397;
  static constexpr int kMantissaBits = 52, kBias = 1023;
};

template <class S, int N>
DRSL_FN Vec<S> horner(Vec<S> x, const S (&c)[N]) {
  Vec<S> sum(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = sum * x + Vec<S>(c[i]);
  return sum;
}

// exp(r) - 1 for |r| <= ln(2)/2, with small relative error.
template <class S>
DRSL_FN Vec<S> expm1_near_zero(Vec<S> r) {
  return r + (r * r) * horner(r, Tables<S>::kExp);
}

// exp for x <= Tables::kHighest. NaN stays NaN, -inf gives 0.
template <class S>
DRSL_FN Vec<S> exp_(Vec<S> x) {
  using K = Tables<S>;
  const Vec<S> clamped = max_(Vec<S>(K::kLowest), x);
  const Vec<S> shifted = clamped * Vec<S>(K::kLog2e) + Vec<S>(K::kRound);
  const Vec<S> n = shifted - Vec<S>(K::kRound);
  const Vec<S> r = (clamped - n * Vec<S>(K::kLn2High)) - n * Vec<S>(K::kLn2Low);
  const Vec<S> fraction = Vec<S>(S(1)) + expm1_near_zero(r);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return Vec<S>(_mm512_scalef_ps(fraction.v, n.v));
  else return Vec<S>(_mm512_scalef_pd(fraction.v, n.v));
#else
  // Without a scaling instruction results below the smallest normal number are flushed to 0.
  using Words = typename Vec<S>::Words;
  const Words exponent = ((Words)shifted.v - (Words)Vec<S>(K::kRound).v) << K::kMantissaBits;
  const Vec<S> scaled((typename Vec<S>::Native)((Words)fraction.v + exponent));
  return select(x < Vec<S>(K::kSmallestNormalLog), Vec<S>(S(0)), scaled);
#endif
}

// exp for x <= 0, in the loops that do little else. NaN may give any number.
template <class S>
DRSL_FN Vec<S> exp_of_fall(Vec<S> x) {
  return exp_(x);
}

#if defined(__AVX512F__) || defined(__AVX2__)
// x = (m + j/s) ln 2 + r with |r| <= ln(2)/(2s), s the number of lanes: exp(x) = 2^m 2^(j/s) exp(r), the middle factor
// from a register. A polynomial for r this small takes a fifth (AVX-512) or two fifths (AVX2) less time than exp_.
template <>
DRSL_FN Vec<float> exp_of_fall(Vec<float> x) {
  using K = Tables<float>;
  constexpr int kSteps = Vec<float>::kLanes;
#if defined(__AVX512F__)
  // As integers numbers below 0 rise from -0 down to -inf: this is a maximum, on an execution port that is free.
  const __m512i lowest = _mm512_castps_si512(_mm512_set1_ps(K::kLowest));
  x = Vec<float>(_mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(x.v), lowest)));
#endif
  const Vec<float> round(K::kRound / kSteps);  // adding it leaves s m + j in the low bits
  const Vec<float> shifted = x * Vec<float>(K::kLog2e) + round;
  const Vec<float> n = shifted - round;
  const Vec<float> r = (x - n * Vec<float>(K::kLn2High)) - n * Vec<float>(K::kLn2Low);
  const Vec<float> part = r + (r * r) * horner(r, K::kExpNarrow);
#if defined(__AVX512F__)
  const __m512 powers = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                       1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                       1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f);
  const Vec<float> power(_mm512_permutexvar_ps(_mm512_castps_si512(shifted.v), powers));
  return Vec<float>(_mm512_scalef_ps((power + power * part).v, n.v));
#else
  // The bits of 2^(j/8), less j where adding s m + j to the exponent will bring it.
  constexpr int kShift = K::kMantissaBits - 3;
  const __m256i powers = _mm256_setr_epi32(
      0x3f800000, 0x3f8b95c2 - (1 << kShift), 0x3f9837f0 - (2 << kShift), 0x3fa5fed7 - (3 << kShift),
      0x3fb504f3 - (4 << kShift), 0x3fc5672a - (5 << kShift), 0x3fd744fd - (6 << kShift), 0x3feac0c7 - (7 << kShift));
  const __m256i steps = _mm256_castps_si256(shifted.v);
  const __m256i bits = _mm256_add_epi32(_mm256_permutevar8x32_epi32(powers, steps), _mm256_slli_epi32(steps, kShift));
  const Vec<float> power(_mm256_castsi256_ps(bits));
  return select(x < Vec<float>(K::kSmallestNormalLog), Vec<float>(0.0f), power + power * part);
#endif
}
#endif

// exp(x) - 1 for x <= 0.
template <class S>
DRSL_FN Vec<S> expm1_(Vec<S> x) {
  return select(x > Vec<S>(S(-0.34)), expm1_near_zero(x), exp_(x) - Vec<S>(S(1)));
}

// log(1 + f) for f in [-1/2, 1], with small relative error: 2 atanh(s), s = f/(2+f), with the leading f - f^2/2
// kept apart so that the rounding of s does not count.
template <class S>
DRSL_FN Vec<S> log1p_(Vec<S> f) {
  const Vec<S> s = f / (Vec<S>(S(2)) + f);
  const Vec<S> t = s * s;
  const Vec<S> rest = t * horner(t, Tables<S>::kLog1p);
  const Vec<S> half = Vec<S>(S(0.5)) * f * f;
  return f - (half - s * (half + rest));
}

// log for x = 0, x normal and positive, or NaN.
template <class S>
DRSL_FN Vec<S> log_(Vec<S> x) {
  using K = Tables<S>;
  using Bits = typename Vec<S>::Bits;
  using Native = typename Vec<S>::Native;
  using Int = typename Vec<S>::Int;
  const Int one = (Int)K::kBias << K::kMantissaBits;
  // x = 2^e m with m in [0.75, 1.5): subtracting the bits of 0.75 puts the carry where m would leave that range.
  const Int start = one - (Int(1) << (K::kMantissaBits - 1));
  const Bits exponent = ((Bits)x.v - start) >> K::kMantissaBits;
  const Vec<S> m = (Native)((Bits)x.v - (exponent << K::kMantissaBits));
  const Vec<S> e = __builtin_convertvector(exponent, Native);
  const Vec<S> part = log1p_(m - Vec<S>(S(1)));
  const Vec<S> sum = e * Vec<S>(K::kLn2High) + (e * Vec<S>(K::kLn2Low) + part);
  const Vec<S> safe = select(x == Vec<S>(S(0)), -infinity<Vec<S>>(), sum);
  return select(x == x, safe, x);
}

}  // namespace DRSL_ISA
}  // namespace drsl
