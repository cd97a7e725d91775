"""`bitdistill generate`, `chat` and `bench`: the native engine on the command line. No torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitdistill.cli.options import MOST_SEED, AsJson, print_json, stdin_lines, stdout
from bitdistill.errors import DataError, ModelError

if TYPE_CHECKING:
    from bitdistill.engine import Engine


MOST_TOKENS = 2**31 - 1
"""What the engine's counts hold."""


def _of_this_cpu(name: str | None) -> str | None:
    from bitdistill.engine import _native  # here, for --help must stay light

    if name is not None and name not in (known := ["auto", *_native.available_isas()]):
        raise typer.BadParameter(f"{name} is none of {', '.join(known)}, which this CPU has")
    return name


class LayoutName(StrEnum):
    """Packed codes in memory."""

    two_bit = "2bit"
    base3 = "base3"


class KvName(StrEnum):
    """Type of keys and values."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


class HeadName(StrEnum):
    """Type of the output head."""

    float = "float"
    screened = "screened"
    screened4 = "screened4"
    int8 = "int8"
    int4 = "int4"


def _above_zero(value: float) -> float:
    if not value > 0:  # NaN too
        raise typer.BadParameter(f"{value} is not above 0; 1 keeps every token")
    return value


def _a_number(value: float) -> float:
    if value != value:  # NaN passes every range
        raise typer.BadParameter("nan is no number; 0 is greedy")
    return value


def _not_empty(texts: list[str] | None) -> list[str] | None:
    if texts and "" in texts:
        raise typer.BadParameter("an empty text would end every answer at once; leave it out")
    return texts


Folder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A packed student, or a full-precision model's folder.", show_default=False
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, help="Compute threads; default: the CPUs of this process.", show_default=False
    ),
]
Isa = Annotated[
    str | None,
    typer.Option(
        callback=_of_this_cpu,
        help="Instruction set of the kernels; default: BITDISTILL_ISA, else the best.",
        show_default=False,
    ),
]
LayoutOption = Annotated[LayoutName, typer.Option("--layout", help="Packed codes in memory: 2 or 1.6 bits.")]
Kv = Annotated[KvName, typer.Option(help="Type of keys and values.")]
Head = Annotated[
    HeadName,
    typer.Option(help="Output head: as stored, screened (same tokens, fewer bytes), int8 (rounded)."),
]
MaxNew = Annotated[
    int, typer.Option("--max-new-tokens", "-n", min=1, max=MOST_TOKENS, help="Longest answer.")
]
Temperature = Annotated[float, typer.Option(min=0.0, max=100.0, callback=_a_number, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Sample among this many tokens; 0: all.")]
TopP = Annotated[
    float,
    typer.Option(max=1.0, callback=_above_zero, help="Sample among the tokens that reach this probability."),
]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the draws.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", callback=_not_empty, help="End before this text. Repeat.", show_default=False
    ),
]


def generate(
    model: Folder,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help="Text to continue; default: stdin.", show_default=False),
    ] = None,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    threads: Threads = None,
    isa: Isa = None,
    layout: LayoutOption = LayoutName.two_bit,
    kv: Kv = KvName.float32,
    head: Head = HeadName.float,
    json_: AsJson = False,
) -> None:
    """Continue a text with the native engine."""
    text = "".join(line for _, line in stdin_lines()).replace("\r\n", "\n") if prompt is None else prompt
    if not text:
        raise DataError("generate: no prompt; give a text or pipe one in")
    engine = load_engine(model, threads, isa, layout, kv, head)
    result = engine.generate(
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        stream=None if json_ else _write,
    )
    if json_:
        print_json(
            {
                "text": result.text,
                "ids": list(result.ids),
                "prompt_tokens": result.prompt_tokens,
                "finish_reason": result.finish_reason,
            }
        )
    else:
        typer.echo()


def chat(
    model: Folder,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    isa: Isa = None,
    layout: LayoutOption = LayoutName.two_bit,
    kv: Kv = KvName.float32,
    head: Head = HeadName.float,
) -> None:
    """Talk with a model that has a chat template. One message a line; an empty line ends it."""
    engine = load_engine(model, threads, isa, layout, kv, head)
    if engine.tokenizer.chat_template is None:
        raise ModelError(f"{model}: no chat template; use `bitdistill generate`")
    messages = [] if system is None else [{"role": "system", "content": system}]
    lines = stdin_lines()
    while line := _ask(lines):
        messages.append({"role": "user", "content": line})
        answer = engine.chat(
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stream=_write,
        )
        typer.echo()
        messages.append({"role": "assistant", "content": answer.text})


def bench(
    model: Folder,
    prefill_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Length of the prompt.")] = 512,
    decode_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens decoded one at a time.")
    ] = 128,
    sequences: Annotated[int, typer.Option(min=1, max=1024, help="Sequences decoded together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Runs; the medians are reported.")] = 5,
    threads: Threads = None,
    isa: Isa = None,
    layout: LayoutOption = LayoutName.two_bit,
    kv: Kv = KvName.float32,
    head: Head = HeadName.float,
    json_: AsJson = False,
) -> None:
    """Measure prefill and decode speed, memory, and bytes read per token."""
    from bitdistill.engine.bench import measure

    engine = load_engine(model, threads, isa, layout, kv, head)
    facts = measure(
        engine,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        sequences=sequences,
        repeats=repeats,
    )
    if json_:
        print_json(facts)
        return
    console = stdout()
    for name, value in facts.items():
        shown = (
            f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
        console.print(f"{name:28} {shown}", markup=False)


def load_engine(
    model: Path, threads: int | None, isa: str | None, layout: LayoutName, kv: KvName, head: HeadName
) -> Engine:
    """The engine that the options describe."""
    from bitdistill.engine import Engine

    return Engine(model, threads=threads, isa=isa, layout=layout.value, kv=kv.value, head=head.value)


def _write(_: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ask(lines: Iterator[tuple[str, str]]) -> str:
    if sys.stdin is not None and sys.stdin.isatty():
        sys.stdout.write("> ")
        sys.stdout.flush()
    return next(lines, ("", ""))[1].strip()
