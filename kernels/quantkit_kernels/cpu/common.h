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
};
enum Table : int { INTEGERS = 0, NF4 = 1, FP8 = 2 };
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

inline bool is_int8(int compute) { return compute == INT8_GROUP || compute == INT8_TOKEN || compute == INT8_RANGE; }

using Weight = ::qk_weight;

constexpr int ROWS = 16;  // output rows of a unit

inline bool per_channel(const Weight &w) { return w.group == w.k; }
inline int chunk(const Weight &w) { return per_channel(w) || w.group % 128 == 0 ? 128 : w.group; }
inline int chunks(const Weight &w) { return (w.k + chunk(w) - 1) / chunk(w); }
inline int row_blocks(const Weight &w) { return (w.n + ROWS - 1) / ROWS; }
inline size_t code_bytes(const Weight &w) { return size_t(chunk(w)) * w.bits * ROWS / 8; }
inline size_t scale_bytes(const Weight &w) { return w.wide_scales ? 128 : 64; }
inline size_t unit_bytes(const Weight &w) { return code_bytes(w) + (per_channel(w) ? 0 : scale_bytes(w)); }
inline size_t block_bytes(const Weight &w) {
    return chunks(w) * unit_bytes(w) + (per_channel(w) ? scale_bytes(w) : 0);
}

bool supported(const Weight &w);
const float *table_values(int table);  // the fp32 value of every code of a table, 16 or 256
size_t weight_bytes(const Weight &w);                              // of the units
size_t scratch_bytes(const Weight &w, int64_t m, int compute);     // of the prepared activations

// Called by every thread of an open parallel region, with a barrier between the two. x [m, k] and y [m, n] with
// row strides ldx, ldy in elements; scratch 64-byte aligned. A scratch prepared for one weight serves every
// weight of the same k, group and table. Each part computes its own range of output rows.
void prepare_part(const Weight &w, const void *x, int x_type, int64_t ldx, int64_t m, int compute, void *scratch,
                  int part, int parts);
void run_part(const Weight &w, const void *scratch, int64_t m, int compute, void *y, int y_type, int64_t ldy,
              int part, int parts);

}  // namespace qk
