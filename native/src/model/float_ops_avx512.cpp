// Float operations, 512-bit vectors.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bitdistill/float_ops.h"

#pragma GCC optimize("fp-contract=off")
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#define BD_WIDTH 16
#include "float_ops.inc"

namespace bitdistill {

const FloatOps& float_ops_avx512() {
  static const FloatOps table = make_table("avx512");
  return table;
}

}  // namespace bitdistill
#endif
