// What the decoder computes itself, between the packed linears, as a table of functions per instruction set.
// decode_portable.cpp, decode_avx2.cpp and decode_avx512.cpp compile the same source (decode_simd.h,
// decode_rows.h, decode_dense.h, decode_attention.h, kv_pages_path.h, kv_pages_wide.h) for theirs.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common.h"
#include "kv_pages.h"

namespace qk {

constexpr int PAGE = 128;  // positions of one page of the cache
constexpr int PAD = 16;    // a head's values are padded to a multiple: the widest vector, in floats

// What a cache holds. CACHE_I8, CACHE_I4: integers with a scale per position and head, s = max(max|x| / 127 or 7, 1e-6),
// halves rounded away from zero. CACHE_FP8: E4M3 of x / s with one s per head.
enum Cache { CACHE_F32 = 0, CACHE_BF16 = 1, CACHE_I8 = 8, CACHE_I4 = 9, CACHE_FP8 = 10 };

inline size_t cache_bits(int type) {
    return type == CACHE_F32 ? 32 : type == CACHE_BF16 ? 16 : type == CACHE_I4 ? 4 : 8;
}
inline bool scaled_by_position(int type) { return type == CACHE_I8 || type == CACHE_I4; }

// Room for exact first positions, and numbers of one head's.
inline int sink_places(int sinks) { return (sinks + PAD - 1) / PAD * PAD; }
inline size_t exact_floats(int sinks, int head_dim, int stride) {
    return (size_t)sink_places(sinks) * (head_dim + stride);
}

// Attention of m tokens over one layer's cache. Page p holds positions [p PAGE, (p + 1) PAGE); at `offset` it
// has K [kv_heads, head_dim, PAGE], V [kv_heads, PAGE, stride], both of `type`, and, where positions have scales, those
// of K and of V, fp32 [kv_heads, PAGE] each. Codes of 4 bits are stored + 8, the even one in the low half of a byte.
struct Attention {
    const float *q;  // [m, heads * head_dim] in rows of ldq
    int64_t ldq;
    float *out;  // the same in rows of ldo
    int64_t ldo;
    char *const *pages;
    size_t offset;
    int type;                         // Cache
    const float *k_scales, *v_scales;  // [kv_heads] of FP8
    int kv_heads, group, head_dim, stride;  // group: query heads of one kv head
    int64_t position, m;              // of the first token, which is in the cache already like the others
    int window;                       // 0: all
    float scale;
    float *exact;  // of each head the first `sinks` positions, which pages leave out: K [head_dim, sink_places], then V
    int sinks;     // [sink_places, stride]
};

struct Math {
    // dst [n] fp32 from n values of `type`
    void (*widen)(const void *src, int type, float *dst, int64_t n);
    // x += y (if y), out = norm(x) weight; out may be x, x and out [n]
    void (*add_norm)(float *x, const float *y, const float *weight, float eps, float *out, int64_t n);
    // out = silu(gate) up
    void (*swiglu)(const float *gate, const float *up, float *out, int64_t n);
    // rotate x [dim] in place by cos, sin [dim], halves against each other
    void (*rotate)(float *x, const float *cos, const float *sin, int dim);
    // x [dim] times the orthonormal Hadamard matrix of Sylvester's order; dim is a power of two
    void (*hadamard)(float *x, int dim);
    // k, v [head_dim] of one head at `position`, to where Attention reads them
    void (*append)(const Attention &, int head, int64_t position, const float *k, const float *v);
    // rows [first, last) of y = x W^T + bias; W [n, k] of `type`
    void (*dense)(const void *w, int type, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m,
                  float *y, int64_t ldy, int64_t first, int64_t last);
    // the same, every token summed in the order of one alone
    void (*dense_each)(const void *w, int type, const float *bias, int64_t k, const float *x, int64_t ldx, int64_t m,
                       float *y, int64_t ldy, int64_t first, int64_t last);
    // part's share of the attention; scratch: attention_floats() of its own
    void (*attend)(const Attention &, float *scratch, int part, int parts);
    // part's share of attention over pages; scratch: kv_pages_floats() of its own
    void (*kv_pages)(const qk_kv_pages &, float *scratch, int part, int parts);
};

extern const Math math_portable, math_avx2, math_avx512;

static inline const Math &math_of(int isa) {
#if defined(__x86_64__)
    if (isa >= AVX512) return math_avx512;
#if !defined(QK_EMULATE)
    if (isa == AVX2) return math_avx2;
#endif
#endif
    return (void)isa, math_portable;
}

// Query vectors that go over the cache together: some tokens times some query heads of one kv head.
constexpr int TILE = 32;
inline int tile_rows(int group) { return group > TILE ? group : TILE; }
inline size_t attention_floats(int group, int head_dim, int stride) {
    return (size_t)tile_rows(group) * (head_dim + stride + PAGE + 2) + (size_t)PAGE * (head_dim + stride);
}

}  // namespace qk
