"""Recipe: every choice of a run as small, strict, frozen models. No torch import, so `plan` stays fast.

A recipe is YAML. Unknown keys are errors that name the nearest valid key (see recipe.py). The
resolved recipe is embedded in every artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Strict(BaseModel):
    """Base of all recipe sections: unknown keys fail, numbers are finite, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    LATER: ClassVar[Mapping[str, Any]] = {}
    """Keys that came later, with their defaults. They are dumped with other values only, so that hashes, stage keys and
    digests of recipes without them stay what they were."""

    @model_serializer(mode="wrap")
    def _without_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        return {k: v for k, v in tree.items() if k not in self.LATER or v != self.LATER[k]}


MOST_TEACHERS = 16
MOST_COUNT = 10**15
"""More of anything is a slip of the pen, and would overflow where counts meet floats and C integers."""


def _no_truth(value: Any) -> Any:
    """Pydantic takes true for 1; `gamma: true` is a slip of the pen."""
    if isinstance(value, bool):
        raise ValueError(f"got {str(value).lower()}, expected a number")
    return value


Number = BeforeValidator(_no_truth)
Fraction = Annotated[float, Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Number, Field(gt=0.0)]
NonNegative = Annotated[float, Number, Field(ge=0.0)]
Count = Annotated[int, Number, Field(ge=1, le=MOST_COUNT)]
Epochs = Annotated[float, Number, Field(gt=0.0, le=MOST_COUNT)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Number, Field(ge=0, lt=2**63)]


class ModelSource(Strict):
    """Where the full-precision model comes from."""

    path: Text
    """Hugging Face folder, hub name (`Qwen/Qwen3-0.6B`), or a `.gguf` file."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: Text | None = None
    """Folder or hub name of the tokenizer when it is not beside the model."""


class Task(Strict):
    """A declarative task: how a row becomes a prompt and an answer, and how answers are scored."""

    name: str
    kind: Literal["classification", "generation"]
    template: str
    """Prompt with `{field}` placeholders, for example `"{sentence}\\nSentiment:"`."""
    label_field: str = "label"
    """Classification: the row's field that holds the label."""
    labels: dict[str, str] = {}
    """Classification: label value (as a string) -> label word, leading space included (`" positive"`)."""
    target_field: str | None = None
    """Generation: the row's field that holds the reference answer."""
    reference_field: str | None = None
    """Generation: optional field with a list of further references."""
    answer_prefix: str = " "
    """Generation: put between prompt and answer."""
    append_eos: bool | None = None
    """Train the end-of-text token after the answer. Default: generation yes, classification no."""
    metrics: tuple[str, ...] = ()
    """Names from eval.metrics; the first is the headline metric. Default by kind: accuracy | rougeL."""
    max_new_tokens: Count = 64
    """Generation: tokens of an answer at most, end-of-text included; no prompt takes their room in data.max_length."""
    licence: str | None = None
    source: str | None = None

    @property
    def shown_labels(self) -> list[str]:
        """Labels as people read them: the data's own, or the label word where the data only number them."""
        return [word.strip() if label.isdigit() else label for label, word in self.labels.items()]

    @model_validator(mode="after")
    def _fits_kind(self) -> Task:
        if self.kind == "classification":
            if len(self.labels) < 2:
                raise ValueError(f"task {self.name}: classification needs at least 2 entries in `labels`")
            words = list(self.labels.values())
            blank = next((label for label, word in self.labels.items() if not word.strip()), None)
            if blank is not None:
                raise ValueError(
                    f"task {self.name}: labels: the word of {blank!r} is blank; give it a word, like ' none'"
                )
            if len(set(words)) != len(words):
                twice = sorted({w for w in words if words.count(w) > 1})
                raise ValueError(f"task {self.name}: label words must differ; used more than once: {twice}")
        elif not self.target_field:
            raise ValueError(f"task {self.name}: generation needs `target_field`")
        return self


Sources = Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
"""One source or a list."""


