#include "linear.h"
namespace qk { const Path path_avx512 = path_avx2; }
