"""Accelerate without a Trainer: a tiny random Llama learns to count. Runs on a CPU in seconds.

python examples/hf/accelerate_loop.py              one process
accelerate launch examples/hf/accelerate_loop.py   several (DDP): ranks exchange sketches in place of gradients
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

    # torchrun without a GPU: gloo, which accelerate takes when it is told.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=micro_batches)
    # Processes take batches in turn.
    starts = torch.randint(0, VOCABULARY, (8 * micro_batches * steps * accelerator.num_processes, 1))
    rows = (starts + torch.arange(16)) % VOCABULARY
    groups = mofasgd.param_groups(model, rank=8, lr=0.02, adamw_lr=3e-3)
    # Clipping belongs here: accelerator.clip_grad_norm_ would see AdamW's gradients only.
    opt = mofasgd.MoFaSGD(groups, max_grad_norm=1.0)
    # Before prepare, which wraps the model in DDP: factored parameters have no gradient for it to wait for.
    opt.attach(model)
    # `opt` stays the real optimizer.
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
