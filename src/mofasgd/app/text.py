"""Text files, plain or compressed, to tokens."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[Any]
"""1-dimensional, an unsigned integer type."""

BYTES = 256
"""Vocabulary without a tokenizer."""


def _unzstd(data: bytes) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)) as reader:
        return reader.read()


_UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress, ".zst": _unzstd}


def is_text(path: Path) -> bool:
    """Return whether a folder's file is taken as text: .txt, or .txt.xz and so on."""
    return path.suffix == ".txt" or (path.suffix in _UNPACK and Path(path.stem).suffix == ".txt")


def read_text(path: Path) -> bytes:
    """Return the file's content, decompressed by its suffix; ValueError if it is damaged."""
    data = path.read_bytes()
    unpack = _UNPACK.get(path.suffix)
    if unpack is None:
        return data
    try:
        content = unpack(data)
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"{path} is damaged or no {path.suffix} file ({error}): fetch it again") from error
    if data and not content:
        raise ValueError(f"{path} is damaged: it unpacks to nothing; fetch it again")
    return content


def pydoc_text() -> bytes:
    """Return Python's own help texts, the topics in an order that has nothing to do with their names."""
    from pydoc_data.topics import topics

    order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    return "\n\n".join(topics[name] for name in order).encode()


class Tokenizer:
    """Bytes, or a Hugging Face `tokenizer.json` whose tokens are cached on disk.

    Attributes:
        vocab_size: number of different tokens.
        name: what made the tokens, for the record.
    """

    def __init__(self, path: Path | None, cache: Path) -> None:
        self.path, self.cache, self.vocab_size = path, cache.expanduser(), BYTES
        self.name = "bytes"
        if path is not None:
            self._load(path)

    def _load(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        content = path.read_bytes()
        try:
            self._fast = Fast.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer={path} is no tokenizer.json of Hugging Face ({error})") from error
        self.vocab_size = self._fast.get_vocab_size()
        self._key = hashlib.sha256(content).hexdigest()
        self.name = f"{path.name} ({self.vocab_size} tokens, sha256 {self._key[:12]})"

    def __call__(self, content: bytes, name: str) -> Tokens:
        """Return the tokens of UTF-8 text; `name` says where it came from in errors."""
        if self.path is None:
            return np.frombuffer(content, dtype=np.uint8)
        file = self.cache / f"{hashlib.sha256(self._key.encode() + content).hexdigest()[:32]}.npy"
        if file.exists():
            try:
                return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
            except (ValueError, OSError, EOFError):
                file.unlink()  # a damaged cache is made anew
        tokens = self._encode(content, name)
        self._store(file, tokens)
        return tokens

    def _encode(self, content: bytes, name: str) -> Tokens:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it, or drop the tokenizer") from error
        lines = text.splitlines(keepends=True)
        # Pieces of some thousand lines: encode_batch works on them in parallel.
        pieces = ["".join(lines[i : i + 2000]) for i in range(0, len(lines), 2000)]
        encoded = self._fast.encode_batch(pieces, add_special_tokens=False)
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        return np.concatenate([np.array(e.ids, dtype=dtype) for e in encoded] or [np.empty(0, dtype)])

    def _store(self, file: Path, tokens: Tokens) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as out:
            np.save(out, tokens)
        part.replace(file)
