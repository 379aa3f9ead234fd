// Any machine: vectors of 16 bytes, which x86-64 and arm64 both have.
#include "common.h"
#include "decode_math.h"
#define LANES 4
#define QK_PATH math_portable
#include "decode_path.h"
