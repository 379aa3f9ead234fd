#include "linear.h"
namespace qk { const Path path_amx = path_avx2; }
