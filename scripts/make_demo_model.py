#!/usr/bin/env python3
"""Make the embedded demo's full-precision model: tokenizer, then a Llama-layout language model from scratch.

    python scripts/make_demo_model.py tokenizer --corpus CORPUS_DIR --out DIR
    python scripts/make_demo_model.py model --tokenizer DIR --tokens SHARDS --out DIR [--max-steps 3]

CORPUS_DIR holds *.jsonl.zst files with `text` and `source`; only sources under a free licence are used
(FREE_SOURCES). The ternary base beside it is made from the result by the ordinary stage 2,
`bitdistill pretrain recipes/demo-base.yaml`, and rounded to bfloat16 by

    python scripts/make_demo_model.py base --base BASE --out DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitdistill.config import Loop, Optim, PretrainConfig
from bitdistill.data.batches import PackedBatches
from bitdistill.data.corpus import TokenShards
from bitdistill.data.readers import iter_documents
from bitdistill.models.attention import causal_only
from bitdistill.models.student import load_student, save_student
from bitdistill.stages.pretrain import LanguageModelStep
from bitdistill.train.compile import compile_blocks
from bitdistill.train.loop import fit
from bitdistill.train.tracking import Tracker

FREE_SOURCES = frozenset(
    {
        "classic_books",  # public domain
        "podcast_transcripts",  # CC BY-SA 4.0
        "gov_blogs_18f",  # public domain, CC0
        "gov_digitalgov",  # CC0
        "rust_blog",  # MIT or Apache-2.0
        "sourcegraph_handbook",  # Apache-2.0
        "opensource_guide",  # CC BY 4.0
        "simonw_til",  # Apache-2.0
        "python_peps",  # public domain, CC0
        "mdn_archive",  # CC BY-SA 2.5
        "openstax_college-success-bundle",  # CC BY 4.0
        "openstax_introduction-anthropology",
        "openstax_introduction-business",
        "openstax_life-liberty-and-pursuit-happiness",
        "openstax_principles-economics-bundle",
        "onestopenglish_adv",  # CC BY-SA 4.0
        "wikipedia_sample",  # CC BY-SA 3.0
    }
)
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"


def make_tokenizer(corpus: Path, out: Path, limit_characters: int) -> None:
    """Byte-level BPE of 4,096 entries, digits split one by one."""

    def texts():  # type: ignore[no-untyped-def]
        seen = 0
        for document in iter_documents(str(corpus)):
            if document.fields["source"] not in FREE_SOURCES:
                continue
            seen += len(document.fields["text"])
            yield document.fields["text"]
            if seen > limit_characters:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=1024
    )
    fast.save_pretrained(out)


def make_model(args: argparse.Namespace) -> None:
    """Pre-train from scratch with the ordinary loop and the LM step of stage 2."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config).to(device)
    shards = TokenShards(args.tokens)
    loop = Loop(batch_rows=args.batch_rows, checkpoint_every_s=3600.0, log_every_steps=50)
    total_steps = args.max_steps or round(
        args.epochs * shards.n_tokens / (args.batch_rows * args.sequence_length)
    )
    batches = PackedBatches(
        shards,
        sequence_length=args.sequence_length,
        batch_rows=args.batch_rows,
        micro_batch_rows=args.batch_rows,
        seed=args.seed,
    )
    compiling = device.type == "cuda"
    if compiling:
        compile_blocks(model)
    with causal_only(model):
        result = fit(
            model,
            batches,
            LanguageModelStep(model, None, PretrainConfig(objective="lm"), compiling),
            optim=Optim(
                learning_rate=args.learning_rate, schedule="cosine", min_lr_ratio=0.05, weight_decay=0.05
            ),
            loop=loop,
            total_steps=total_steps,
            device=device,
            tracker=Tracker("demo-model", args.out.parent, total_steps),
            checkpoint_root=args.out.parent / "checkpoints" / "demo-model",
            key=f"demo-model-{args.seed}",
        )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({**vars(result), "parameters": sum(p.numel() for p in model.parameters())}))


def _without_folders(value: Any) -> Any:
    """The recipe with each absolute path cut to its last part: the shipped manifest names no one's folders."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return value


def ship_base(args: argparse.Namespace) -> None:
    """Round a ternary base to bfloat16 and save it as the embedded one, half the size."""
    student, tokenizer, manifest = load_student(args.base)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.bfloat16())
    kept = {k: manifest[k] for k in ("stage", "key", "inputs", "training")}
    recipe = _without_folders(manifest["recipe"])
    save_student(
        student,
        tokenizer,
        args.out,
        kind="base",
        plan=manifest["plan"],
        recipe=recipe,
        extra=kept,
        float_dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tokenizer")
    one.add_argument("--corpus", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--limit-characters", type=int, default=60_000_000)
    two = commands.add_parser("model")
    two.add_argument("--tokenizer", type=Path, required=True)
    two.add_argument("--tokens", type=Path, required=True)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--epochs", type=float, default=5.0)
    two.add_argument("--batch-rows", type=int, default=512)
    two.add_argument("--sequence-length", type=int, default=256)
    two.add_argument("--learning-rate", type=float, default=3e-3)
    two.add_argument("--max-steps", type=int)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--layers", type=int, default=12)
    two.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32 (heads of 32)")
    two.add_argument("--ffn", type=int, default=256)
    two.add_argument(
        "--kv-heads", type=int, default=2, help="heads of keys and values; divides the number of heads"
    )
    three = commands.add_parser("base")
    three.add_argument("--base", type=Path, required=True)
    three.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "tokenizer":
        make_tokenizer(args.corpus, args.out, args.limit_characters)
    elif args.command == "model":
        make_model(args)
    else:
        ship_base(args)


if __name__ == "__main__":
    main()
