// Vectors of LANES floats through the compiler's vector extension (gcc, clang): one source for every
// instruction set. Included once per path, after its target is set, inside a namespace of its own. No standard
// templates here: an instance compiled for a wider target could replace that of another file.

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef float vf_at __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct i8 {
    int8_t code;
};
struct fp8 {
    uint8_t bits;
};
struct i4 {  // two codes
    uint8_t bits;
};

// The address `count` elements on; count is even.
template <class T>
inline const T *on(const T *p, int64_t count) {
    return p + count;
}
inline const i4 *on(const i4 *p, int64_t count) { return p + count / 2; }

// FUSED, WIDEN16 and WIDEN_F16 are a path's instructions for what the compiler does not find by itself.
inline vf load(const float *p) { return *(const vf_at *)p; }
#if defined(WIDEN16)  // gcc 12 makes four instructions of __builtin_convertvector
inline vu widen16(const void *p) { return (vu)WIDEN16(p); }
#else
inline vu widen16(const void *p) { return __builtin_convertvector(*(const vh_at *)p, vu); }
#endif
inline vf load(const bf16 *p) { return (vf)(widen16(p) << 16); }
#if defined(WIDEN_F16)
inline vf load(const f16 *p) { return (vf)WIDEN_F16(p); }
#else
// Exponent and mantissa moved into place and the exponent's bias corrected by a product; exact for all finite.
inline vf load(const f16 *p) {
    const vu h = widen16(p);
    const vf magnitude = (vf)((h & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | (h & 0x8000) << 16);
}
#endif
#if defined(WIDEN8)
inline vf load(const i8 *p) { return (vf)WIDEN8(p); }
#else
inline vf load(const i8 *p) {
    vi wide = {};
    for (int i = 0; i < LANES; i++) wide[i] = p[i].code;
    return __builtin_convertvector(wide, vf);
}
#endif
// An FP8 number over 256: sign, exponent and mantissa in the place of fp16's, whose bias is 8 more. Exact.
#if defined(WIDEN_FP8)
inline vf load(const fp8 *p) { return (vf)WIDEN_FP8(p); }
#else
inline vf load(const fp8 *p) {
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; i++) halves[i] = (uint16_t)((p[i].bits & 0x80) << 8 | (p[i].bits & 0x7f) << 7);
    return load((const f16 *)halves);
}
#endif
// LANES codes of 4 bits, the first one lowest: the word that holds it in every lane, and its place there.
inline vu nibbles(const void *p) {
#if LANES == 4
    uint16_t word;
    __builtin_memcpy(&word, p, 2);
    return (vu){} + word;
#elif LANES == 8
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return (vu){} + word;
#else
    uint32_t a, b;
    __builtin_memcpy(&a, p, 4);
    __builtin_memcpy(&b, (const char *)p + 4, 4);
    return (vu){a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
#endif
}
inline vu nibble_places() {
#if LANES == 4
    return (vu){0, 4, 8, 12};
#elif LANES == 8
    return (vu){0, 4, 8, 12, 16, 20, 24, 28};
#else
    return (vu){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
#endif
}
inline vf load(const i4 *p) {  // codes less 8
    return __builtin_convertvector((vi)((nibbles(p) >> nibble_places()) & 15) - 8, vf);
}
inline void store(float *p, vf v) { *(vf_at *)p = v; }

inline float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline float one(const float *p) { return *p; }
inline float one(const bf16 *p) { return from_bits((uint32_t)p->bits << 16); }
inline float one(const f16 *p) {
    const float magnitude = from_bits((uint32_t)(p->bits & 0x7fff) << 13) * 0x1p112f;
    return p->bits & 0x8000 ? -magnitude : magnitude;
}
inline void put(float *p, float value) { *p = value; }
inline void put(bf16 *p, float value) {  // to nearest, ties to even
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    p->bits = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// a b + c, rounded once where the target can (the build does not let the compiler contract).
inline vf fused(vf a, vf b, vf c) {
#if defined(FUSED)
    return (vf)FUSED(a, b, c);
#else
    return a * b + c;
#endif
}

inline vf all(float value) { return value - (vf){}; }
inline float sum(vf v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}
inline float largest(vf v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline vf smaller(vf a, vf b) { return a < b ? a : b; }

// e^x to 2 units in the last place; 0 below -87 (-inf too), e^88 above 88.
inline vf exponential(vf x) {
    const vi kept = x > all(-87.0f);
    x = larger(smaller(x, all(88.0f)), all(-87.0f));
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (x * 1.44269504f + shift) - shift;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    vf p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p * r, r, r + 1.0f);
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)power) & kept);
}
