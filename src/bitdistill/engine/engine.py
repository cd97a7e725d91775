"""`Engine`: generate, score and classify with a model folder, natively."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from bitdistill import artifact
from bitdistill.data.readers import check_strings, check_text
from bitdistill.engine import _native
from bitdistill.engine.generation import Generation, NewText
from bitdistill.engine.text import FolderTokenizer, stop_ids
from bitdistill.errors import ModelError
from bitdistill.eval.prediction import OnProgress, Prediction
from bitdistill.interop.foreign import packed_folder

if TYPE_CHECKING:
    from bitdistill.config import Task
    from bitdistill.data.readers import Row
    from bitdistill.data.tasks import Example
    from bitdistill.engine.labels import Answer, Classifier

Prompt = str | Sequence[int]
Layout = Literal["2bit", "base3"]
KvType = Literal["float32", "float16", "int8"]
HeadType = Literal["float", "screened", "screened4", "int8", "int4"]
SHARED_PREFIX_TOKENS = 16
"""Prompts of a batch with so long a common beginning (a system message, examples) share its keys and values."""
SCORED_LOGITS = 2**26
"""Logits of reference answers made at a time (256 MiB of float32), whatever the vocabulary."""


class Options(TypedDict, total=False):
    """Keyword arguments of `Engine.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Sequence[str | int]
    stream: Callable[[int, str], bool | None] | None


class Engine:
    """A packed student or a plain full-precision model, ready to run on the CPU. No torch.

    Calls may come from several threads; they are served one after the other. The GIL is free while the model
    runs.

    Args:
        path: a model folder (docs/format.md), a Hugging Face folder of a supported family, or a ternary model of
            another tool (docs/formats.md), which is imported to a cache first (that needs torch, once).
        threads: compute threads; None: as many as CPUs this process may use. Results do not depend on it.
        isa: instruction set of the kernels, for the whole process; None: as it is (BITDISTILL_ISA, else the
            best).
        layout: packed codes in memory, "2bit" or "base3" (1.6 bits). Results do not depend on it.
        kv: keys and values in "float32", "float16" (half the memory, rounded), or "int8" (a quarter: codes with
            a scale for each token and head). Layers with a sliding window keep only what it can reach.
        head: output head as stored ("float"); "screened": an int8 copy finds greedy and top-k tokens of the
            stored head exactly from half its bytes; "screened4": a 4-bit copy does so from a fifth, each token
            with a probability above 1 - 5e-10 (native/src/model/head.h); "int8", "int4": only the copy is
            read, so logits are rounded.
        verify: check every file of a bitdistill folder against its SHA-256.

    Raises:
        ArtifactError: a file is missing, corrupt or malformed.
        ModelError: the model is not supported, or the CPU lacks the instruction set.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        isa: str | None = None,
        layout: Layout = "2bit",
        kv: KvType = "float32",
        head: HeadType = "float",
        verify: bool = True,
    ) -> None:
        folder = packed_folder(path)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; give the folder of a model")
        if isa is not None:
            _native.set_isa(isa)
        if threads is None:
            here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
            threads = len(here)
        self.path = folder
        self.manifest: dict[str, Any] | None = None
        if artifact.exists(folder):
            self.manifest = artifact.verify(folder) if verify else artifact.read_manifest(folder)
        self.model = _native.Model.load(str(folder), threads=threads, layout=layout, kv=kv, head=head)
        self.facts: dict[str, Any] = self.model.facts
        self.tokenizer = FolderTokenizer(folder)
        self.stop_ids = stop_ids(folder, self.tokenizer, self.facts["eos_ids"])
        self._lock = threading.Lock()
        self._last: Any = None  # the last single sequence, kept for prompts that continue it
        self._classifiers: dict[str, Classifier] = {}

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return str(_native.current_isa())

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts before it.

        Raises:
            DataError: a NUL character or half a character in it.
        """
        check_text(text, "prompt")
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **options: Unpack[Options]
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str | int] = (),
        stream: Callable[[int, str], bool | None] | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several prompts together.

        A sequence of a batch gives the same tokens as alone (with the same place in the batch, if sampled).

        Args:
            prompt: text or token ids; a list of them for a batch.
            max_new_tokens: at most; the model's context also ends it.
            temperature: 0 is greedy; else softmax(logits / temperature) is sampled.
            top_k: sample among this many; 0: all.
            top_p: sample among the likeliest tokens that together reach this probability.
            seed: of the draws.
            stop: strings (cut off) and token ids that end a sequence, besides the model's end-of-text ids.
            stream: called with (place in the batch, new text); returning False ends that sequence.

        Raises:
            ModelError: an empty prompt, one longer than the context, or an option out of range.
        """
        single = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int | np.integer)
        prompts = [self.prompt_ids(p) for p in ([prompt] if single else prompt)]
        sampler = _native.Sampler(temperature, top_k, top_p, seed)
        texts = [
            self.new_text(ids, max_new_tokens, stop, None if stream is None else partial(stream, n))
            for n, ids in enumerate(prompts)
        ]
        with self._lock:
            sequences, reused = self._sequences(prompts)
            self._decode(sequences, prompts, texts, sampler)
        results = [text.result(len(ids), had) for text, ids, had in zip(texts, prompts, reused, strict=True)]
        return results[0] if single else results

    def new_text(
        self,
        prompt_ids: NDArray[np.int32],
        max_new_tokens: int = 128,
        stop: str | Sequence[str | int] = (),
        stream: Callable[[str], bool | None] | None = None,
    ) -> NewText:
        """What is to be written after a prompt, with its bounds; the model's context is one of them.

        Raises:
            ModelError: an option out of range.
        """
        stops = [stop] if isinstance(stop, str) else list(stop)
        if any(s == "" for s in stops):
            raise ModelError("stop: an empty string would end every text at once; leave it out")
        if max_new_tokens < 1:
            raise ModelError(f"max_new_tokens {max_new_tokens} is not 1 or more")
        context = self.facts["max_positions"]
        return NewText(
            self.tokenizer,
            words=[s for s in stops if isinstance(s, str)],
            ends=self.stop_ids | {int(s) for s in stops if not isinstance(s, str)},
            room=max_new_tokens if not context else min(max_new_tokens, context - len(prompt_ids)),
            stream=stream,
        )

    def prompt_ids(self, prompt: Prompt | NDArray[np.int32]) -> NDArray[np.int32]:
        """Token ids of a prompt that the model can run: int32 [T].

        Raises:
            ModelError: no tokens, more than the context, or ids outside the vocabulary.
        """
        ids = np.asarray(self.encode(prompt) if isinstance(prompt, str) else prompt)
        context = self.facts["max_positions"]
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ModelError("the prompt has no tokens; give some text, or a list of token ids")
        if context and ids.size > context:
            raise ModelError(
                f"the prompt has {ids.size} tokens, the model's context is {context}; shorten it"
            )
        if ids.min() < 0 or ids.max() >= self.facts["vocab_size"]:
            raise ModelError(
                f"token id {ids.min() if ids.min() < 0 else ids.max()} is not below the vocabulary of "
                f"{self.facts['vocab_size']}; use the model's own tokenizer"
            )
        return np.ascontiguousarray(ids, dtype=np.int32)

    def _sequences(self, prompts: list[NDArray[np.int32]]) -> tuple[list[Any], list[int]]:
        """A sequence for each prompt, and how many of its tokens need not be run for it.

        A single prompt goes on where the last single sequence agrees with it.
        """
        if len(prompts) != 1:
            return self._branches(prompts)
        sequence, self._last = self._last, None  # an error below must not leave a half-run sequence behind
        if sequence is None:
            sequence = _native.Sequence(self.model)
        common = reusable(sequence, prompts[0])
        sequence.truncate(common)
        return [sequence], [common]

    def _branches(self, prompts: list[NDArray[np.int32]]) -> tuple[list[Any], list[int]]:
        """Sequences that share the prompts' common beginning, which is run once."""
        first = prompts[0]
        common = min(_agreement(first, ids) for ids in prompts)
        if common < SHARED_PREFIX_TOKENS:
            return [_native.Sequence(self.model) for _ in prompts], [0] * len(prompts)
        root = _native.Sequence(self.model)
        self.model.forward([(root, first[:common].copy())], "none")
        return [root.branch() for _ in prompts], [0] + [common] * (len(prompts) - 1)

    def _decode(
        self,
        sequences: list[Any],
        prompts: list[NDArray[np.int32]],
        texts: list[NewText],
        sampler: Any,
    ) -> None:
        """Run the prompts, then all unfinished sequences together, one token each at a time."""
        segments = [(s, ids[len(s) :]) for s, ids in zip(sequences, prompts, strict=True)]
        active = [n for n, text in enumerate(texts) if text.room > 0]
        step = 0
        while active:
            given = [segments[n] for n in active]
            chosen = self.model.step(given, [sampler] * len(active), active, [step] * len(active))
            step += 1
            for n, token in zip(active, chosen, strict=True):
                texts[n].add(token)
                segments[n] = (sequences[n], np.array([token], dtype=np.int32))
            active = [n for n in active if texts[n].finish_reason is None]
        if len(sequences) == 1:
            self._last = sequences[0]

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Generation:
        """Answer a conversation of {"role", "content"} messages through the model's chat template."""
        return self.generate(self.chat_ids(messages), **options)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises:
            ModelError: the model has no chat template, or it refuses the messages.
            DataError: a NUL character or half a character in a message.
        """
        for number, message in enumerate(messages):
            check_strings(dict(message), f"messages.{number}")
        text = self.tokenizer.render_chat(messages)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [T, V] after each token of a sequence."""
        with self._lock:
            values: NDArray[np.float32] = self.model.forward(
                [(_native.Sequence(self.model), self.prompt_ids(ids))], "all"
            )
        return values

    def classify(
        self,
        inputs: Sequence[str | Mapping[str, Any] | Row],
        *,
        task: Task | None = None,
        max_length: int | None = None,
    ) -> list[Answer]:
        """Label each input by the likelihood of the task's label words.

        Args:
            inputs: texts (for tasks with one field), mappings from field to value, or rows.
            task: None: the task that the student was made for, from its manifest.
            max_length: longest prompt with its answer; None: the student's own, or the model's context.

        Raises:
            ArtifactError: no task is stored.
            DataError: not a list, a field is missing, a text is given to a task with several fields, or half a
                character.
        """
        classifier = self.classifier(task, max_length)
        examples = classifier.encode(inputs, self.facts["vocab_size"])
        with self._lock:
            predictions = classifier.predictions(self.model, examples)
        return classifier.answers(examples, predictions)

    def predict(
        self,
        task: Task,
        examples: Sequence[Example],
        *,
        batch_rows: int = 32,
        progress: OnProgress | None = None,
    ) -> list[Prediction]:
        """Answers to encoded rows: the twin of `eval.classify.classify` and `eval.generate.generate`.

        Args:
            task: classification (label words scored) or generation (greedy, up to `task.max_new_tokens`; the
                model's context also ends an answer).
            examples: from `data.tasks.encode` with this engine's tokenizer.
            batch_rows: prompts decoded together (generation).
            progress: called now and then with (examples done, examples to do).

        Raises:
            ModelError: a prompt longer than the context; DataError: label words that cannot be told apart.
        """
        if task.kind == "classification":
            with self._lock:
                return self.classifier(task).predictions(self.model, examples, progress)
        # Rows of a batch end together when they are as long as each other.
        order = sorted(range(len(examples)), key=lambda n: -len(examples[n].prompt_ids))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_rows):
            batch = order[start : start + batch_rows]
            prompts = [list(examples[n].prompt_ids) for n in batch]
            for n, result in zip(
                batch, self.generate(prompts, max_new_tokens=task.max_new_tokens), strict=True
            ):
                ended = result.finish_reason == "stop"
                found[n] = Prediction(n, None, (), result.text.strip(), ended=ended)
            if progress is not None:
                progress(len(found), len(examples))
        return [found[n] for n in range(len(examples))]

    def reference_nll(
        self, examples: Sequence[Example], *, progress: OnProgress | None = None
    ) -> list[tuple[float, int]]:
        """Nats of each row's first reference and its scored tokens: the twin of `eval.likelihood.reference_nll`.

        Args:
            examples: from `data.tasks.encode` with this engine's tokenizer, with answers.
            progress: called after each row with (examples done, examples to do).

        Raises:
            ModelError: a prompt longer than the context.
        """
        piece = max(1, SCORED_LOGITS // self.facts["vocab_size"])
        found: list[tuple[float, int]] = []
        for example in examples:
            prompt: list[int] = self.prompt_ids(example.prompt_ids).tolist()
            answer = example.answer_within(self.facts["max_positions"] or None)
            nats = 0.0
            with self._lock:
                for start in range(0, len(answer), piece):
                    ids = answer[start : start + piece]
                    chain = list(enumerate(ids, start=-1))  # each token after the one before; -1: the prompt
                    before = [*prompt, *answer[:start]]
                    log_probs = self.model.score_tree(
                        [before], list(ids[:-1]), list(range(-1, len(ids) - 2)), chain
                    )
                    nats -= float(log_probs.sum(dtype=np.float64))
            found.append((nats, len(answer)))
            if progress is not None:
                progress(len(found), len(examples))
        return found

    def classifier(self, task: Task | None = None, max_length: int | None = None) -> Classifier:
        """The prepared task; see `classify`."""
        from bitdistill.engine.labels import Classifier, stored_task

        if task is None:
            task, stored_length = stored_task(self.manifest, str(self.path))
        else:
            stored_length = self.facts["max_positions"] or 4096
        length = max_length or stored_length
        key = f"{task.model_dump_json()} {length}"
        if key not in self._classifiers:
            self._classifiers[key] = Classifier(task, self.tokenizer, length)
        return self._classifiers[key]


def _agreement(before: NDArray[np.int32], prompt: NDArray[np.int32]) -> int:
    """Tokens with which both begin; the last of the prompt is none: it always runs, its logits choose the next one."""
    n = min(len(before), len(prompt) - 1)
    differs = np.flatnonzero(before[:n] != prompt[:n])
    return int(differs[0]) if differs.size else n


def reusable(sequence: Any, prompt: NDArray[np.int32]) -> int:
    """Tokens of a prompt whose keys and values a sequence holds and can be cut back to."""
    kept: int = sequence.keepable(_agreement(np.asarray(sequence.tokens, dtype=np.int32), prompt))
    return kept
