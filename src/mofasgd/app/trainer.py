"""Model, optimizers and data of one run: a training step, an evaluation, and their whole state."""

from __future__ import annotations

import contextlib
import warnings
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mofasgd.app.baselines import build, state_bytes
from mofasgd.app.config import PretrainConfig
from mofasgd.app.data import Windows, check_vocabulary, evaluation_batches, load
from mofasgd.app.model import GPT, token_loss
from mofasgd.app.ranks import Ranks
from mofasgd.app.schedule import apply_schedule, lr_multiplier
from mofasgd.app.usage import peak_megabytes
from mofasgd.attach import Handle
from mofasgd.optimizer import MoFaSGD

SAMPLE = 2**20
"""Tokens of every shard that are checked before the first step."""


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Return the device; "auto" is a GPU if there is one, among several ranks each its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks is not None and ranks.world > 1 and name != "cpu":
        if name != "cuda":
            raise ValueError(f"device={name!r} would be every rank's: use device=auto, cuda or cpu with several ranks")
        if ranks.local_world > torch.cuda.device_count():
            raise ValueError(
                f"{ranks.local_world} ranks need as many GPUs: this machine has {torch.cuda.device_count()}"
            )
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} is not usable here ({reason}): try device=auto") from error
    return device


def _vocabulary(asked: int, known: int) -> int:
    """Return the model's vocabulary; ValueError if tokens have no row, or nothing says how many there are."""
    if asked == 0 and known == 0:
        raise ValueError(
            "model.vocab_size is not given and .bin shards do not say it: set it, 50304 for GPT-2 tokens (FineWeb)"
        )
    if asked and known > asked:
        raise ValueError(f"model.vocab_size={asked} is smaller than the tokenizer's vocabulary {known}: raise it")
    return asked or -(-known // 64) * 64


def _parts(config: PretrainConfig, world: int) -> tuple[int, int]:
    """Return the sequences of a step that each of `world` ranks takes, and those of one forward and backward."""
    share, rest = divmod(config.batch_size, world)
    if rest:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {world} ranks: make it a multiple")
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise ValueError(
            f"batch_size={config.batch_size} is {share} sequences for each of {world} ranks, no multiple of "
            f"micro_batch_size={micro}"
        )
    return share, micro


class Trainer:
    """One run's model, optimizers and data.

    Among several ranks each takes an equal part of every batch, so that the data position is one number and the same
    for any number of them.

    Attributes:
        step: optimizer steps done; the data position is step * batch_size windows.
        share: sequences of a step that are this rank's.
        settings: of the optimizer, defaults filled in.
        gradient_bytes: held between backward and step, sketches included; known after the last step.
        fingerprint: of the data.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks | None = None) -> None:
        self.config, self.step = config, 0
        self.ranks = ranks or Ranks()
        self.share, self.micro_batch_size = _parts(config, self.ranks.world)
        self.device = self.ranks.together(lambda: choose_device(config.device, ranks))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # Tokenized text is cached: one process a machine has to make it.
        corpus, self.validation = self.ranks.lead_first(lambda: load(config.data))
        self.fingerprint, self.train_tokens = corpus.fingerprint, corpus.tokens
        self._check_data_alike()
        self.vocab_size = _vocabulary(config.model.vocab_size, corpus.vocab_size)
        for shard in [*corpus.shards, *self.validation]:
            # What can be wrong is mostly wrong from the start on; each batch is checked as well.
            check_vocabulary(int(shard[:SAMPLE].max(initial=0)), self.vocab_size)
        self.windows = Windows(corpus.shards, config.data.context, config.seed)

        torch.manual_seed(config.seed)
        size = config.model
        self.model = GPT(
            self.vocab_size, config.data.context, layers=size.layers, width=size.width, heads=size.heads
        ).to(self.device)
        self.precision = config.precision
        if self.precision == "auto":
            self.precision = "float32" if self.device.type == "cpu" else "bf16-mixed"
        if self.precision == "bf16-true":
            for param in self.model.parameters():  # rotations stay float32
                param.data = param.data.bfloat16()
        self.optimizers, self.settings = build(self.model, config.optimizer, config.seed)
        self.handle: Handle | None = None
        self.gradient_bytes: int | None = None
        if self.settings.get("attach", "none") != "none":
            self._attach(self.settings["attach"])
        self.forward: nn.Module = self.model
        self._compile()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _check_data_alike(self) -> None:
        """Raise ValueError if some machine has other data."""
        first, *others = self.ranks.gather(self.fingerprint)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ValueError(
                    f"rank {rank} has other data than rank 0 (the checksums differ): give all machines the same"
                )

    def _compile(self) -> None:
        if self.config.compile:
            # Many runs in one process would reach the limit of recompilations and go on without it.
            torch.compiler.reset()
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]

    def connect(self) -> None:
        """Let the gradients of all ranks be averaged; collective, once every rank has come so far."""
        if self.ranks.world > 1:
            # Every rank has made the same buffers. torch 2.13 has another name for it, which 2.11 does not know.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.forward = DistributedDataParallel(
                    self.model, broadcast_buffers=False, gradient_as_bucket_view=True
                )
            self._compile()

    def _attach(self, mode: str) -> None:
        """Keep gradients out of memory; `mode` as in `OptimizerConfig.attach`."""
        config, (optimizer,) = self.config, self.optimizers
        assert isinstance(optimizer, MoFaSGD)
        if not self.settings["complement"] or mode == "sketch":
            self.handle = optimizer.attach(self.model, mode=mode)
            return
        # The complement reads the gradient itself: a matrix has to be stepped while its gradient exists.
        whole = self.micro_batch_size == self.share and not self.settings["max_grad_norm"]
        if whole:
            self.handle = optimizer.attach(self.model, mode="release", step_in_backward=True)
        elif mode == "release":
            raise ValueError(
                "optimizer.attach='release' with a complement steps during backward: leave out micro_batch_size="
                f"{config.micro_batch_size} and optimizer.max_grad_norm={self.settings['max_grad_norm']:g}, or use "
                "optimizer.attach=none"
            )

    def _held(self) -> int:
        """Return the bytes of gradients, or of sketches in their place, between backward and step."""
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        sketches = 0 if self.handle is None else self.handle.nbytes
        return sketches + sum(grad.numel() * grad.element_size() for grad in grads)

    def _unsynced(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Leave the gradients of all micro-batches but the last one to be averaged with it."""
        parallel = getattr(self.forward, "_orig_mod", self.forward)
        if last or not isinstance(parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return parallel.no_sync()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16-mixed":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _to_device(self, windows: Tensor) -> Tensor:
        check_vocabulary(int(windows.max()), self.vocab_size)
        if self.device.type == "cuda":
            windows = windows.pin_memory()
        return windows.to(self.device, non_blocking=True)

    def _batch(self) -> Tensor:
        """Return this rank's part of the step's windows."""
        position = self.step * self.config.batch_size + self.ranks.rank * self.share
        return self._to_device(self.windows.batch(position, self.share))

    def train_step(self) -> Tensor:
        """Take one optimizer step; return this rank's mean loss per token before it, 0-dim on the device."""
        config = self.config
        multiplier = lr_multiplier(self.step, config.steps, config.warmup, config.cooldown)
        apply_schedule(self.optimizers, self.settings, multiplier, self.step)
        windows = self.ranks.together(self._batch)
        # By the tokens of the rank's whole step: the result does not depend on the micro-batches, and the ranks' mean,
        # which their gradients are averaged to, is that over all tokens.
        tokens = windows[:, 1:].numel()
        total = torch.zeros((), device=self.device)
        micros = torch.split(windows, self.micro_batch_size)
        for number, micro in enumerate(micros, 1):
            with self._unsynced(number == len(micros)):
                with self._autocast():
                    loss, _ = token_loss(self.forward, micro)
                (loss / tokens * self.settings.get("gradient_scale", 1.0)).backward()
            total += loss.detach()
        if self.step + 1 == config.steps:
            self.gradient_bytes = self._held()
        clip = self.settings.get("max_grad_norm", 0.0)
        if clip and not isinstance(self.optimizers[0], MoFaSGD):  # which clips by itself
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total / tokens

    def evaluate(self) -> float:
        """Return the validation loss in nats per token; each rank evaluates its part of the batches."""
        loss, count = self.ranks.total(*self.ranks.together(self._evaluate_part))
        return loss / count

    @torch.no_grad()
    def _evaluate_part(self) -> tuple[float, int]:
        """Return the summed loss of this rank's validation batches and their tokens."""
        config, ranks = self.config, self.ranks
        batches = evaluation_batches(self.validation, config.data.context, self.micro_batch_size, config.eval_tokens)
        # Summed on the host: not every device has float64.
        loss, count = 0.0, 0
        for windows in islice(batches, ranks.rank, None, ranks.world):
            with self._autocast():
                batch_loss, batch_count = token_loss(self.forward, self._to_device(windows))
            loss += float(batch_loss)
            count += int(batch_count)
        return loss, count

    def state(self) -> dict[str, Any]:
        """Return all that a run needs to go on, tensors and plain values only; collective."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.ranks.gather(rng),
            "data": {"fingerprint": self.fingerprint, "windows": self.step * self.config.batch_size},
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take over a checkpoint.

        Raises:
            ValueError: if it was made with other data.
        """
        if content["data"]["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data is not what the run was started with (its checksum differs): put it back, or start "
                "another run with another --out"
            )
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        states = content["rng"] if isinstance(content["rng"], list) else [content["rng"]]  # one before there were ranks
        # Nothing of the training draws from torch's generators: a rank that was not there may take any.
        rng = states[self.ranks.rank % len(states)]
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.step = content["step"]

    def state_megabytes(self) -> float:
        """Return the size of the optimizers' state in MB (10^6 bytes)."""
        return state_bytes(self.optimizers) / 1e6

    def peak_megabytes(self) -> float:
        """Return the peak memory in MB: allocated on a GPU, resident on a CPU."""
        return peak_megabytes(self.device)
