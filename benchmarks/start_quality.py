"""Error of M_1 by the two start sketches, over the best rank-r error, for several sketch widths.

python benchmarks/start_quality.py --out docs/results/start_quality.json

Matrices: three synthetic spectra, and the first non-zero gradients of the byte GPT's layers.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples")]

WIDTHS = {"l = r + 4": lambda r: r + 4, "l = 3r/2 + 4": lambda r: 3 * r // 2 + 4, "l = 2r + 8": lambda r: 2 * r + 8}


def ratio(G, rank, width, seed):
    from mofasgd.momentum import init_factors, init_sketch
    from mofasgd.rng import START_LEFT, START_RIGHT, gaussian, key_of

    m, n = G.shape
    Omega = gaussian(n, width, key_of(seed, START_RIGHT, 0), G.device, G.dtype)
    Psi = gaussian(m, 2 * width + 1, key_of(seed, START_LEFT, 0), G.device, G.dtype)
    U, s, V = init_factors(*init_sketch(G, Omega, Psi), Psi, rank)
    best = torch.linalg.svdvals(G)[rank:].square().sum().sqrt()
    return (torch.linalg.matrix_norm(G - (U * s) @ V.mT) / best).item()


def synthetic(m=512, n=384):
    Q, P = (torch.linalg.qr(torch.randn(k, n))[0] for k in (m, n))
    i = torch.arange(n)
    spectra = {"flat": torch.ones(n), "1/i": 1 / (1 + i), "0.9^i": 0.9**i}
    return {name: (Q * s) @ P.mT for name, s in spectra.items()}


def gradients():
    import train_gpt

    model = train_gpt.GPT()
    text, _ = train_gpt.load()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    # Zero-initialized projections: the third step is the first at which every layer has a gradient.
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - train_gpt.CONTEXT - 1, (16,), generator=generator).tolist()
        sgd.zero_grad()
        train_gpt.loss_of(model, torch.stack([text[i : i + train_gpt.CONTEXT + 1] for i in starts])).backward()
        sgd.step()
    block = model.blocks[1]
    return {f"gradient of {n}": p.grad for n, p in block.named_parameters()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, G in {**synthetic(), **gradients()}.items():
        for rank in (8, 32):
            for label, width in WIDTHS.items():
                if 2 * width(rank) + 1 > min(G.shape):
                    continue
                found = [ratio(G, rank, width(rank), seed) for seed in range(args.seeds)]
                rows.append(
                    {"matrix": name, "rank": rank, "width": label, "mean": sum(found) / len(found), "max": max(found)}
                )
                print("{matrix:28s} r {rank:<3d} {width:14s} mean {mean:.3f} max {max:.3f}".format(**rows[-1]))
    environment = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    args.out.write_text(json.dumps({"command": " ".join(sys.argv), "environment": environment, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
