"""The Python blocks of the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(name):
    """Return the Python of a page, fenced or indented, a block each."""
    text = PAGES[name].read_text()
    fenced = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = re.findall(r"(?:^    .*\n(?:[ ]*\n(?=    ))*)+", text, flags=re.MULTILINE)
    python = r"^    (?:import \w|from \w.* import )|\bmofasgd(?:\.\w+)+\("
    return fenced + [block for block in indented if re.search(python, block, flags=re.MULTILINE)]


def paragraphs(name):
    """Return the parts of a page's only block that blank lines divide, compiled."""
    (block,) = blocks(name)
    # In front of indented lines this makes them Python.
    parts = [part for part in re.split(r"\n\s*\n", block.rstrip()) if part.strip()]
    prefix = "if True:\n" if block.startswith("    ") else ""
    return [compile(prefix + part, name, "exec") for part in parts]


class Loss:
    """Stands for `loss` of a page: `backward` is that of `loss_of(model)`, of the model as the page has made it."""

    def __init__(self, names, loss_of):
        self.names, self.loss_of = names, loss_of

    def backward(self):
        self.loss_of(self.names["model"]).backward()
