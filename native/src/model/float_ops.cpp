#include "bitdistill/float_ops.h"

namespace bitdistill {

const FloatOps& float_ops(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
    case Isa::kAvxVnni: return float_ops_avx2();
    case Isa::kAvx512Vnni: return float_ops_avx512();
#endif
    default: return float_ops_generic();
  }
}

}  // namespace bitdistill
