"""Train the 16k byte-level BPE tokenizer of configs/gpt_768.yaml on text files and write its tokenizer.json.

python benchmarks/book_tokenizer.py --text ../shared/corpus/books-train-0*.txt.xz --out runs/books-16k.json
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mofasgd.app.text import read_text

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, nargs="+", required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--size", type=int, default=16384)
args = parser.parse_args()

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=args.size,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
lines = (line for path in args.text for line in read_text(path).decode().splitlines(keepends=True))
tokenizer.train_from_iterator(lines, trainer)
args.out.parent.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(args.out))
print(f"{tokenizer.get_vocab_size()} tokens, {args.out}")
