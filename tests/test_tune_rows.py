"""Rows of text: their forms and files, their tokens and what of them is learned, and what is left out."""

import gzip
import json

import pytest

pytest.importorskip("trl")

import pyarrow.parquet
from tokenizers.processors import TemplateProcessing
from tune_case import sums, tokenizer, write_rows

from mofasgd.app.tune.config import RowsConfig
from mofasgd.app.tune.encode import IGNORED, encode, load
from mofasgd.app.tune.rows import Skipped, read, read_row

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A."},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B."},
]


def learned(example, tok):
    """Return the text of the tokens that are learned."""
    return tok.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"messages": CHAT[1:3]}, "a?", "A."),
        ({"prompt": "a?", "completion": "A."}, "a?", "A."),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:3]}, "a?", "A."),
        ({"instruction": "do", "input": "", "output": "done"}, "do", "done"),
        ({"instruction": "do", "input": "this", "output": "done"}, "do\n\nthis", "done"),
        ({"question": "1+1?", "answer": "2", "id": 7}, "1+1?", "2"),
    ],
)
def test_every_form_becomes_a_chat_whose_answer_is_learned(row, asked, answer):
    tok = tokenizer()
    example = encode(tok, read_row(row))
    assert tok.decode(example.input_ids) == (
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    assert learned(example, tok) == f"{answer}<|im_end|>\n"
    assert tok.decode(example.prompt) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert example.answer == answer


def test_every_turn_of_the_assistant_is_learned_and_nothing_else():
    tok = tokenizer()
    assert learned(encode(tok, read_row({"messages": CHAT})), tok) == "A.<|im_end|>\nB.<|im_end|>\n"
    # A template that leaves earlier answers out, as those of reasoning models do with their thoughts.
    kept = "(m['content'] if loop.last or m['role'] != 'assistant' else '') +"
    forgetful = tokenizer(tok.chat_template.replace("m['content'] +", kept))
    assert learned(encode(forgetful, read_row({"messages": CHAT})), tok) == "B.<|im_end|>\n"


def test_without_a_chat_template_pairs_are_plain_text_and_chats_an_error():
    tok = tokenizer(None)
    example = encode(tok, read_row({"question": "1+1?", "answer": "2"}))
    assert tok.decode(example.input_ids) == "Question: 1+1?\nAnswer: 2<|im_end|>"
    assert learned(example, tok) == "2<|im_end|>"
    assert tok.decode(encode(tok, read_row({"prompt": "a ", "completion": "b"})).input_ids) == "a b<|im_end|>"
    with pytest.raises(ValueError, match=r"no chat template.*--data\.chat_template"):
        encode(tok, read_row({"messages": CHAT}))
    # A tokenizer that ends every text: the row ends once, and the model is not asked after an end.
    ends = [("<|im_end|>", tok.eos_token_id)]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=ends)
    assert tok("a")["input_ids"][-1] == tok.eos_token_id
    assert encode(tok, read_row({"question": "1+1?", "answer": "2"})) == example


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "no JSON object"),
        ({"text": "a"}, "with columns text where one of messages"),
        ({"question": "a", "answer": " "}, "'answer' empty"),
        ({"question": 3, "answer": "a"}, "'question' empty or no text"),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": CHAT[:2]}, "last message is not the assistant's"),
        ({"messages": CHAT[2:]}, "first message is the assistant's"),
        ({"messages": [{"content": "a"}]}, "no role"),
        ({"messages": [{"role": "user", "content": None}]}, "content is no text"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input'"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, reason):
    with pytest.raises(ValueError, match=reason):
        read_row(row)


def test_files_hold_the_same_rows(tmp_path):
    rows = sums(0, 3)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_rows(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [read("data.train", str(tmp_path / n), "train", Skipped()) for n in ("a.jsonl", "a.json", "a.jsonl.gz")]
    found.append(read("data.train", str(tmp_path / "a.parquet"), "train", Skipped()))
    contents = [[row for _, row in part] for part in found]
    assert [row.messages[0]["content"] for row in contents[0]] == ["0+1?", "1+1?", "2+1?"]
    assert all(content == contents[0] for content in contents)


def test_a_dataset_of_the_hub_has_a_name_a_configuration_and_a_split(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((*a, k["split"])) or sums(0, 2))
    for name in ("a/b", "a/b:main", "a/b:main:dev"):
        load(tokenizer(), RowsConfig(train=name, validation=name), Skipped())
    train, validation = asked[::2], asked[1::2]
    assert train == [("a/b", None, "train"), ("a/b", "main", "train"), ("a/b", "main", "dev")]
    assert validation == [("a/b", None, "test"), ("a/b", "main", "test"), ("a/b", "main", "dev")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no usable row: it is empty"),
        ("a.jsonl", "{", r"1 that is no JSON \(the first: a.jsonl:1\)"),
        ("a.json", "{}", "it holds no list of rows"),
        ("a.json", "[", r"cannot be read \(JSONDecodeError"),
        ("a.parquet", "x", "cannot be read"),
        ("a.csv", "x", r"should end in \.jsonl"),
        ("a.jsonl.gz", "x", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read("data.train", str(tmp_path / name), "train", Skipped())
    assert f"data.train={tmp_path / name}" in str(error.value)


def test_a_missing_file_and_a_missing_dataset_are_named(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for source, message in [
        (str(tmp_path / "no.jsonl"), "no such file"),
        (str(tmp_path), "it is a folder"),
        ("nobody/nothing-at-all", r"neither a file nor a dataset .*no route"),
    ]:
        with pytest.raises(ValueError, match=message):
            read("data.train", source, "train", Skipped())


def test_what_is_left_out_is_counted_with_its_first_place(tmp_path):
    rows = [*sums(0, 2), {"question": "long?" * 30, "answer": "1"}, {"question": "a"}, *sums(4, 6)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    skipped = Skipped()
    train, held_out = load(tokenizer(), RowsConfig(train=str(path), context=64, holdout=0.25), skipped)
    # 9 well-formed rows, of which a quarter is two.
    assert (len(train), len(held_out)) == (6, 2)
    assert held_out[-1].answer == "#### 10"
    assert "2 rows left out" in str(skipped)
    assert "1 longer than data.context=64 tokens (the first: a.jsonl:3)" in str(skipped)
    assert "(the first: a.jsonl:4)" in str(skipped)
    limits = {"rows": 3, "validation_rows": 1}
    limited = load(tokenizer(), RowsConfig(train=str(path), context=64, holdout=0.25, **limits), Skipped())
    assert [[row.answer for row in part] for part in limited] == [["#### 1", "#### 2", "#### 5"], ["#### 9"]]


def test_an_answer_of_which_nothing_is_predicted_is_left_out(tmp_path):
    """The first token of a sequence follows nothing."""
    rows = [{"question": "a", "answer": answer} for answer in ("7", "78", "9")]
    path = write_rows(tmp_path / "a.jsonl", rows * 2)
    only = tokenizer("{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}")
    skipped = Skipped()
    train, _ = load(only, RowsConfig(train=str(path), validation=str(path)), skipped)
    assert ([row.answer for row in train], skipped.counts.total()) == (["78", "78"], 8)


def test_nothing_left_is_an_error(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", sums(0, 4))
    with pytest.raises(ValueError, match=r"no training row: .*longer than data\.context=8.*raise data\.context"):
        load(tokenizer(), RowsConfig(train=str(path), context=8), Skipped())
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        load(tokenizer(), RowsConfig(), Skipped())
    refusing = tokenizer("{{ raise_exception('no chats today') }}")
    with pytest.raises(ValueError, match=r"4 that the chat template refuses \(no chats today\)"):
        load(refusing, RowsConfig(train=str(path)), Skipped())
