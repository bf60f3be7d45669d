// The 16-bit formats, one number at a time and by their definition: what the vector conversions are compared with.
// For test_simd.cpp and test_kernels.cpp.
#pragma once

#include <cmath>
#include <cstdint>

// A binary format with an implicit leading bit: IEEE half precision and bfloat16.
struct Format {
  int mantissa_bits, exponent_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int smallest_exponent() const { return 1 - bias(); }
  double largest() const { return std::ldexp(2 - std::ldexp(1.0, -mantissa_bits), bias()); }

  double widen(uint16_t bits) const {
    const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, smallest_exponent() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }

  // Round to nearest, ties to even.
  uint16_t narrow(double x) const {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    const int infinite = ((1 << exponent_bits) - 1) << mantissa_bits;
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinite | 1);
    const double size = std::fabs(x);
    if (size == 0) return static_cast<uint16_t>(sign);
    if (std::isinf(x)) return static_cast<uint16_t>(sign | infinite);
    const int exponent = std::ilogb(size) < smallest_exponent() ? smallest_exponent() : std::ilogb(size);
    // In units of the last place. A carry into the next power of two carries into the exponent field by itself.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, mantissa_bits - exponent)));
    const int magnitude = units + ((exponent - smallest_exponent()) << mantissa_bits);
    return static_cast<uint16_t>(sign | (magnitude < infinite ? magnitude : infinite));
  }
};

constexpr Format kHalf{10, 5}, kBFloat16{7, 8};