class DataConfig(Strict):
    """Files or hub names. `hub:owner/name[:config][:split]`, or a .jsonl/.jsonl.zst/.csv/.tsv/.parquet path."""

    train: Text
    validation: Text | None = None
    """Held-out rows for choosing hyper-parameters. None: `validation_fraction` of train, by seed."""
    validation_fraction: Fraction = 0.0
    test: Text | None = None
    """Rows of the results table. None: the validation rows."""
    unlabelled: Sources = ()
    """Further rows of the task, whose answers (if they have any) are not read: the teacher answers them, and stage 3
    learns from them beside the training rows. One source or a list; `bitdistill augment` makes such rows."""
    limit_train: Count | None = None
    """The first rows of the file only."""
    rows_per_label: Count | None = None
    """Classification: train on at most this many rows of each label, drawn by seed. What few labels would give."""
    limit_test: Count | None = None
    max_length: Count = 512
    """Tokens of prompt and answer together; of a longer prompt the end of its longest field is cut. Prompts leave room
    for the task's longest label word, or for `max_new_tokens` (at most half), whatever the row's own answer is."""


class AugmentConfig(Strict):
    """Rows without answers, for stage 3: written by the full-precision model, fine-tuned with the `sft` settings on the
    training rows turned round. The teacher answers them."""

    rows: Count = 50_000
    """Rows to sample; empty and repeated ones are left out of them."""
    texts: Sources = ()
    """Texts whose sentences stand in for the first of two fields, or are the rows of a task of one field. One source or
    a list."""
    texts_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of the rows that begin with such a sentence, or are one."""
    min_words: Annotated[int, Field(ge=0, le=MOST_COUNT)] = 0
    """Rows of fewer words, all fields together, are neither written nor imitated: where training rows are phrases and
    users ask about sentences."""
    whole_share: Fraction = 0.0
    """Share of the rows that are written whole. The others take all fields but the last from a training row, so their
    premises, questions or passages are those that the teacher knows. A task of one field has no others."""
    temperature: Positive = 1.0
    seed: Seed | None = None
    """Of the writer and its samples; None: the recipe's. Set, the rows are shared by runs of other seeds."""


class Optim(Strict):
    """Optimizer and schedule of one stage."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices of the blocks, at AdamW's update size; AdamW for the rest."""
    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """wsd: warm-up, stable, then linear decay over the last `decay_fraction` of steps."""
    warmup_fraction: Fraction = 0.05
    decay_fraction: Fraction = 0.2
    min_lr_ratio: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    embedding_rate: NonNegative = 1.0
    """Learning rate of embedding and output head as a multiple of `learning_rate`; 0 freezes them. They are not
    ternary, and what they know of rare words may be lost at the high rates that ternary latents want."""
    matrix_rate: Literal["equal", "relative", "share"] = "equal"
    """relative: the rate of each matrix of the blocks is multiplied by its mean magnitude over the geometric mean of
    all, as the stage finds them, so that every matrix moves by the same share of itself. share: the same, and
    `learning_rate` is that share: 0.015 moves a matrix by 1.5 % of its mean magnitude a step, whatever the model."""
    momentum: Fraction = 0.95
    """Of muon's matrices."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Positive = 1e-8
    grad_clip: NonNegative = 1.0
    """Global L2 norm; 0 turns clipping off."""

    @model_validator(mode="after")
    def _share(self) -> Optim:
        if self.matrix_rate == "share" and self.learning_rate >= 1:
            raise ValueError(
                f"learning_rate {self.learning_rate:g} with matrix_rate share moves each matrix by its whole size a "
                "step; 0.015 is 1.5 %"
            )
        return self


class Loop(Strict):
    """What every training stage shares besides its optimizer."""

    batch_rows: Count
    """Rows of one optimizer step (global batch)."""
    micro_batch_rows: Count | None = None
    """Rows of one forward/backward; None: batch_rows. Gradients do not depend on it."""
    micro_batch_tokens: Count | None = None
    """At most so many tokens of one forward/backward, padding included (but at least one row). Steps of long rows then
    go through in smaller parts, a power of two of rows each. Gradients do not depend on it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of everything but quantizers and losses. auto: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile per transformer block. auto: on a GPU only."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay forward and backward of each batch shape as one CUDA graph: small steps are bound by kernel launches.
    auto: small steps on a GPU, without gradient checkpointing. The mathematics is the same."""
    kernels: Literal["auto", "reference"] = "auto"
    """Ternary students. auto: the fused Triton kernels on a GPU that runs them and where they pass a check against
    their slow twins. reference: plain torch everywhere. Quantizers and forward products are the same integers;
    gradients differ by bfloat16 roundings."""
    int8_backward: bool = False
    """With fused kernels: gradients of the ternary layers' inputs by int8 products of row-quantized output gradients.
    An approximation, faster where layers are wide; compare losses before use."""
    packing: bool = False
    """Task stages: lay rows one after the other instead of padding them to one length. Rows do not see one another, and
    positions start again at each. Batches are then not sorted by length. The corpus of stage 2 has no padding."""
    gradient_checkpointing: bool = False
    log_every_steps: Count = 10
    checkpoint_every_steps: Count | None = None
    """None: a checkpoint each `checkpoint_every_s` seconds and at the end."""
    checkpoint_every_s: Positive = 300.0
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A non-finite loss or gradient: skip the update (at most 10 in a row) or stop."""

    def rows_at_a_time(self, length: int) -> int:
        """Rows of one forward/backward where the longest has `length` tokens, padding included. With a bound on tokens
        a power of two or all, so that few shapes occur."""
        rows = min(self.micro_batch_rows or self.batch_rows, self.batch_rows)
        if self.micro_batch_tokens is None:
            return rows
        fitting = max(1, self.micro_batch_tokens // length)
        return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)


