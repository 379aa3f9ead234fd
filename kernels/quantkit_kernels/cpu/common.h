// C++ interface of the linear kernels, for native code that owns its parallel region (decode*.cpp).
#pragma once

#include "quantkit_cpu.h"

namespace qk {

enum Type : int { F32 = 0, BF16 = 1, F16 = 2 };
enum Compute : int {
    FLOAT = 0,       // activations as 15-bit (fp32: 29-bit) block integers, floats for tables
    INT8_GROUP = 1,  // int8 activations, one scale per token and chunk of min(group, 128) columns
    INT8_TOKEN = 2,  // int8 activations, one scale per token
    HALVES = 3,      // as FLOAT, but fp32 activations stand for halves (a bf16 or fp16 model's) and keep 15 bits
    INT8_RANGE = 4,  // int8 activations, one scale per token or a stored one, as compressed-tensors rounds
    FP8_RANGE = 5,   // as FLOAT, of activations rounded to FP8, one scale per token or a stored one
    FP8_GROUP = 6,   // the same, one scale per token and 128 columns
};
enum Table : int { INTEGERS = 0, NF4 = 1, FP8 = 2, FP4 = 3 };
enum ScaleType : int { SCALES_F16 = 0, SCALES_F32 = 1, SCALES_F8 = 2 };
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

inline bool is_int8(int compute) { return compute == INT8_GROUP || compute == INT8_TOKEN || compute == INT8_RANGE; }
inline bool is_fp8(int compute) { return compute == FP8_RANGE || compute == FP8_GROUP; }

using Weight = ::qk_weight;

constexpr int ROWS = 16;  // output rows of a unit

inline bool per_channel(const Weight &w) { return w.group == w.k; }
// Whether codes stand for fp32 values that are multiplied as such; else they are integers, those of FP4 half units.
inline bool in_floats(const Weight &w) { return w.table == NF4 || w.table == FP8; }
// Groups of a row in a unit: FP4 has no zero points, whose place takes more scales.
inline int parts(const Weight &w) {
    if (w.table != FP4 || per_channel(w) || w.group > 32) return 1;
    return w.scale_type == SCALES_F8 ? 4 : 2;
}
inline int chunk(const Weight &w) { return per_channel(w) || w.group % 128 == 0 ? 128 : w.group * parts(w); }
inline int chunks(const Weight &w) { return (w.k + chunk(w) - 1) / chunk(w); }
inline int row_blocks(const Weight &w) { return (w.n + ROWS - 1) / ROWS; }
inline size_t code_bytes(const Weight &w) { return size_t(chunk(w)) * w.bits * ROWS / 8; }
inline size_t scale_bytes(const Weight &w) { return w.scale_type == SCALES_F32 ? 128 : 64; }
inline size_t unit_bytes(const Weight &w) { return code_bytes(w) + (per_channel(w) ? 0 : scale_bytes(w)); }
inline size_t block_bytes(const Weight &w) {
    return chunks(w) * unit_bytes(w) + (per_channel(w) ? scale_bytes(w) : 0);
}

bool supported(const Weight &w);
// Whether activations prepared for one weight are those that the other one wants.
inline bool same_activations(const Weight &a, const Weight &b) {
    const bool sizes = a.k == b.k && chunk(a) == chunk(b) && a.table == b.table;
    return sizes && a.input_scale == b.input_scale && a.input_zero == b.input_zero;
}
const float *table_values(int table);  // the fp32 value of every code of a table, 16 or 256
size_t weight_bytes(const Weight &w);                              // of the units
size_t scratch_bytes(const Weight &w, int64_t m, int compute);     // of the prepared activations

// Called by every thread of an open parallel region, with a barrier between the two. x [m, k] and y [m, n] with
// row strides ldx, ldy in elements; scratch 64-byte aligned. A scratch prepared for one weight serves every
// weight that reads the same activations. Each part computes its own range of output rows.
void prepare_part(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                  int part, int parts);
void run_part(const Weight &w, const void *scratch, int64_t m, int compute, void *y, int y_type, int64_t ldy,
              int part, int parts);
// The same, of row blocks [b0, b1).
void run_blocks_of(const Weight &w, const void *scratch, int64_t m, void *y, int y_type, int64_t ldy, int b0, int b1);

}  // namespace qk
