"""Tokens to training windows: where they come from, and a position in them that is one number."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mofasgd.app.config import DataConfig
from mofasgd.app.shards import read_shard
from mofasgd.app.text import Tokenizer, Tokens, is_text, pydoc_text, read_text


@dataclass
class Corpus:
    """Token arrays, each 1-dimensional, and what is known of them.

    Attributes:
        vocab_size: bound of the tokens; 0 if unknown (.bin shards do not say).
        fingerprint: sha256 over all shards; of arrays above 64 MB their length, first and last MB.
    """

    shards: list[Tokens]
    vocab_size: int
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(shard) for shard in self.shards)


def _fingerprint(shards: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.dtype} {len(shard)};".encode())
        if shard.nbytes <= 64 * 2**20:
            digest.update(shard.tobytes())
        else:
            end = 2**20 // shard.itemsize
            digest.update(shard[:end].tobytes() + shard[-end:].tobytes())
    return digest.hexdigest()


def _files(sources: Sequence[str], key: str) -> list[Path]:
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and (is_text(p) or p.suffix == ".bin"))
            if not inside:
                raise ValueError(f"{key}={source}: the folder has no .txt (or .txt.xz, .gz, .zst) and no .bin file")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            matches = sorted(Path(name) for name in glob.glob(str(path)))
            if not matches:
                raise ValueError(f"{key}={source}: there is no such file or folder")
            found += matches
    return found


def open_corpus(sources: Sequence[str], config: DataConfig, key: str) -> Corpus:
    """Open `sources` (as in `DataConfig.train`); `key` names them in errors.

    Raises:
        ValueError: for a missing, damaged or empty file, or text and shards together.
    """
    if "pydoc" in sources and len(sources) > 1:
        raise ValueError(f'{key}={list(sources)}: "pydoc" stands alone')
    if list(sources) == ["pydoc"]:
        tokenizer = Tokenizer(config.tokenizer, config.cache)
        shards, vocab_size = [tokenizer(pydoc_text(), "pydoc")], tokenizer.vocab_size
    else:
        files = _files(sources, key)
        binary = [path for path in files if path.suffix == ".bin"]
        if binary and len(binary) < len(files):
            raise ValueError(f"{key}={list(sources)} mixes .bin shards with text: tokenize all or nothing")
        if binary and config.tokenizer is not None:
            raise ValueError(f"data.tokenizer={config.tokenizer} does not apply to .bin shards: drop it")
        if binary:
            shards, vocab_size = [read_shard(path) for path in files], 0
        else:
            tokenizer = Tokenizer(config.tokenizer, config.cache)
            shards, vocab_size = [tokenizer(read_text(path), str(path)) for path in files], tokenizer.vocab_size
    return Corpus(shards, vocab_size, _fingerprint(shards))


def hold_out(shards: Sequence[Tokens], share: float) -> tuple[list[Tokens], list[Tokens]]:
    """Split off the last `share` of the tokens: (training, validation)."""
    left = round(sum(len(s) for s in shards) * (1 - share))
    training, validation = [], []
    for shard in shards:
        cut = min(left, len(shard))
        left -= cut
        training += [shard[:cut]] if cut else []
        validation += [shard[cut:]] if cut < len(shard) else []
    return training, validation


def load(config: DataConfig) -> tuple[Corpus, list[Tokens]]:
    """Return the training corpus, whose fingerprint covers all data, and the validation shards.

    Raises:
        ValueError: for unusable sources, or if a sequence does not fit into the data.
    """
    corpus = open_corpus(config.train, config, "data.train")
    if config.validation:
        other = open_corpus(config.validation, config, "data.validation")
        validation = other.shards
        corpus.fingerprint = hashlib.sha256((corpus.fingerprint + other.fingerprint).encode()).hexdigest()
    else:
        corpus.shards, validation = hold_out(corpus.shards, config.holdout)
    longest = max((len(shard) for shard in corpus.shards), default=0)
    if longest <= config.context:
        raise ValueError(
            f"data.context={config.context} is longer than the data: the longest of {len(corpus.shards)} training "
            f"file(s) has {longest} tokens; lower data.context or give more text"
        )
    if sum(max(0, len(shard) - 1) for shard in validation) == 0:
        raise ValueError("there are no validation tokens: give data.validation, or raise data.holdout")
    return corpus, validation


def check_vocabulary(tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a token has no row in the model."""
    if int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"the data has token {int(tokens.max())}, but the model's vocabulary has {vocab_size}: raise "
            "model.vocab_size"
        )


class Windows:
    """Sequences of context + 1 tokens in a random order, each token predicted once per pass over the data.

    The order is a function of the seed alone and a position in it is one number, so that a run resumes where it
    stopped. Windows do not cross from one shard into the next.
    """

    def __init__(self, shards: Sequence[Tokens], context: int, seed: int) -> None:
        self.shards, self.context, self.seed = shards, context, seed
        per_shard = [max(0, len(shard) - 1) // context for shard in shards]
        self.ends = np.cumsum(per_shard)
        self.slack = [max(0, len(s) - 1) - n * context for s, n in zip(shards, per_shard, strict=True)]
        self._epoch = -1

    def __len__(self) -> int:
        """Number of windows in one pass."""
        return int(self.ends[-1])

    def _enter(self, epoch: int) -> None:
        random = np.random.default_rng([self.seed, epoch])
        # Another cut in each pass: boundaries between windows are not always at the same tokens.
        self._offsets = [int(random.integers(slack + 1)) for slack in self.slack]
        self._order = random.permutation(len(self))
        self._epoch = epoch

    def __getitem__(self, position: int) -> Tokens:
        """Return window number `position`, counted over all passes."""
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._enter(epoch)
        number = int(self._order[place])
        shard = int(np.searchsorted(self.ends, number, side="right"))
        within = number - (int(self.ends[shard - 1]) if shard else 0)
        begin = self._offsets[shard] + within * self.context
        return self.shards[shard][begin : begin + self.context + 1]

    def batch(self, position: int, count: int) -> Tensor:
        """Return windows position ... position + count - 1 as int64 (count, context + 1)."""
        rows = np.stack([self[position + i] for i in range(count)])
        return torch.from_numpy(rows.astype(np.int64))


def evaluation_batches(shards: Sequence[Tokens], context: int, batch_size: int, limit: int) -> Iterator[Tensor]:
    """Yield int64 (<= batch_size, context + 1) that predict every token once, in order, -1 after the end of a shard.

    Args:
        limit: tokens to predict at most, rounded up to whole sequences; 0: all.
    """
    rows: list[Tokens] = []
    left = limit or sum(map(len, shards))
    for shard in shards:
        for begin in range(0, len(shard) - 1, context):
            if left <= 0:
                break
            piece = shard[begin : begin + context + 1].astype(np.int64)
            left -= len(piece) - 1
            rows.append(np.pad(piece, (0, context + 1 - len(piece)), constant_values=-1))
            if len(rows) == batch_size:
                yield torch.from_numpy(np.stack(rows))
                rows = []
    if rows:
        yield torch.from_numpy(np.stack(rows))
