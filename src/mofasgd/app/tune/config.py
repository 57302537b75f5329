"""Configuration of `mofasgd finetune`, `glue`, `profile` and `plan`: the field texts are the command line's help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mofasgd.app.config import Precision
from mofasgd.options import check_choice, check_number, check_whole


@dataclass
class MethodConfig:
    """What trains the model; a setting left out has the default of its method (end of this help).

    A setting that the method does not have is an error.
    """

    method: str = "mofasgd"
    """mofasgd, adamw, lora, galore, muon or adamw8bit"""
    lr: float | None = None
    """peak learning rate of the matrices (adamw, adamw8bit, lora: of all that is trained)"""
    adamw_lr: float | None = None
    """of mofasgd, galore and muon: peak learning rate of embeddings, head, norms and biases, which AdamW trains"""
    rank: int | None = None
    """of mofasgd, galore and lora"""
    alpha: float | None = None
    """of lora: the adapters' product counts alpha / rank times"""
    beta: float | None = None
    """momentum of mofasgd and muon"""
    betas: tuple[float, float] | None = None
    """of Adam, wherever it is used"""
    eps: float | None = None
    """of Adam, wherever it is used"""
    weight_decay: float | None = None
    """decoupled decay per unit of learning rate, of weights with two or more dimensions"""
    factor: list[str] | None = None
    """of mofasgd: name patterns (fnmatch) of embeddings or heads that it factors too, in place of AdamW"""
    freeze: list[str] | None = None
    """of all but lora, which freezes the whole model: name patterns of parameters that are not trained"""
    complement: float | None = None
    """of mofasgd: weight of the row-normalized part of the gradient that the momentum cannot hold; needs attach
    release or none"""
    lr_scale: Literal["none", "spectral", "match_rms_adamw"] | None = None
    """of mofasgd: how the step depends on a matrix's shape"""
    attach: Literal["auto", "sketch", "release", "none"] | None = None
    """of mofasgd: how gradients are kept out of memory (docs/attach.md)"""
    gap: int | None = None
    """of galore: steps between two SVDs"""
    scale: float | None = None
    """of galore: factor of the projected step"""
    max_grad_norm: float | None = None
    """clip the gradient's norm to this; 0: no clipping"""


@dataclass
class StepConfig(MethodConfig):
    """One optimizer step of a model."""

    model: str = ""
    """a Hugging Face model name, a folder with a saved model, or a .gguf file (its weights are dequantized)"""
    batch_size: int = 16
    """rows (packed: packs of them) per optimizer step"""
    micro_batch_size: int = 0
    """rows per forward and backward; gradients are summed over a step; 0: batch_size"""
    device: str = "auto"
    """auto (the first GPU if there is one) or cpu"""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU (float32 weights, bfloat16 products), else float32; bf16-true: bfloat16 weights"""
    gradient_checkpointing: bool = False
    """keep only the layers' inputs and compute the rest again in backward"""

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("micro_batch_size", self.micro_batch_size, 0)
        check_choice("precision", self.precision, ("auto", "float32", "bf16-mixed", "bf16-true"))
        check_choice("device", self.device, ("auto", "cpu"))
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of micro_batch_size={self.micro_batch_size}")


@dataclass
class TuneConfig(StepConfig):
    """What `finetune` and `glue` share."""

    epochs: float = 1.0
    """passes over the training rows"""
    steps: int = 0
    """optimizer steps, in place of epochs; 0: by epochs"""
    warmup: float = 0.05
    """first share of the steps, over which every learning rate grows linearly from 0"""
    cooldown: float = 0.95
    """last share of the steps, over which every learning rate falls linearly to 0"""
    log_every: int = 10
    """steps between two log lines"""
    profile_memory: int = 0
    """record the memory of this many first steps, as `mofasgd profile` does, into the run folder (glue: a folder a
    run); 0: no"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("log_every", self.log_every, 1)
        for name in ("steps", "profile_memory"):
            check_whole(name, getattr(self, name), 0)
        check_number("epochs", self.epochs, 0.0, open_low=True)
        check_number("warmup", self.warmup, 0.0, 1.0)
        check_number("cooldown", self.cooldown, 0.0, 1.0)
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup={self.warmup:g} and cooldown={self.cooldown:g} overlap: lower one of them")


@dataclass
class RowsConfig:
    """Rows to learn from: chats ("messages"), "prompt"/"completion", Alpaca or "question"/"answer"."""

    train: str = ""
    """a .jsonl, .json or .parquet file (.jsonl and .json also .gz), or a Hugging Face dataset, name[:config[:split]]"""
    validation: str = ""
    """the same for validation, of a dataset its split "test" if none is named; empty: a part of the training rows is
    held out"""
    holdout: float = 0.05
    """share of the training rows, from the end, held out when there are no validation rows"""
    context: int = 1024
    """most tokens of a row; longer rows are left out and counted"""
    packing: bool = False
    """several training rows in one sequence of `context` tokens; rows do not see each other where the attention
    implementation separates them by position (flash attention, sdpa and eager of transformers do)"""
    rows: int = 0
    """only so many of the first training rows; 0: all"""
    validation_rows: int = 0
    """only so many of the first validation rows; 0: all"""
    chat_template: Path | None = None
    """a Jinja file in place of the tokenizer's chat template"""

    def __post_init__(self) -> None:
        check_whole("data.context", self.context, 2)
        check_number("data.holdout", self.holdout, 0.0, 1.0, open_low=True)
        check_whole("data.rows", self.rows, 0)
        check_whole("data.validation_rows", self.validation_rows, 0)


