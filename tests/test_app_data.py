"""Data of the training application: sources, their damage, and windows that predict every token once."""

import gzip
import itertools
import lzma
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mofasgd.app.config import DataConfig
from mofasgd.app.data import Windows, evaluation_batches, hold_out, load
from mofasgd.app.shards import read_shard
from mofasgd.app.text import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


def test_a_shard_is_read(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes([3, 65535, 7]))
    assert read_shard(path).tolist() == [3, 65535, 7]
    path.write_bytes(shard_bytes([]))
    assert len(read_shard(path)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "less than the header"),
        (shard_bytes([1, 2], magic=7), "its first number is 7"),
        (shard_bytes([1, 2], version=2), "version 2"),
        (shard_bytes([1, 2], count=3), "says 3 tokens, its length 2"),
        (shard_bytes([1, 2])[:-1], "says 2 tokens, its length 1.5"),
    ],
)
def test_a_bad_shard_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(train=str(tmp_path / "a.bin")))


def zstd(data):
    import zstandard

    return zstandard.compress(data)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress), (".zst", zstd)])
def test_compressed_text_is_read_and_damage_is_told(tmp_path, suffix, pack):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(TEXT.encode()))
    config = DataConfig(train=str(tmp_path), context=8)
    corpus, validation = load(config)
    assert bytes(np.concatenate([*corpus.shards, *validation])) == TEXT.encode()
    packed = path.read_bytes()
    for damaged in (packed[: len(packed) // 2], b"\0" * 30):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load(config)


@pytest.fixture
def tokenizer_json(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    fast.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_json_is_used_and_its_tokens_are_cached(tmp_path, tokenizer_json, monkeypatch):
    from tokenizers import Tokenizer as Fast

    tokenizer = Tokenizer(tokenizer_json, tmp_path / "cache")
    tokens = tokenizer(TEXT.encode(), "text")
    assert tokens.tolist() == Fast.from_file(str(tokenizer_json)).encode(TEXT).ids
    (cached,) = (tmp_path / "cache").glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "_encode", lambda *_: pytest.fail("not from the cache"))
        assert tokenizer(TEXT.encode(), "text").tolist() == tokens.tolist()
    cached.write_bytes(cached.read_bytes()[:40])
    assert tokenizer(TEXT.encode(), "text").tolist() == tokens.tolist()


def test_mistakes_with_tokenizers(tmp_path, tokenizer_json):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load(DataConfig(tokenizer=bad))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9 ".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 3"):
        load(DataConfig(train=str(latin), tokenizer=tokenizer_json, cache=tmp_path))
    (tmp_path / "a.bin").write_bytes(shard_bytes([1] * 300))
    with pytest.raises(ValueError, match=r"does not apply to \.bin"):
        load(DataConfig(train=str(tmp_path / "a.bin"), tokenizer=tokenizer_json))


def test_mistakes_with_sources(tmp_path):
    (tmp_path / "a.bin").write_bytes(shard_bytes([1] * 300))
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty").mkdir()
    cases = [
        ({"train": "nowhere.txt"}, r"data\.train=nowhere\.txt: there is no such file"),
        ({"validation": "*.nothing"}, "data.validation=.*no such file"),
        ({"train": str(tmp_path / "empty")}, "the folder has no .txt"),
        ({"train": [str(tmp_path / "a.bin"), str(tmp_path / "a.txt")]}, "mixes"),
        ({"train": ["pydoc", "x"]}, "stands alone"),
        ({"train": str(tmp_path / "a.bin"), "context": 300}, "data.context=300 is longer than the data"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            load(DataConfig(**options))


def test_the_fingerprint_covers_every_token(tmp_path):
    path = tmp_path / "a.txt"
    prints = set()
    for text in (TEXT, TEXT[:-2] + "!\n", TEXT + "x"):
        path.write_text(text)
        prints.add(load(DataConfig(train=str(path), context=8))[0].fingerprint)
        prints.add(load(DataConfig(validation=str(path), context=8))[0].fingerprint)
    assert len(prints) == 6


def test_the_end_of_the_data_is_held_out_in_the_share_that_is_asked_for(tmp_path):
    for name, tokens in (("a.bin", range(600)), ("b.bin", range(600, 1000))):
        (tmp_path / name).write_bytes(shard_bytes(tokens))
    for share, begin in ((0.1, 900), (0.25, 750), (0.7, 300)):
        corpus, validation = load(DataConfig(train=str(tmp_path), context=8, holdout=share))
        assert np.concatenate(corpus.shards).tolist() == list(range(begin))
        assert np.concatenate(validation).tolist() == list(range(begin, 1000))


shard_lists = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 8)


@given(sizes=shard_lists, share=st.floats(0.01, 0.9))
def test_hold_out_splits_without_loss(sizes, share):
    ends = np.cumsum([0, *sizes])
    shards = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    training, validation = hold_out(shards, share)
    joined = np.concatenate([*training, *validation]) if ends[-1] else []
    assert list(joined) == list(range(ends[-1]))
    assert abs(sum(map(len, validation)) - share * ends[-1]) <= 1


@given(sizes=shard_lists, context=st.integers(1, 8), seed=st.integers(0, 3))
def test_windows_predict_every_token_once_a_pass_and_stay_within_a_shard(sizes, context, seed):
    shards = [np.arange(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)]
    windows = Windows(shards, context, seed)
    for epoch in range(2):
        seen = [windows[epoch * len(windows) + i] for i in range(len(windows))]
        assert all(len(w) == context + 1 and (np.diff(w) == 1).all() for w in seen)
        targets = np.concatenate([w[1:] for w in seen])
        assert len(set(targets)) == len(targets)
        for i, size in enumerate(sizes):  # all but a remainder shorter than a window
            found = ((targets >= 1000 * i) & (targets < 1000 * (i + 1))).sum()
            assert max(0, size - 1) - context < found <= max(0, size - 1)


@pytest.mark.parametrize("size", [9, 12, 16, 17])
def test_every_pass_is_cut_elsewhere_so_that_no_token_is_left_out_for_good(size):
    windows = Windows([np.arange(size), np.arange(100, 100 + size)], 8, seed=0)
    targets = {int(token) for i in range(60 * len(windows)) for token in windows[i][1:]}
    assert targets == {begin + token for begin in (0, 100) for token in range(1, size)}


def test_the_order_depends_on_seed_and_position_only():
    shards = [np.arange(1000)]
    first, second = Windows(shards, 8, 0), Windows(shards, 8, 0)
    later = second.batch(200, 5)  # without having read what comes before
    first.batch(0, 200)
    assert torch.equal(first.batch(200, 5), later)
    assert not torch.equal(first.batch(0, 100), first.batch(len(first), 100))
    assert not torch.equal(Windows(shards, 8, 1).batch(0, 100), first.batch(0, 100))


@given(sizes=shard_lists, context=st.integers(1, 8), batch=st.integers(1, 4), limit=st.integers(0, 50))
def test_evaluation_predicts_every_token_once(sizes, context, batch, limit):
    shards = [np.arange(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)]
    rows = torch.cat(list(evaluation_batches(shards, context, batch, limit)))
    targets = rows[:, 1:][rows[:, 1:] != -1].tolist()
    wanted = [token for shard in shards for token in shard[1:].tolist()]
    assert targets == wanted[: len(targets)]
    if limit == 0:
        assert len(targets) == len(wanted)
    else:
        assert min(limit, len(wanted)) <= len(targets) < limit + context
