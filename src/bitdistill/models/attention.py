"""Causal attention without mask tensors, for training on full or right-padded rows.

transformers makes its mask outside the layers and, to find packed rows, reads position ids back to the host in
every forward pass. Rows here are full or padded on the right, so causality is all the masking there is: this
attention asks sdpa for it directly, and FlashAttention for the window of sliding layers. No mask is made and nothing
is read back, which also lets a whole step be captured in a CUDA graph. Elsewhere than on a GPU in half precision, a
window is a mask.

Masks are slow on a GPU, and cuDNN, which sdpa prefers on Hopper since torch 2.11, is reported to give NaN in the
gradient of the queries with one (pytorch/pytorch#196678). Without one it is right (docs/log.md, run 16).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill.errors import ModelError
from bitdistill.quant.linear import out_dtype_of

log = logging.getLogger("bitdistill")
CAUSAL_NAME = "bitdistill_causal"
"""Registered as an attention, not as a mask: transformers makes no mask for a name it has no mask for."""
DECODING_NAME = "bitdistill_decoding"
ATTENTION_ERROR = 0.03
"""In norm, of attention in bfloat16; its roundings make less than 0.01."""
LONGEST_CHECKED_WINDOW = 512
TIMED_TOKENS = 32_768
"""Backends are timed on so many tokens: a batch whose kernels end before the next ones are launched tells nothing."""


def in_compute_dtype(*states: Tensor) -> tuple[Tensor, ...]:
    """States as sdpa takes them: under autocast the rotary embedding leaves queries and keys in float32."""
    return tuple(x.to(out_dtype_of(x)) for x in states)


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    row_starts: Tensor | None = None,
    longest_row: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa over [B, H, T, D] queries; position t sees t - sliding_window + 1 to t, or 0 to t without a window.

    With `row_starts` (`Batch.starts_R`) the one row holds packed rows of at most `longest_row` tokens, which do not
    see one another.
    """
    query, key, value = in_compute_dtype(query, key, value)
    if row_starts is not None:
        scaling = kwargs.get("scaling")
        return packed_attention(query, key, value, row_starts, longest_row, scaling, sliding_window), None
    tokens = query.shape[2]
    if sliding_window is not None and tokens > sliding_window:
        if _takes_flash(query):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return _flash(q, k, v, None, tokens, kwargs.get("scaling"), sliding_window), None
        position = torch.arange(tokens, device=query.device)
        attention_mask = _seen(position, sliding_window)[None, None]
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _takes_flash(query: Tensor) -> bool:
    """Whether FlashAttention itself can be called (sdpa fills up other head sizes)."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _seen(position: Tensor, window: int | None) -> Tensor:
    """bool [T, T]: what the position of a row sees of the positions of the columns."""
    distance = position[:, None] - position[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor | None,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """FlashAttention over [B, T, H, D], or [T, H, D] with `row_starts`; keys may have fewer heads."""
    left = None if window is None or window >= longest else window - 1
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        row_starts,
        row_starts,
        longest,
        longest,
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=left,
        window_size_right=None if left is None else 0,
    )
    return out  # type: ignore[no-any-return]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    longest_row: int,
    scaling: float | None,
    window: int | None = None,
) -> Tensor:
    """Causal attention [1, T, H, D] of packed rows: FlashAttention of variable lengths, or a mask on a CPU."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if _takes_flash(query):
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        return _flash(q, k, v, row_starts, longest_row, scaling, window)[None]
    position = torch.arange(query.shape[2], device=query.device, dtype=row_starts.dtype)
    row = torch.searchsorted(row_starts[1:].contiguous(), position, right=True)
    mask = (row[:, None] == row[None, :]) & _seen(position, window)
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return out.transpose(1, 2)


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """sdpa, but for one new token a row over a cache: two products in which keys and values are read once.

    The queries [B, H, 1, D] of a group share their keys [B, G, T, D], where sdpa with a mask copies these for every
    head or runs a kernel made for many queries. The softmax is in float32.
    """
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens != 1:
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    grouped = query.view(rows, groups, heads // groups, size)
    scores = (grouped @ key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:  # bool [B, 1, 1, T]
        scores = scores.masked_fill(~attention_mask[..., : key.shape[2]], torch.finfo(scores.dtype).min)
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.view(rows, 1, heads, size), None


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_NAME, causal_attention)
ALL_ATTENTION_FUNCTIONS.register(DECODING_NAME, decoding_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(DECODING_NAME, sdpa_mask)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Inside, a model that attends by sdpa decodes by `decoding_attention`; others stay as they are."""
    with _attending([model] if model.config._attn_implementation == "sdpa" else [], DECODING_NAME):
        yield


@contextlib.contextmanager
def _attending(models: Sequence[Any], name: str) -> Iterator[None]:
    """Inside, models that attend by sdpa do so by another registered attention."""
    try:
        for model in models:
            model.config._attn_implementation = name
        yield
    finally:
        for model in models:
            model.config._attn_implementation = "sdpa"


@contextlib.contextmanager
def causal_only(*models: Any, packed: bool = False) -> Iterator[None]:
    """Inside, the models attend by `causal_attention`: for forward passes without cache on right-padded rows.

    On a GPU it is first compared with plain float32 arithmetic (once a process and shape).

    Args:
        packed: rows will be packed; that is compared as well.

    Raises:
        ModelError: a model uses another attention implementation than sdpa, or attention on this GPU is wrong.
    """
    for model in models:
        _check(model, packed)
        if model.config._attn_implementation != "sdpa":
            raise ModelError(
                f"attention implementation is {model.config._attn_implementation!r}; training needs sdpa"
            )
    with _attending(models, CAUSAL_NAME):
        yield


def _heads(config: Any) -> tuple[int, int, int]:
    """Heads of queries and of keys, and their size."""
    heads: int = config.num_attention_heads
    return heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _check(model: Any, packed: bool) -> None:
    config, device = model.config, next(model.parameters()).device
    if device.type != "cuda":
        return
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    # Not the whole of a long window: plain arithmetic would take gigabytes
    window = min(config.sliding_window, LONGEST_CHECKED_WINDOW) if sliding else None
    fault = why_wrong(device, torch.bfloat16, *_heads(config), window, packed)
    if fault is not None:
        raise ModelError(
            f"attention on {torch.cuda.get_device_name(device)} with torch {torch.__version__}: {fault}; "
            "use another version of torch, or device: cpu"
        )


@functools.cache
@torch.inference_mode(False)
def why_wrong(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    packed: bool,
) -> str | None:
    """What is wrong with `causal_attention` on this device, or None.

    Compared are outputs and gradients with those of float32 arithmetic and a mask: short rows, rows that end within a
    tile, rows longer than the window and, if `packed`, packed ones. Rows that see what follows them would otherwise
    show as nothing but a training loss that is too good.
    """
    lengths = [40, 200] if window is None else [40, 200, window + 88]
    windows = [None] if window is None else [None, window]
    for tokens, own_window, pack in itertools.product(lengths, windows, [False, True] if packed else [False]):
        generator = torch.Generator().manual_seed(tokens)
        query, key, value = (
            torch.randn(1 if pack else 2, h, tokens, size, generator=generator).to(device, dtype)
            for h in (heads, kv_heads, kv_heads)
        )
        try:
            fault = _fault_of(query, key, value, own_window, pack)
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
        if fault is not None:
            return f"{fault} ({tokens} tokens, head size {size}, window {own_window}, packed {pack})"
    return None


def _fault_of(query: Tensor, key: Tensor, value: Tensor, window: int | None, pack: bool) -> str | None:
    tokens, first = query.shape[2], 7
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, query.shape[1] // key.shape[1]  # type: ignore[assignment]
    position = torch.arange(tokens, device=query.device)
    seen, rows = _seen(position, window), dict[str, Any]()
    if pack:
        seen = seen & ((position[:, None] < first) == (position[None, :] < first))
        starts = torch.tensor([0, first, tokens], dtype=torch.int32, device=query.device)
        rows = {"row_starts": starts, "longest_row": tokens}
    got = _with_gradients(
        lambda q, k, v: causal_attention(layer, q, k, v, None, window, **rows)[0], (query, key, value)
    )
    with sdpa_kernel([SDPBackend.MATH]):
        want = _with_gradients(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2),
            (query.float(), key.float(), value.float()),
        )
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        if not error < ATTENTION_ERROR:
            return f"{name} is off by {error:.2g}"
    return None


def _with_gradients(attend: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients of the sum of its squares, outside of any autocast."""
    with torch.enable_grad(), torch.autocast(qkv[0].device.type, enabled=False):
        leaves = [x.detach().clone().requires_grad_() for x in qkv]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def fastest_attention(
    config: Any, rows: int, tokens: int, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Context in which sdpa prefers the faster of FlashAttention and cuDNN for batches of one shape.

    Which of the two is faster depends on GPU, head size and length, so both are timed, forward and backward, on the
    model's own shape, with rows enough that the GPU's time is measured and not the time of launching. A backend that
    fails or whose gradients are apart from the other's is not taken. All backends stay allowed: this is an order, not
    a restriction.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    found: dict[SDPBackend, tuple[float, list[Tensor]]] = {}
    for backend in (flash, cudnn):
        try:
            found[backend] = _timed_attention(
                config, max(rows, TIMED_TOKENS // tokens), tokens, device, backend
            )
        except RuntimeError as error:
            log.debug("attention: %s is left out: %s", backend.name, str(error).splitlines()[0])
    order = [flash, cudnn, *rest]
    if len(found) == 2 and found[cudnn][0] < 0.95 * found[flash][0]:
        pairs = zip(found[cudnn][1], found[flash][1], strict=True)
        # not max(): it may pass a NaN over
        if all(float((a - b).float().norm() / b.float().norm()) < 0.02 for a, b in pairs):
            order = [cudnn, flash, *rest]
    log.debug("attention: %s, ms %s", order[0].name, {b.name: round(v[0], 3) for b, v in found.items()})
    return sdpa_kernel(order, set_priority=True)


def _timed_attention(
    config: Any, rows: int, tokens: int, device: torch.device, backend: SDPBackend
) -> tuple[float, list[Tensor]]:
    """Milliseconds of forward and backward (the best of three), output and gradients."""
    heads, kv_heads, size = _heads(config)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(rows, tokens, h, size, device=device, generator=generator, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    times = []
    with sdpa_kernel([backend]):
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            grads = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times[2:]), [y.detach(), *grads]
