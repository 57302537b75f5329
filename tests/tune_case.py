"""Tiny models with byte tokenizers in folders, and rows of sums, for the tests of fine-tuning."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mofasgd.app.display import Display
from mofasgd.app.tune.config import FinetuneConfig, RowsConfig

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = len(SPECIAL) + 256
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def tokenizer(template=TEMPLATE):
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    found.chat_template = template
    return found


def save_llama(folder, **options):
    """Write a causal language model; attention has dropout, so that a resumed run must also find the random state."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 128, "attention_dropout": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | options), eos_token_id=2, pad_token_id=0, bos_token_id=None))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_bert(folder):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    return folder


def sums(first, count):
    return [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(first, first + count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, model, data=None, **options):
    """A run of 6 steps on sums, in `folder`."""
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    if not train.exists():
        write_rows(train, sums(0, 24))
        write_rows(validation, sums(50, 5))
    rows = {"train": str(train), "validation": str(validation), "context": 64}
    defaults = {
        "model": str(model),
        "out": folder / "run",
        "steps": 6,
        "batch_size": 4,
        "log_every": 2,
        "device": "cpu",
    }
    return FinetuneConfig(data=RowsConfig(**(rows | (data or {}))), **(defaults | {"samples": 0} | options))


def run_quietly(config):
    from mofasgd.app.tune.finetune import train

    return train(config, Display(quiet=True))
