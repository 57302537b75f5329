"""Train a small byte-level GPT on Python's own help texts (`pydoc_data.topics`) and print the validation loss.

python examples/train_gpt.py --optimizer mofasgd --complement 2
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

import mofasgd

CONTEXT = 128
norm = lambda x: F.rms_norm(x, x.shape[-1:])  # noqa: E731


class Block(nn.Module):
    """Attention with rotary positions and normalized queries and keys, then a squared-ReLU MLP; both pre-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for last in (self.out, self.down):  # every block starts as the identity
            nn.init.zeros_(last.weight)

    def forward(self, x, cos, sin):
        batch, time, width = x.shape
        q, k, v = self.qkv(norm(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        (a, b), (c, d) = norm(q).chunk(2, dim=-1), norm(k).chunk(2, dim=-1)
        q = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        k = torch.cat([c * cos - d * sin, c * sin + d * cos], dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, time, width))
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """Bytes (batch, CONTEXT) to next-byte logits (batch, CONTEXT, 256)."""

    def __init__(self, layers=4, width=192, heads=6):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)
        channels = width // heads // 2
        angles = torch.arange(CONTEXT)[:, None] * 1000.0 ** (-torch.arange(channels) / channels)
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, *self.rotation)
        return self.head(norm(x))


def load():
    """Return training and validation bytes as int64; every tenth topic is held out."""
    names = sorted(topics)
    held = set(names[::10])
    parts = ("\n\n".join(topics[n] for n in names if (n in held) is validation) for validation in (False, True))
    return [torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8).long() for part in parts]


def make_optimizer(model, args):
    """Return the optimizer of the flag; beside mofasgd, AdamW trains embedding and head at --adamw-lr."""
    lr = {"adamw": 3e-3, "mofasgd": 0.02}[args.optimizer] if args.lr is None else args.lr
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    options = {"rank": args.rank, "lr": lr, "adamw_lr": args.adamw_lr, "complement": args.complement}
    groups = mofasgd.param_groups(model, head=model.head, **options)
    print(groups)
    return mofasgd.MoFaSGD(groups)


def loss_of(model, windows):  # (batch, CONTEXT + 1) bytes
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(model, optimizer, steps, batch, seed):
    """Train with warm-up, constant rate and linear cooldown; return the validation loss in nats per byte."""
    text, held_out = (data.to(model.head.weight.device) for data in load())
    shape = lambda step: min(1, (step + 1) / (0.05 * steps), (steps - step) / (0.4 * steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (batch,), generator=generator).tolist()
        loss = loss_of(model, torch.stack([text[i : i + CONTEXT + 1] for i in starts]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}  training loss {loss.item():.3f}", flush=True)
    with torch.no_grad():  # whole batches only
        losses = [loss_of(model, part) for part in held_out.unfold(0, CONTEXT + 1, CONTEXT).split(64)[:-1]]
    return torch.stack(losses).mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["mofasgd", "adamw"], default="mofasgd")
    parser.add_argument("--lr", type=float, help="default 0.02 for mofasgd, 0.003 for adamw")
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="of embedding and head beside mofasgd")
    parser.add_argument("--rank", type=int, default=8, help="of mofasgd (default 8)")
    parser.add_argument("--complement", type=float, default=0.0, help="of mofasgd (default 0, the paper's step)")
    parser.add_argument("--steps", type=int, default=300, help="of 32 x 128 bytes (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = GPT()
    validation = train(model, make_optimizer(model, args), args.steps, batch=32, seed=args.seed)
    print(f"{args.optimizer}: validation loss {validation:.4f} after {args.steps} steps")
