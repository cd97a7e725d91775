// Float operations, 256-bit vectors.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bitdistill/float_ops.h"

#pragma GCC optimize("fp-contract=off")
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define BD_WIDTH 8
#include "float_ops.inc"

namespace bitdistill {

const FloatOps& float_ops_avx2() {
  static const FloatOps table = make_table("avx2");
  return table;
}

}  // namespace bitdistill
#endif
