"""Tiny models, data and a Trainer with MoFaSGD, for the tests of mofasgd.hf; one training loop written by hand."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mofasgd import MoFaSGD, param_groups
from mofasgd.hf import trainer_kwargs

VOCABULARY, LENGTH, MICRO, STEPS = 64, 12, 4, 30
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def gpt2():
    # With dropout: a resumed run must also find torch's generator where it was.
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def bert():
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(**SIZES, **none))
    # It takes num_items_in_batch but ignores it; Trainer would leave the division by the micro-batches to it.
    model.accepts_loss_kwargs = False
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def samples(count=44):
    """22 micro-batches of 2: the sixth window of an epoch has two of them, not four."""
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(path, **changes):
    options = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": MICRO,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(**(options | changes))


def trainer_of(model, args, callbacks=(), model_init=None, **options):
    kwargs = trainer_kwargs(args, callbacks=callbacks, **({"rank": 4, "lr": 0.02} | options))
    data = {"train_dataset": samples(), "eval_dataset": samples(6)}
    return Trainer(model=model, model_init=model_init, args=args, **data, **kwargs)


class Watch(TrainerCallback):
    """Records, after each step, the optimizer's norm and which factored parameters hold a gradient."""

    def __init__(self):
        self.norms, self.held = [], set()

    def on_optimizer_step(self, args, state, control, *, model, optimizer, **kwargs):
        opt = optimizer.optimizer
        self.norms.append(opt.grad_norm().item())
        groups = (group for group in opt.param_groups if group["algorithm"] == "mofasgd")
        self.held |= {tuple(p.shape) for group in groups for p in group["params"] if p.grad is not None}


def logged(trainer, key="grad_norm"):
    return [line[key] for line in trainer.state.log_history if key in line]


def square_norm(group, p, before):
    """|Ghat|^2 of one parameter from its full gradient, |M_1|^2 in its first window; AdamW: |G|^2. In float64."""
    G = p.grad.double()
    if group["algorithm"] == "adamw":
        return G.square().sum()
    U, s, V = (t.double() for t in before)
    if not s.any():
        # Matrices as small as these start from the gradient itself.
        return torch.linalg.svdvals(G)[: group["rank"]].square().sum()
    U, V = U[:, s > 1e-5 * s[0]], V[:, s > 1e-5 * s[0]]
    L, R = U @ U.T, V @ V.T
    return (L @ G + G @ R - L @ G @ R).square().sum()


def by_hand(model, args, attach, steps=STEPS, **options):
    """Train BERT's kind of loss (a mean over each micro-batch) as a Trainer does, without one.

    Returns the optimizer's norms, and the same from full gradients where these are kept.
    """
    opt = MoFaSGD(
        param_groups(model, rank=4, lr=0.02, adamw_lr=1e-3, **options),
        adamw_betas=(0.9, 0.999),
        seed=args.seed,
        max_grad_norm=args.max_grad_norm or None,
    )
    if attach != "none":
        opt.attach(model, attach)
    decline = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    batches = torch.stack([row["input_ids"] for row in samples()]).split(2)
    windows = [batches[i : i + MICRO] for i in range(0, len(batches), MICRO)]
    norms, independent = [], []
    model.train()
    for step in range(steps):
        window = windows[step % len(windows)]
        for tokens in window:
            (model(input_ids=tokens, labels=tokens).loss / len(window)).backward()
        pairs = [(g, p) for g in opt.param_groups for p in g["params"]]
        before = [opt.factors(p) if g["algorithm"] == "mofasgd" else None for g, p in pairs]
        opt.step()
        norms.append(opt.grad_norm().item())
        if attach == "none":
            squares = [square_norm(g, p, f) for (g, p), f in zip(pairs, before, strict=True)]
            independent.append(torch.stack(squares).sum().sqrt().item())
        decline.step()
        opt.zero_grad()
    return norms, independent
