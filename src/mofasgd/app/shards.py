"""Token shards in the .bin format of modded-nanogpt (and of its FineWeb download): 256 int32, then uint16 tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mofasgd.app.text import Tokens

MAGIC, VERSION, HEADER = 20240520, 1, 256
"""First two numbers of the header, and its length in int32; the third number is the count of tokens."""


def read_shard(path: Path) -> Tokens:
    """Return the shard's tokens, memory-mapped; ValueError if header and length do not fit."""
    size, head = path.stat().st_size, 4 * HEADER
    if size < head:
        raise ValueError(f"{path} has {size} bytes, less than the header of a token shard ({head}): fetch it again")
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    if header[0] != MAGIC:
        raise ValueError(f"{path} is no token shard: its first number is {header[0]}, not {MAGIC}")
    if header[1] != VERSION:
        raise ValueError(f"{path} is a token shard of version {header[1]}: only version {VERSION} is known")
    if size != head + 2 * int(header[2]):
        raise ValueError(
            f"{path} is truncated or damaged: its header says {header[2]} tokens, its length {(size - head) / 2:g}; "
            "fetch it again"
        )
    if size == head:
        return np.empty(0, dtype="<u2")  # nothing to map
    return np.memmap(path, dtype="<u2", mode="r", offset=head)
