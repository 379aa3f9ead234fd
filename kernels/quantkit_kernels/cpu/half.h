// fp16 and bf16 to fp32 and back, round to nearest even, in plain integers.
// Everything is static: each source that includes this is compiled for its own instruction set, and a merged
// inline function would carry one's instructions into another.
#pragma once

#include <cstdint>
#include <cstring>

namespace qk {

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float bfloat_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

static inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);  // a NaN stays one
}

static inline float half_to_float(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000) << 16, magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Subnormals count units of 2^-24 and are made without one in float: a caller may have them flushed.
    const float small = float(int32_t(magnitude)) * bits_to_float(0x33800000);
    const uint32_t bits = magnitude < 0x400 ? float_to_bits(small) : (magnitude << 13) + 0x38000000;
    return bits_to_float(bits | sign);
}

static inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (magnitude < 0x38800000)  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
        return sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
    return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace qk
