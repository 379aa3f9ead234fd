// C ABI of attention over pages of a quantized KV cache, and what its parts need of a path (decode_math.h).
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Codes of a page, [batch, kv_heads, page, dim]: int8; E4M3; two signed codes of 4 bits a byte, the even one low.
enum { QK_KV_INT8 = 0, QK_KV_FP8 = 1, QK_KV_INT4 = 2 };
enum { QK_MASK_CAUSAL = 0, QK_MASK_BOOL = 1, QK_MASK_FP32 = 2 };

// Keys or values. scales: of each page, [batch, kv_heads, page]; null: `stored` [kv_heads] instead.
typedef struct {
    const void *const *codes;
    const float *const *scales;
    const float *stored;
    int32_t type, dim;  // 4 bits: dim is even
} qk_kv_side;

// Rows of queries q [batch, kv_heads, rows, k.dim], of token r modulo `tokens` each, and their running softmax: largest
// score and sum of exponentials [batch, kv_heads, rows], weighted values [batch, kv_heads, rows, v.dim].
typedef struct {
    const float *q;
    qk_kv_side k, v;
    const void *mask;  // [.., places] of a batch row, query head and token by the strides, in elements
    int64_t mask_batch, mask_head, mask_token;
    float *top, *mass, *out;
    int64_t batch, kv_heads, rows, tokens;
    int64_t page, places;  // places of a page, and those to read from the first page on
    int64_t position;      // causal: token t sees places up to position + t
    int32_t mask_type;
    float softcap;         // 0: none
} qk_kv_pages;

// Take the places in. 0; 1: no path can run, or a type is unknown; 2: no memory, and nothing was done.
int qk_kv_attend(const qk_kv_pages *pages, int threads);

#ifdef __cplusplus
}

namespace qk {

constexpr int KV_BLOCK = 64;       // places at a time
constexpr int KV_WIDE_ROWS = 8;    // from so many rows on, a block of codes is made floats once
constexpr int KV_WIDE_TILE = 128;  // rows that go over it together, at most

// A head's values as floats are padded to a multiple of the widest vector.
inline int64_t kv_stride(int64_t dim) { return (dim + 15) / 16 * 16; }

inline size_t kv_pages_floats(const qk_kv_pages &a) {
    const size_t stride = kv_stride(a.v.dim);
    return KV_WIDE_TILE * (KV_BLOCK + stride) + KV_BLOCK * (a.k.dim + stride + 2);
}

bool kv_pages_agree(int isa);  // whether a path computes what the portable one does

}  // namespace qk
#endif
