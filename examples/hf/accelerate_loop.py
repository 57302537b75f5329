"""Accelerate without a Trainer: a tiny random Llama learns to count. Runs on a CPU in seconds.

python examples/hf/accelerate_loop.py              gradients are sketched and never kept
accelerate launch examples/hf/accelerate_loop.py   several processes: full gradients, averaged by DDP
"""

import argparse

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import mofasgd

VOCABULARY = 64


def main(steps: int = 40, micro_batches: int = 4) -> list[float]:
    """Train; return the loss of each step's last micro-batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    starts = torch.randint(0, VOCABULARY, (8 * micro_batches * steps, 1))
    rows = (starts + torch.arange(16)) % VOCABULARY

    # torchrun without a GPU: gloo, which accelerate takes when it is told.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=micro_batches)
    groups = mofasgd.param_groups(model, rank=8, lr=0.02, adamw_lr=3e-3)
    # Clipping belongs here: accelerator.clip_grad_norm_ would see AdamW's gradients only.
    opt = mofasgd.MoFaSGD(groups, max_grad_norm=1.0)
    if accelerator.num_processes == 1:
        opt.attach(model)
    # Attached first: what is prepared may be a wrapper. `opt` stays the real optimizer.
    model, optimizer, data = accelerator.prepare(model, opt, torch.utils.data.DataLoader(rows, batch_size=8))

    losses = []
    for tokens in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            # Both do nothing but after the last micro-batch of a step.
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                accelerator.print(f"step {len(losses)}  loss {losses[-1]:.3f}  gradient norm {opt.grad_norm():.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
