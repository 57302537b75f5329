"""Configuration of the training application: the field texts are the command line's help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mofasgd.options import check_choice, check_number, check_whole

Settings = dict[str, Any]
"""Of an optimizer, defaults filled in, by the names of `OptimizerConfig`."""

Precision = Literal["auto", "float32", "bf16-mixed", "bf16-true"]


@dataclass
class ModelConfig:
    """The GPT of `mofasgd.app.model`."""

    layers: int = 4
    """transformer blocks"""
    width: int = 192
    """channels of the residual stream, a multiple of 2 * heads"""
    heads: int = 6
    """attention heads"""
    vocab_size: int = 0
    """rows of embedding and head; 0: the tokenizer's vocabulary, rounded up to a multiple of 64 (256 for bytes)"""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            check_whole(f"model.{name}", getattr(self, name), 1)
        check_whole("model.vocab_size", self.vocab_size, 0)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width={self.width} is no multiple of 2 * heads = {2 * self.heads}: rotary positions turn "
                "pairs of channels"
            )


@dataclass
class DataConfig:
    """Where tokens come from."""

    train: list[str] | str = "pydoc"
    """training data: "pydoc" (Python's help texts, always there), or a list of text files and folders (.txt, also .xz,
    .gz, .zst) or of .bin token shards as modded-nanogpt writes them; shell patterns are allowed"""
    validation: list[str] | str = field(default_factory=list)
    """the same for validation; empty: a part of the training data is held out"""
    holdout: float = 0.1
    """share of the training data held out when there is no validation data"""
    tokenizer: Path | None = None
    """a Hugging Face tokenizer.json; none: bytes. Does not apply to .bin shards"""
    context: int = 128
    """tokens that a sequence predicts"""
    cache: Path = Path("~/.cache/mofasgd")
    """folder for tokenized text, so that the second start is fast"""

    def __post_init__(self) -> None:
        check_whole("data.context", self.context, 1)
        check_number("data.holdout", self.holdout, 0.0, 1.0, open_low=True)
        self.train = [self.train] if isinstance(self.train, str) else self.train
        self.validation = [self.validation] if isinstance(self.validation, str) else self.validation
        if not self.train:
            raise ValueError('data.train is empty: name a file or folder, or "pydoc"')


@dataclass
class OptimizerConfig:
    """Which optimizer, with which settings; a setting left out has the default of its method (end of this help).

    A setting that the optimizer does not have is an error.
    """

    name: str = "mofasgd"
    """mofasgd, adamw, adam, sgd, muon, galore or row_norm (row-normalized SGD, without any state); authors_mfsgd,
    authors_adamw, ...: as the authors of MoFaSGD set them up (docs/coming-from-the-authors-code.md)"""
    lr: float | None = None
    """peak learning rate of the matrices (for sgd of everything)"""
    adamw_lr: float | None = None
    """peak learning rate of embedding and head, which every method but sgd trains with Adam"""
    head_lr: float | None = None
    """of authors_*: peak learning rate of the head; adamw_lr is then the embedding's"""
    rank: int | None = None
    """of mofasgd and galore"""
    beta: float | None = None
    """momentum of mofasgd, muon and sgd"""
    beta_start: float | None = None
    """momentum at step 0, growing linearly to beta over beta_warmup_steps"""
    beta_warmup_steps: int | None = None
    """steps of the momentum's growth; 0: beta from the start"""
    betas: tuple[float, float] | None = None
    """of Adam, wherever it is used"""
    eps: float | None = None
    """of Adam, wherever it is used"""
    weight_decay: float | None = None
    """decay per unit of learning rate: decoupled; an L2 penalty in adam and sgd"""
    complement: float | None = None
    """of mofasgd: weight of the row-normalized part of the gradient that the momentum cannot hold; 0: the paper's"""
    lr_scale: Literal["none", "spectral", "match_rms_adamw"] | None = None
    """of mofasgd: how the step depends on a matrix's shape"""
    attach: Literal["auto", "sketch", "release", "none"] | None = None
    """of mofasgd: how gradients are kept out of memory (docs/attach.md); with a complement each matrix is stepped
    during backward, where one backward a step and no clipping allow it; none: whole gradients"""
    gap: int | None = None
    """of galore: steps between two SVDs"""
    scale: float | None = None
    """of galore: factor of the projected step"""
    eta1: float | None = None
    """of authors_mfsgd: factor of the momentum's step"""
    eta2: float | None = None
    """of authors_mfsgd: factor of the gradient's part that the momentum cannot hold, as it is"""
    clip_eps: float | None = None
    """of authors_mfsgd: directions with a singular value up to this do not move"""
    max_value: float | None = None
    """of authors_mfsgd: largest reciprocal of a singular value"""
    use_current_projection: bool | None = None
    """of authors_mfsgd: eta2's part is what the new momentum cannot hold, not the old one"""
    use_ones_for_nonzero_s: bool | None = None
    """of authors_mfsgd: 1 in place of the reciprocals"""
    nesterov: bool | None = None
    """of authors_mfsgd, authors_muon and authors_sgd"""
    ns_steps: int | None = None
    """of authors_muon: Newton-Schulz steps"""
    gradient_scale: float | None = None
    """of authors_*: factor of all gradients; theirs are sums over the micro-batches of a GPU"""
    max_grad_norm: float | None = None
    """clip the gradient's norm to this; 0: no clipping"""


