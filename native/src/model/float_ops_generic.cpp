// Float operations, 128-bit vectors: the baseline of x86-64 (SSE2) and AArch64 (NEON).
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bitdistill/float_ops.h"

#pragma GCC optimize("fp-contract=off")

#define BD_WIDTH 4
#include "float_ops.inc"

namespace bitdistill {

const FloatOps& float_ops_generic() {
  static const FloatOps table = make_table("generic");
  return table;
}

}  // namespace bitdistill