class SftConfig(Strict):
    """Full-precision fine-tuning (the teacher)."""

    optim: Optim = Optim(learning_rate=5e-5)
    loop: Loop = Loop(batch_rows=32)
    epochs: Epochs = 2.0


class RefineConfig(Strict):
    """Stage 1 (paper, sec. 3.1): ternary linears and SubLN."""

    subln: Literal["paper", "every_linear", "none"] = "paper"
    """paper: before the attention output and FFN down projections. every_linear: before each ternary linear."""
    gains: Literal["ones", "calibrated"] = "calibrated"
    """calibrated: each SubLN gain starts at the RMS of the signal it normalises (a scalar per layer)."""
    calibration_rows: Count = 32
    calibration_length: Count = 256
    quantize_activations: bool = True
    """Per-token int8 activations; False is an ablation (weights only)."""


class PretrainConfig(Strict):
    """Stage 2 (paper, sec. 3.2): continued pre-training on a general corpus."""

    LATER: ClassVar[Mapping[str, Any]] = {"start": None, "hidden_error": "relative", "sampled_words": None}

    corpus: Text | None = None
    """Folder of token shards (`bitdistill tokenize`) or a text/jsonl/parquet file or folder, tokenized on first use."""
    base: Text | None = None
    """An existing ternary base (folder): stage 2 is not run. `auto`-cached bases need no entry here."""
    start: Text | None = None
    """A ternary base (folder) that stage 2 goes on from, in place of the freshly refined model: for more tokens than
    one sitting allows, or for the user's own text after a general corpus. `budget_tokens` are those to come; the
    schedule begins anew, with the data in another order than the base saw them."""
    objective: Literal["lm", "kl", "mix"] = "kl"
    """lm: next-token loss (the paper). kl: KL to the frozen full-precision model, all tokens, temperature 1."""
    mix_lm: Fraction = 0.5
    """objective mix: loss = mix_lm * LM + (1 - mix_lm) * KL."""
    hidden_weight: NonNegative = 1.0
    """With a teacher: weight of the relative squared error of every block's output, ||h_S - h_T||^2 / ||h_T||^2, a
    mean over tokens and blocks that is added to the loss."""
    hidden_error: Literal["relative", "normed"] = "relative"
    """How an output differs (losses/hidden.py). normed: after the norm that comes next, for models in which a few
    channels are most of the norm. What it was worth: docs/method.md."""
    sampled_words: Count | None = None
    """Next-token loss and KL over so many words of the vocabulary in each step (sampled softmax): its own, the corpus's
    most frequent, and others drawn anew for each step. None: all. For vocabularies whose output head is much of a
    step. What it costs and saves: docs/method.md."""
    budget_tokens: Count = 50_000_000
    sequence_length: Annotated[int, Field(ge=2, le=MOST_COUNT)] = 1024
    optim: Optim = Optim(learning_rate=1e-3, schedule="linear", weight_decay=0.0)
    """linear: 5 to 10 % less KL on held-out text than wsd with 30 % of decay (docs/log.md, run 20), whose budgets
    share a stable phase (`branch_steps`)."""
    loop: Loop = Loop(batch_rows=64)
    ternary_warmup_fraction: Fraction = 0.0
    """Share of steps over which weights are blended from full precision to ternary (lambda 0 -> 1)."""
    processes: Count | Literal["auto"] = 1
    """Stage 2 on several GPUs of one machine: so many copies of the student, one process and GPU each, share every
    step's rows. auto: one for each visible GPU, 1 on a CPU. Gradients are the same sums in another order, so neither
    this nor the number of GPUs makes another base."""
    seed: Seed | None = None
    """Of the data order; None: the recipe's. A number lets the seeds of an experiment share one base."""
    branch_steps: tuple[Count, ...] = ()
    """Keep the checkpoints of these steps: runs that differ in `budget_tokens` alone start from them (wsd only;
    see stages/branch.py). They must be multiples of `loop.checkpoint_every_steps`."""
    cache_dir: str = "~/.cache/bitdistill/bases"
    """Ternary bases are kept here under the hash of model, corpus and recipe section."""

    @model_validator(mode="after")
    def _base_or_start(self) -> PretrainConfig:
        if self.base is not None and self.start is not None:
            raise ValueError(
                "base and start are both set: base is taken as it is, start is trained further; keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _words_of_a_step(self) -> PretrainConfig:
        tokens = self.loop.batch_rows * self.sequence_length
        if self.sampled_words is not None and self.sampled_words < tokens:
            raise ValueError(
                f"sampled_words: {self.sampled_words}, but a step has {tokens} tokens (loop.batch_rows x "
                "sequence_length), all of whose words are among them; at least as many, or null for all words"
            )
        return self


class RelationConfig(Strict):
    """Attention-relation distillation L_AD (paper, Eq. 12 and 13; the sources disagree: see docs/method.md)."""

    form: Literal["scaled_dot", "cosine"] = "scaled_dot"
    """scaled_dot: softmax(A A^T / sqrt(d_r)), Eq. 12. cosine: L2-normalised rows over temperature, Algorithm 1."""
    temperature: Positive = 1.0
    """Divides the cosine relations (ignored by scaled_dot)."""
    heads: Count | None = None
    """Relation heads A_r: states are re-split into this many heads; None: the model's own heads of Q, K and V."""
    layer: (
        int
        | Literal["auto", "auto:divergence", "auto:alignment", "auto:entropy"]
        | Annotated[tuple[int, ...], Field(min_length=1)]
    ) = "auto"
    """Layer index (negative counts from the end), a list (losses are averaged), or auto: by a figure taken on a few
    batches before stage 3 (stages/layer_probe.py; auto alone is auto:divergence)."""
    alpha_q: NonNegative = 1.0
    alpha_k: NonNegative = 1.0
    alpha_v: NonNegative = 1.0


class DistillConfig(Strict):
    """Stage 3 (paper, sec. 3.3): L = L_CE + lambda * L_LD + gamma * L_AD."""

    LATER: ClassVar[Mapping[str, Any]] = {"hidden_error": "relative", "prompt_weight": 0.0, "teachers": 1}

    optim: Optim = Optim(learning_rate=2e-4)
    loop: Loop = Loop(batch_rows=32)
    epochs: Epochs = 2.0
    ce_weight: NonNegative = 1.0
    lambda_: NonNegative = Field(default=10.0, alias="lambda")
    temperature: Positive = 5.0
    tau_squared: bool = False
    """Multiply L_LD by tau^2 (PR 382 does; the paper does not)."""
    distilled_tokens: Literal["answer", "all"] = "answer"
    """Tokens of L_LD: the answer's (paper) or every real token of the row."""
    hidden_weight: NonNegative = 1.0
    """Weight of the relative squared error of every block's output (see pretrain.hidden_weight) over all real
    tokens."""
    hidden_error: Literal["relative", "normed"] = "relative"
    """See pretrain.hidden_error."""
    prompt_weight: NonNegative = 0.0
    """Weight of KL to the teacher over all real tokens that predict no answer, at temperature 1: stage 2's loss on the
    task's own text. What it was worth: docs/method.md."""
    teachers: Annotated[int, Field(ge=1, le=MOST_TEACHERS)] = 1
    """L_LD learns from the mean distribution of so many models: the run's teacher, and others fine-tuned as it is with
    the seeds after its own. What it was worth: docs/method.md. Prompts, block outputs, relations and the answers of
    unlabelled rows are the run's teacher's alone."""
    gamma: NonNegative | Literal["auto"] = "auto"
    """auto: hold the ratio of gradient norms gamma*L_AD : L_CE on the Q/K/V projections at `gamma_ratio`."""
    gamma_ratio: Positive = 1.0
    gamma_every_steps: Count = 50
    """Steps between measurements of the gradient norms (every ten in the first such span). Each costs several steps'
    time on a GPU, where other steps are replayed from a graph."""
    relation: RelationConfig = RelationConfig()

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _some_loss(self) -> DistillConfig:
        weights = (self.ce_weight, self.lambda_, self.hidden_weight, self.prompt_weight)
        if not any(weights) and self.gamma != "auto" and not self.gamma:
            raise ValueError(
                "ce_weight, lambda, gamma, hidden_weight and prompt_weight are all 0, so nothing would be learnt; "
                "set one above 0"
            )
        return self

    @model_validator(mode="after")
    def _teachers_have_a_loss(self) -> DistillConfig:
        if self.teachers > 1 and (not self.lambda_ or self.distilled_tokens != "answer"):
            raise ValueError(
                f"teachers: {self.teachers}: only L_LD at the answer's tokens learns from them; set lambda above 0 and "
                "distilled_tokens: answer, or teachers: 1"
            )
        return self


class BitNetSftConfig(Strict):
    """Baseline: the full-precision model made ternary without SubLN or stage 2, then fine-tuned on the task."""

    optim: Optim = Optim(learning_rate=2e-4)
    loop: Loop = Loop(batch_rows=32)
    epochs: Epochs = 2.0
    subln: Literal["paper", "every_linear", "none"] = "none"
    gains: Literal["ones", "calibrated"] = "calibrated"
    """calibrated: on training prompts, as many and as long as `refine` says."""

    @property
    def calibrated(self) -> bool:
        """Whether there are gains to calibrate."""
        return self.subln != "none" and self.gains == "calibrated"


class EvalConfig(Strict):
    """Scoring of every row of the results table."""

    LATER: ClassVar[Mapping[str, Any]] = {"reference_nll": True}

    engine: Literal["pytorch", "native"] = "pytorch"
    """native: the CPU engine scores teacher and students; the same predictions, on the CPU whatever `device` is."""
    batch_rows: Count = 64
    split: Literal["test", "validation"] = "test"
    bootstrap_seed: Seed = 0
    reference_nll: bool = True
    """Generation: also measure how likely each model finds the references, which takes a pass over prompts and
    references more. It tells models apart that ROUGE cannot."""


ExportFormat = Literal["packed", "hf", "gguf", "ollama"]
GgufWeights = Literal["tq1_0", "tq2_0", "i2_s"]
GgufTable = Literal["f16", "q8_0", "q6_k", "q4_k"]


class GgufConfig(Strict):
    """Formats gguf and ollama."""

    weights: GgufWeights = "tq2_0"
    """Type of the ternary tensors; i2_s is read by bitnet.cpp only."""
    table: GgufTable = "f16"
    """Type of embedding and output head."""


class ExportConfig(Strict):
    """The packed student."""

    formats: tuple[ExportFormat, ...] = ("packed",)
    """packed is always written; hf adds a folder that plain transformers loads, gguf a file for llama.cpp, ollama
    the same with a Modelfile: each where the tool can compute the student."""
    gguf: GgufConfig = GgufConfig()
    float_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Storage of embeddings, norms, gains, biases and head. Rounding happens once, before the student is scored."""


class ReportConfig(Strict):
    """The HTML report."""

    samples: Annotated[int, Field(ge=0, le=MOST_COUNT)] = 20
    """Rows shown where teacher and student differ."""


class TrackConfig(Strict):
    """Metrics always go to metrics.jsonl; these add to it."""

    tensorboard: bool = False
    trackio: bool = False


class Recipe(Strict):
    """A whole run: model and data in, packed student and report out."""

    LATER: ClassVar[Mapping[str, Any]] = {"teacher": None}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Seed = 0
    output_dir: Text = "runs"
    """The run's folder is output_dir/name (output_dir/name-seedN when the seed is not 0)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; None: all cores. Bit-exact repeats need the same number."""
    method: Literal["bitdistill", "paper"] = "bitdistill"
    """paper: the paper's literal choices become the defaults (see METHODS); single keys still override them."""
    model: ModelSource
    teacher: ModelSource | None = None
    """Another full-precision model to be fine-tuned as the teacher: of any size, family and tokenizer, for
    classification (paper, Fig. 3c). Stage 3 then distils its distribution over the labels alone, so `distill.gamma` and
    `distill.hidden_weight` must be 0. None: `model` itself."""
    task: Task
    """A section, or the name of a built-in task (resolved by recipe.py)."""
    data: DataConfig
    sft: SftConfig = SftConfig()
    refine: RefineConfig = RefineConfig()
    pretrain: PretrainConfig | None = PretrainConfig()
    """None leaves stage 2 out (an ablation)."""
    augment: AugmentConfig | None = None
    """None writes no further rows."""
    distill: DistillConfig = DistillConfig()
    bitnet_sft: BitNetSftConfig | None = BitNetSftConfig()
    """None leaves the baseline out."""
    eval: EvalConfig = EvalConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _labels_to_draw_by(self) -> Recipe:
        if self.task.kind != "classification" and self.data.rows_per_label is not None:
            raise ValueError("data.rows_per_label: a generation task has no labels; use data.limit_train")
        return self

    @model_validator(mode="after")
    def _another_teacher_gives_labels_alone(self) -> Recipe:
        """Refuses what needs a teacher of the student's own shapes and tokens."""
        if self.teacher is None:
            return self
        refused = (
            ("task.kind", self.task.kind, "classification", "two tokenizers share labels, not answers"),
            ("method", self.method, "bitdistill", "the paper's loss has attention relations of one model"),
            ("distill.gamma", self.distill.gamma, 0, "attention relations need the student's own model"),
            ("distill.hidden_weight", self.distill.hidden_weight, 0, "block outputs need the student's own model"),
            ("distill.distilled_tokens", self.distill.distilled_tokens, "answer", "only labels are distilled"),
            ("distill.prompt_weight", self.distill.prompt_weight, 0, "only labels are distilled"),
            ("distill.teachers", self.distill.teachers, 1, "one teacher's labels are distilled"),
        )  # fmt: skip
        for key, value, needed, why in refused:
            if value != needed:
                raise ValueError(
                    f"{key}: {value}, but teacher is another model ({self.teacher.path}): {why}; "
                    f"set {key}: {needed}, or teacher: null"
                )
        return self

    @property
    def teacher_source(self) -> ModelSource:
        """The model that stage sft fine-tunes as the teacher."""
        return self.teacher or self.model


# What `method:` sets, as overrides below the user's own keys. `bitdistill` is the models' defaults above.
METHODS: dict[str, dict[str, object]] = {
    "bitdistill": {},
    "paper": {
        "refine": {"subln": "paper", "gains": "ones", "quantize_activations": True},
        "pretrain": {"objective": "lm", "hidden_weight": 0.0, "sampled_words": None},
        "augment": None,
        "distill": {
            "hidden_weight": 0.0,
            "prompt_weight": 0.0,
            "teachers": 1,
            "ce_weight": 1.0,
            "lambda": 10.0,
            "temperature": 5.0,
            "tau_squared": False,
            "distilled_tokens": "answer",
            "gamma": 1e5,
            "relation": {"form": "scaled_dot", "heads": None, "alpha_q": 1.0, "alpha_k": 1.0, "alpha_v": 1.0},
        },
    },
}