@dataclass
class PretrainConfig:
    """Train a compact GPT from scratch."""

    out: Path = Path("runs/pretrain")
    """run folder: config.yaml, run.json, metrics.jsonl, checkpoints/"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """the model"""
    data: DataConfig = field(default_factory=DataConfig)
    """the data"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer"""
    steps: int = 300
    """optimizer steps"""
    batch_size: int = 32
    """sequences per step, of all ranks together"""
    micro_batch_size: int = 0
    """sequences per forward and backward of a rank; gradients are summed over a step; 0: all that it has"""
    warmup: float = 0.05
    """first share of the steps, over which every learning rate grows linearly from 0"""
    cooldown: float = 0.4
    """last share of the steps, over which every learning rate falls linearly to 0"""
    seed: int = 0
    """of weights, order of the data and rounding"""
    device: str = "auto"
    """auto (a GPU if there is one), or as in torch.device"""
    gpus: int = 1
    """GPUs of this machine to train on, a process each (docs/torchrun.md); with device=cpu: processes"""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU (float32 weights, bfloat16 products), else float32; bf16-true: bfloat16 weights"""
    compile: bool = False
    """compile the model with torch.compile"""
    eval_every: int = 50
    """steps between two evaluations; the last step is always followed by one"""
    eval_tokens: int = 0
    """validation tokens per evaluation; 0: all"""
    log_every: int = 10
    """steps between two log lines"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard into the run folder (needs: pip install tensorboard)"""
    wandb: str = ""
    """also send the metrics to this Weights & Biases project (needs: pip install wandb)"""
    checkpoint_every: int = 0
    """steps between two checkpoints; 0: only after the last step and when interrupted"""
    save_last: bool = True
    """write a checkpoint after the last step"""
    keep_checkpoints: int = 2
    """newest checkpoints that stay"""
    memory_history: tuple[int, int] | None = None
    """record a GPU's allocations from after the first of these steps (0: from the start) to after the second, into
    memory.pickle in the run folder (for pytorch.org/memory_viz)"""
    resume: bool = False
    """go on with the run in the run folder, from its newest checkpoint"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "log_every", "keep_checkpoints", "gpus"):
            check_whole(name, getattr(self, name), 1)
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} should be below 2^63")
        for name in ("micro_batch_size", "eval_tokens", "checkpoint_every", "seed"):
            check_whole(name, getattr(self, name), 0)
        check_number("warmup", self.warmup, 0.0, 1.0)
        check_number("cooldown", self.cooldown, 0.0, 1.0)
        check_choice("precision", self.precision, ("auto", "float32", "bf16-mixed", "bf16-true"))
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of micro_batch_size={self.micro_batch_size}")
        if self.memory_history is not None:
            begin, end = self.memory_history
            check_whole("memory_history", begin, 0)
            check_whole("memory_history", end, begin + 1)
            if end > self.steps:
                raise ValueError(f"memory_history={begin},{end} ends after the last step, steps={self.steps}: lower it")
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup={self.warmup:g} and cooldown={self.cooldown:g} overlap: lower one of them")


@dataclass
class ExportConfig:
    """Write the weights of a run as a safetensors file."""

    out: Path = Path("runs/pretrain")
    """run folder of `mofasgd pretrain`, whose newest checkpoint is read"""
    to: Path | None = None
    """file to write; none: model.safetensors in the run folder"""


@dataclass
class CompareConfig:
    """Train the same model on the same tokens with several optimizers and report side by side."""

    out: Path = Path("runs/compare")
    """folder for the runs, results.json and report.png; a second call goes on where the first ended"""
    base: PretrainConfig = field(default_factory=PretrainConfig)
    """what all runs share, but for out, seed, resume and optimizer"""
    methods: dict[str, OptimizerConfig] = field(default_factory=dict)
    """label of a row -> optimizer"""
    lrs: dict[str, list[float]] = field(default_factory=dict)
    """label -> learning rates to try, in place of the optimizer's own; the best one is reported"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """the first for the learning rates; the others only with the best of them, to report a spread"""
    jobs: int = 1
    """runs at a time, each a process; losses do not depend on it, times do"""
