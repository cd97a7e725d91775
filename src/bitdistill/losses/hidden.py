"""Distance of the student's hidden states to the teacher's, for stages 2 and 3.

Not in the paper. The student begins as the teacher with ternary weights, block by block, so each block's output has a
counterpart; matching them gives every block a gradient of its own instead of one through all later blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative_error(student_BTH: Tensor, teacher_BTH: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Sum over tokens (those of the mask, if there is one) of ||h_S - h_T||^2 / ||h_T||^2, a float32 scalar.

    Relative token by token: a few tokens (such as the first) have outputs a hundred times larger than others, and would
    be all that a plain mean sees.
    """
    student, teacher = student_BTH.to(torch.float32), teacher_BTH.to(torch.float32)
    error = (student - teacher).square().sum(-1)
    relative = error / teacher.square().sum(-1).clamp_min(1e-6)
    return (relative if mask_BT is None else torch.where(mask_BT, relative, 0.0)).sum()


def block_errors_sum(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask_BT: Tensor | None = None,
    *,
    error: Callable[..., Tensor] = relative_error,
) -> Tensor:
    """`relative_error` of every block's output, mean over blocks and sum over tokens.

    Args:
        error: `relative_error`, or a compiled form of it.

    Raises:
        ValueError: the models differ in the number of blocks.
    """
    errors = [error(s, t, mask_BT) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(errors).mean()
