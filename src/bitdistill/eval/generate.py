"""Greedy generation.

Shape legend: B rows, T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bitdistill.config import Task
from bitdistill.data.tasks import Example
from bitdistill.data.tokenizer import eos_id
from bitdistill.eval.prediction import OnProgress, Prediction
from bitdistill.models.attention import decoding

CACHE_SHARE = 0.4
"""Share of a GPU's memory that the rows of a batch may take; more rows than that go in further batches."""


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_rows: int,
    device: torch.device | str,
    pad_id: int,
    batch_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> list[Prediction]:
    """Continue every prompt greedily until an end-of-text token or `task.max_new_tokens`.

    Rows are padded on the left with an attention mask and their own positions, so each answer is the one it
    would be alone (up to float rounding).

    Args:
        batch_rows: at most; on a GPU less where caches of so many rows would not fit its memory.
        batch_tokens: so many tokens of a batch at most, padding and new ones included, but always one row.
        progress: called after each batch with (examples that are finished, examples to do).

    Returns:
        Predictions in the order of `examples`; text without special tokens, stripped, and whether it `ended`.
    """
    choice = {"do_sample": False}
    most = batch_rows, batch_tokens
    return _generate(model, tokenizer, task, examples, most, device, pad_id, choice, (), progress)


@torch.inference_mode()
def sample(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    temperature: float,
    seed: int,
    batch_rows: int,
    device: torch.device | str,
    pad_id: int,
    rounds: Sequence[int] = (),
    progress: OnProgress | None = None,
) -> list[Prediction]:
    """`generate` with tokens drawn from the whole distribution at a temperature, repeatable by seed on one machine.

    Args:
        rounds: numbers of new tokens, rising, after which the rows that are not finished meet in new batches. A batch
            runs until its longest answer ends; with rounds at usual lengths few rows wait for that. The
            distribution is the same.
        progress: as for `generate`.
    """
    torch.manual_seed(seed)
    choice: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    # A growing cache is copied for every token, which with thousands of rows takes longer than the model
    choice |= {"cache_implementation": "static", "disable_compile": True}
    with decoding(model):
        most = batch_rows, None
        return _generate(model, tokenizer, task, examples, most, device, pad_id, choice, rounds, progress)


def _generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    most: tuple[int, int | None],
    device: torch.device | str,
    pad_id: int,
    choice: dict[str, Any],
    rounds: Sequence[int],
    progress: OnProgress | None,
) -> list[Prediction]:
    stops = sorted(stop_ids(model, tokenizer))
    answers: list[list[int]] = [[] for _ in examples]
    unfinished = list(range(len(examples)))
    done = 0
    for end in [*(r for r in rounds if r < task.max_new_tokens), task.max_new_tokens]:
        prompts = [(*examples[n].prompt_ids, *answers[n]) for n in unfinished]
        over = len(examples) - len(unfinished)
        new: list[list[int]] = [[] for _ in prompts]
        for batch, ids_of in _continue(
            model, prompts, end - done, most, torch.device(device), pad_id, stops, choice
        ):
            for row, ids in zip(batch, ids_of, strict=True):
                new[row] = ids
                over += end == task.max_new_tokens or _ends(ids, stops, pad_id)
            if progress is not None:
                progress(over, len(examples))
        for n, ids in zip(unfinished, new, strict=True):
            answers[n] += ids
        unfinished = [n for n, ids in zip(unfinished, new, strict=True) if not _ends(ids, stops, pad_id)]
        done = end
    return [
        Prediction(n, None, (), decode_answer(tokenizer, ids, stops), ended=not set(stops).isdisjoint(ids))
        for n, ids in enumerate(answers)
    ]


def _ends(ids: Sequence[int], stops: Sequence[int], pad_id: int) -> bool:
    """Whether an answer ends within these tokens. Where a batch ends early, its rows are padded."""
    return not {*stops, pad_id}.isdisjoint(ids)


def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    count: int,
    most: tuple[int, int | None],
    device: torch.device,
    pad_id: int,
    stops: list[int],
    choice: dict[str, Any],
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Batch by batch, indices of prompts and at most `count` new tokens of each; after a stop token comes padding.

    Args:
        most: rows of a batch, and tokens of one (None: as many as its rows have).
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        num_beams=1, max_new_tokens=count, eos_token_id=stops, pad_token_id=pad_id, use_cache=True, **choice
    )
    left = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    memory = memory_bytes(device)
    while left:
        width = len(prompts[left[0]])
        rows, tokens = most
        if tokens is not None:
            rows = max(1, min(rows, tokens // (width + count)))
        if memory is not None:
            rows = rows_that_fit(model, width + count, rows, memory)
        batch, left = left[:rows], left[rows:]
        ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(batch):
            ids[row, width - len(prompts[n]) :] = torch.tensor(prompts[n])
            mask[row, width - len(prompts[n]) :] = 1
        with only_config(model, config):
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        yield batch, output[:, width:].tolist()


def memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU, None for a CPU. The whole card's, not what is free: what is sampled must not depend on that."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def rows_that_fit(model: Any, length: int, most: int, memory: int) -> int:
    """Rows of one batch of generation: 1 to `most`, as many as CACHE_SHARE of `memory` bytes holds.

    Counted are keys and values of `length` tokens three times (a cache grows by copying: the old one, the new one, and
    what the allocator keeps of the last step) and four float32 copies of a row's logits.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * next(model.parameters()).element_size()
    return max(1, min(most, int(CACHE_SHARE * memory) // (3 * length * token + 16 * config.vocab_size)))


@contextlib.contextmanager
def only_config(model: Any, config: Any) -> Iterator[None]:
    """Generate with `config` alone.

    transformers fills what a config leaves open (penalties, sampling) from the model's own one, and published
    chat models set such things.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """End-of-text ids: the tokenizer's and those of the model's generation config (chat models have more)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = [] if own is None else [own] if isinstance(own, int) else list(own)
    return {eos_id(tokenizer), *more}


def decode_answer(tokenizer: Any, ids: Sequence[int], stops: Sequence[int]) -> str:
    """New tokens as stripped text, cut at the first end-of-text token (what follows is padding)."""
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()
