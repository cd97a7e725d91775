"""Rows of a retrieval task in a long context, made up by seed: pass codes hidden in filler text. No torch import.

Each row has `keys` sentences "The pass code of NAME is 12345." among plain filler sentences and asks for one of them;
the others are distractors, so finding any code is not enough. Depths of the asked sentence are spread evenly over the
rows. Train, validation and test rows are made with different seeds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdistill import artifact
from bitdistill.errors import DataError


def _split(text: str) -> list[str]:
    return text.split(",")


NAMES = _split(
    "Ada,Ana,Bela,Boris,Carla,Chen,Clara,Dana,David,Elena,Emil,Farah,Felix,Gina,Hana,Hugo,Ines,Ivan,Jana,Jonas,"
    "Karim,Kira,Lara,Leo,Lina,Luca,Mara,Marco,Mila,Nadia,Nils,Nora,Olga,Omar,Paula,Pedro,Rosa,Sami,Sara,Stefan,"
    "Tara,Timo,Vera,Viktor,Wanda,Yara,Yusuf,Zoe"
)
_SUBJECTS = _split(
    "The river,The old mill,A small garden,The night train,The harbour,A grey cat,The library,The market,"
    "The baker,An early frost,The lighthouse,A long road,The orchestra,The valley,A wooden bridge,The museum"
)
_VERBS = _split(
    "lies near,looks towards,was built beside,runs along,is older than,can be seen from,stands behind,"
    "belongs to,is closed because of,was painted after,waits for,is shorter than"
)
_OBJECTS = _split(
    "the northern hills,a quiet square,the first snow of the year,the fishing boats,an abandoned station,"
    "the summer festival,a row of poplars,the morning fog,the new canal,a field of barley,the stone church,"
    "the evening bells,a narrow lane,the glass factory"
)
_KEY_WORDS = 7  # words of a key sentence


def rows(count: int, *, words: int, keys: int = 4, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows with the fields of the built-in task `needle`: context, name, code, and depth (0 start, 1 end).

    Args:
        count: rows.
        words: length of a context in words, about (a token is 0.7 words in English).
        keys: pass codes in a context, the asked one included.
        seed: other seeds give other rows; row n does not depend on `count` but for its depth.

    Raises:
        DataError: more keys than names, or than fit the words.
    """
    if not 1 <= keys <= len(NAMES):
        raise DataError(f"needle: {keys} keys; choose 1 to {len(NAMES)}")
    if words < 3 * _KEY_WORDS * keys:
        raise DataError(f"needle: {keys} keys need {3 * _KEY_WORDS * keys} words or more, not {words}")
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        depth = number % 11 / 10
        yield _row(rng, words, keys, depth)


def _row(rng: random.Random, words: int, keys: int, depth: float) -> dict[str, Any]:
    names = rng.sample(NAMES, keys)
    codes = [str(code) for code in rng.sample(range(10_000, 100_000), keys)]
    filler: list[str] = []
    length = _KEY_WORDS * keys
    while length < words:
        sentence = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."
        filler.append(sentence)
        length += len(sentence.split())
    # Distractors anywhere, then the asked sentence at its depth.
    for name, code in list(zip(names, codes, strict=True))[1:]:
        filler.insert(rng.randrange(len(filler) + 1), _key(name, code))
    filler.insert(round(depth * len(filler)), _key(names[0], codes[0]))
    return {"context": " ".join(filler), "name": names[0], "code": codes[0], "depth": depth}


def _key(name: str, code: str) -> str:
    return f"The pass code of {name} is {code}."


def write(path: Path, count: int, *, words: int, keys: int = 4, seed: int = 0) -> Path:
    """Write `rows` as JSON lines; returns `path`.

    Raises:
        DataError: as `rows`.
        StorageError: the file system refused.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows(count, words=words, keys=keys, seed=seed))
    with artifact.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return path
