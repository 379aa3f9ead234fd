// The body of every path: QK_PATH names its table, LANES its vectors.
namespace qk {
namespace {
#include "decode_simd.h"
//
#include "decode_rows.h"
//
#include "decode_dense.h"
//
#include "decode_attention.h"
//
#include "kv_pages_path.h"
//
#include "kv_pages_wide.h"
}  // namespace
extern const Math QK_PATH = {widen, add_norm, swiglu, rotate, hadamard, append, dense, dense_each, attend, kv_pages};
}  // namespace qk
