"""TRL's trainers with MoFaSGD: SFT by argument, DPO by attribute."""

import pytest
import torch

pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from hf_case import VOCABULARY, Watch, logged, make  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from mofasgd.hf import trainer_kwargs  # noqa: E402

COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "max_grad_norm": 0.5,
}


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def texts(seed, count=24, length=9):
    numbers = torch.randint(0, VOCABULARY - 2, (count, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{i}" for i in row) for row in numbers.tolist()]


def check(trainer, watch, before):
    assert watch.held == set()
    assert logged(trainer) == watch.norms
    assert min(watch.norms) > 0
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items() if value.ndim == 2)
    assert trainer.optimizer.optimizer.max_grad_norm is None
    assert trainer.args.max_grad_norm == 0.5


# Checkpointing is on by default in TRL, and the loss reads head.weight itself, a piece at a time.
def test_sft(tmp_path):
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, **COMMON)
    model, watch = make("llama"), Watch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kwargs = trainer_kwargs(args, rank=4, lr=0.02, factor=["lm_head.weight"])
    kwargs["callbacks"].append(watch)
    data = datasets.Dataset.from_dict({"text": texts(0)})
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **kwargs)
    trainer.train()
    check(trainer, watch, before)


def test_dpo(tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=24, **COMMON)
    model, watch = make("llama"), Watch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kwargs = trainer_kwargs(args, rank=4, lr=0.02)
    kwargs["callbacks"].append(watch)
    data = datasets.Dataset.from_dict(
        {"prompt": [text + " " for text in texts(1)], "chosen": texts(2), "rejected": texts(3)}
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=make("llama"),
        args=args,
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=kwargs["callbacks"],
    )
    trainer.optimizer_cls_and_kwargs = kwargs["optimizer_cls_and_kwargs"]
    trainer.train()
    check(trainer, watch, before)