@dataclass
class FinetuneConfig(TuneConfig):
    """Fine-tune a causal language model on rows of text."""

    out: Path = Path("runs/finetune")
    """run folder: config.yaml, run.json, metrics.jsonl, samples.json, checkpoints/, model/"""
    data: RowsConfig = field(default_factory=RowsConfig)
    """the data"""
    seed: int = 0
    """of the order of the rows, adapters, dropout and rounding"""
    eval_every: int = 0
    """steps between two evaluations; the first and the last step always have one; 0: only these"""
    samples: int = 3
    """validation rows whose answers the model writes before and after training, for samples.json"""
    exact_match: int = 0
    """validation rows whose written answers are compared with theirs (the number after ####), before and after"""
    max_new_tokens: int = 256
    """most tokens of a written answer"""
    checkpoint_every: int = 0
    """steps between two checkpoints; 0: only when interrupted"""
    keep_checkpoints: int = 2
    """newest checkpoints that stay"""
    save_model: bool = True
    """write the model (lora: merged, and the adapter beside it) and its tokenizer after the last step"""
    resume: bool = False
    """go on with the run in the run folder, from its newest checkpoint"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} should be below 2^32")
        for name in ("keep_checkpoints", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        for name in ("seed", "eval_every", "samples", "exact_match", "checkpoint_every"):
            check_whole(name, getattr(self, name), 0)


@dataclass
class ProfileConfig(StepConfig):
    """Record where the memory of fine-tuning goes, on random tokens."""

    out: Path = Path("runs/profile")
    """folder for memory.png, memory.json and, on a GPU, memory_snapshot.pickle for pytorch.org/memory_viz"""
    context: int = 512
    """tokens of a row"""
    steps: int = 3
    """to record, from the first on"""
    seed: int = 0
    """of adapters, tokens and rounding"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("steps", 1), ("context", 2), ("seed", 0)):
            check_whole(name, getattr(self, name), low)


@dataclass
class PlanConfig:
    """What training would take of a GPU's memory, by method; nothing of the model's size is loaded."""

    model: str = ""
    """a Hugging Face model name, or a folder with a saved model; only its configuration is read"""
    methods: str = "all"
    """mofasgd, adamw, lora, galore, muon or adamw8bit; several with commas; all"""
    batch_size: int = 1
    """rows of one forward and backward"""
    context: int = 1024
    """tokens of a row"""
    accumulate: bool = False
    """several forwards and backwards make a step: whole gradients stay from one to the next"""
    rank: int | None = None
    """of mofasgd, galore and lora; default 32"""
    attach: Literal["auto", "sketch", "release", "none"] | None = None
    """of mofasgd: how gradients are kept out of memory (docs/attach.md)"""
    complement: float | None = None
    """of mofasgd: not 0 needs attach release or none"""
    factor: list[str] | None = None
    """of mofasgd: name patterns (fnmatch) of embeddings or heads that it factors too, in place of AdamW"""
    freeze: list[str] | None = None
    """of all but lora: name patterns of parameters that are not trained"""
    gradient_checkpointing: bool = False
    """keep only the layers' inputs and compute the rest again in backward"""
    precision: Literal["bf16-true", "bf16-mixed", "float32"] = "bf16-true"
    """bf16-true: bfloat16 weights; bf16-mixed: float32 weights, bfloat16 products"""
    gpu_gb: float | None = None
    """memory of a GPU (2^30 bytes, as 80 for an H100): say whether each method fits, and the largest batch that does"""
    reserve_gb: float = 1.0
    """of gpu_gb, what is left to CUDA, libraries and the allocator's fragments"""
    json: bool = False
    """print the bytes as JSON in place of the table"""

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("context", self.context, 1)
        check_choice("precision", self.precision, ("bf16-true", "bf16-mixed", "float32"))
        check_number("reserve_gb", self.reserve_gb, 0.0)
        if self.gpu_gb is not None:
            check_number("gpu_gb", self.gpu_gb, self.reserve_gb, open_low=True)


@dataclass
class GlueConfig(TuneConfig):
    """Fine-tune an encoder on GLUE tasks, with several methods and seeds."""

    out: Path = Path("runs/glue")
    """folder for results.json, table.md and a folder per run; a second call goes on where the first ended"""
    task: str = "rte"
    """sst2, cola, rte, stsb, mnli, qnli, mrpc or qqp; several with commas; all"""
    data: str = "nyu-mll/glue"
    """a folder with TASK/train*.jsonl and TASK/dev*.jsonl (also .gz) of rows {s1, s2 for pairs, label}, or the name of
    a Hugging Face dataset with GLUE's columns"""
    context: int = 128
    """most tokens of a row; longer rows are cut and counted"""
    rows: dict[str, int] = field(default_factory=dict)
    """task -> only so many of its training rows, drawn by the first seed"""
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """label of a table row -> method with its settings; empty: the one of this configuration"""
    lrs: dict[str, list[float]] = field(default_factory=dict)
    """label (if methods is empty, the method) -> learning rates to try with the first seed; tasks report their best"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """of head, adapters, order and dropout; the first for the learning rates, the others with the best of them"""
    jobs: int = 1
    """runs at a time, each a process"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("context", self.context, 2)
        for task, count in self.rows.items():
            check_whole(f"rows of {task!r}", count, 1)
        check_whole("jobs", self.jobs, 1)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} should be one or more different whole numbers")
