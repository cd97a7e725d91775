"""What a CUDA graph cannot hold, found without a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NothingReadBack(TorchDispatchMode):
    """Fails where a step asks a tensor for its value or lets a shape hang on one: no CUDA graph can hold that."""

    aten = torch.ops.aten
    reads = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.overloadpacket not in self.reads, f"{func} reads a tensor back"
        boolean = func is self.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        assert not boolean, "the shape of an index by bool hangs on its values"
        return func(*args, **(kwargs or {}))
