"""A tiny Llama with its tokenizer and data, as LLaMA-Factory reads them, and a configuration that trains it."""

import json
from pydoc_data import topics

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The fork's keys as in its configurations.
FORK = {
    "use_mfsgd": True,
    "learning_rate_mfsgd": 1e-3,
    "learning_rate_adamw": 2e-4,
    "mfsgd_rank": 4,
    "mfsgd_beta": 0.9,
    "mfsgd_eta1": 0.5,
    "mfsgd_eta2": 0.0,
    "mfsgd_eps": 1e-8,
    "mfsgd_nesterov": False,
    "mfsgd_use_current_projection": False,
    "mfsgd_use_ones_for_nonzero_s": False,
    "mfsgd_max_value": 10,
}
OURS = {"use_mofasgd": True, "mofasgd_rank": 4, "mofasgd_lr": 0.02}


def write_model(folder):
    """Write a model of two layers and width 32, its tokenizer of 400 tokens, and four data sets to `folder`."""
    texts = list(topics.topics.items())[:32]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for _, text in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).save_pretrained(folder / "model")

    asked = [{"instruction": name, "input": ""} for name, _ in texts]
    parts = [(text[:60], text[60:120] or "nothing") for _, text in texts]
    rows = {
        "sft": [{**a, "output": p[0]} for a, p in zip(asked, parts, strict=True)],
        "dpo": [{**a, "chosen": p[0], "rejected": p[1]} for a, p in zip(asked, parts, strict=True)],
        "kto": [{**a, "output": p[0], "good": i % 2 == 0} for i, (a, p) in enumerate(zip(asked, parts, strict=True))],
    }
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    asks = {"prompt": "instruction", "query": "input"}
    pairs = {"file_name": "dpo.json", "ranking": True, "columns": {**asks, "chosen": "chosen", "rejected": "rejected"}}
    info = {
        "sft": {"file_name": "sft.json"},
        "pt": {"file_name": "sft.json", "columns": {"prompt": "output"}},
        "dpo": pairs,
        "rm": pairs,
        "kto": {"file_name": "kto.json", "columns": {**asks, "response": "output", "kto_tag": "good"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def configuration(folder, out, stage="sft", **changes):
    """Return the path of a configuration in `out` that trains the model in `folder` for three steps of 4 x 2."""
    options = {
        "model_name_or_path": str(folder / "model"),
        "stage": stage,
        "do_train": True,
        "finetuning_type": "full",
        "dataset": stage,
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 32,
        "output_dir": str(out / "trained"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-4,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_shuffling": True,
    }
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (options | changes).items() if value is not None}))
    return str(path)
