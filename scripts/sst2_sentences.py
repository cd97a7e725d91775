"""Split SST-2's training rows by sentence: whole sentences to score, and training rows without any phrase of them.

GLUE's training rows are the phrases of 6,900 sentences. A fair part of them held out by chance has its sentences' other
phrases among the training rows; the official rows are whole sentences that no training row knows. Recipes are chosen
on this split (recipes/sweeps/sst2-sentences.yaml) and scored once on the official one.

    python scripts/sst2_sentences.py hub:stanfordnlp/sst2:train --out sst2-sentences/
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path

from bitdistill.data.readers import read_rows
from bitdistill.errors import BitDistillError
from bitdistill.stages.augment import write_rows

SHORTEST = 8
"""Words of a row to score."""


class Phrases:
    """Texts, and whether another one is a phrase of one of them."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._with: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, text: str) -> None:
        for word in set(text.split()):
            self._with[word].append(f" {text} ")

    def hold(self, text: str) -> bool:
        rarest = min(text.split(), key=lambda word: self._counts[word])
        return any(f" {text} " in whole for whole in self._with[rarest])


def split(texts: list[str], held_out: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of training rows and of rows to score.

    Args:
        texts: rows, words apart by single spaces.
        held_out: sentences to score: texts of at least `SHORTEST` words that are no phrase of another text.

    Returns:
        training rows, without the phrases of two words or more of a sentence to score, and the rows to score.

    Raises:
        ValueError: there are fewer such sentences.
    """
    counts = Counter(word for text in set(texts) for word in set(text.split()))
    sentences, whole = [], Phrases(counts)
    for text in sorted(set(texts), key=lambda text: (-len(text), text)):
        if not whole.hold(text):
            whole.add(text)
            sentences.append(text)
    long = [text for text in sentences if len(text.split()) >= SHORTEST]
    if held_out > len(long):
        raise ValueError(f"{held_out}, but only {len(long)} sentences have {SHORTEST} words or more")
    scored = set(random.Random(seed).sample(long, held_out))
    theirs = Phrases(counts)
    for text in sorted(scored):
        theirs.add(text)
    rows = range(len(texts))
    return (
        [n for n in rows if len(texts[n].split()) == 1 or not theirs.hold(texts[n])],
        [n for n in rows if texts[n] in scored],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="SST-2's training rows: a file or hub:stanfordnlp/sst2:train")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and held-out.jsonl")
    parser.add_argument("--rows", type=int, default=1500, help="sentences to score")
    options = parser.parse_args()
    try:
        rows = [row.fields for row in read_rows(options.train)]
        train, scored = split([" ".join(str(row["sentence"]).split()) for row in rows], options.rows)
    except BitDistillError as error:
        parser.error(str(error))
    except KeyError:
        parser.error(f"{options.train}: a row without the field `sentence`; give SST-2's training rows")
    except ValueError as error:
        parser.error(f"--rows: {error}")
    write_rows((dict(rows[n]) for n in train), options.out / "train.jsonl")
    write_rows((dict(rows[n]) for n in scored), options.out / "held-out.jsonl")
    print(f"{len(train)} training rows of {len(rows)}, {len(scored)} sentences to score")


if __name__ == "__main__":
    main()
