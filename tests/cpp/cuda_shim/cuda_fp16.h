// IEEE half precision for the stand-in of the CUDA runtime: round to nearest, ties to even.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent == 31
                         ? (mantissa ? NAN : INFINITY)
                         : ldexpf(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520) return {uint16_t(sign | 0x7c00)};
  // Below 2^-14 the spacing stays 2^-24. Where rounding reaches the next power of two, it carries into the exponent.
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const int units = int(nearbyintf(ldexpf(size, 10 - exponent)));
  return {uint16_t(sign | (units + (exponent + 14) * 1024))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
