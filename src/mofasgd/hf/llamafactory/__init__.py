"""`mofasgd-llamafactory train config.yaml`: the published LLaMA-Factory with the keys of the authors' fork, and ours.

`keys` reads them, `optimizers` makes what they ask for, `upstream` holds all that is used of LLaMA-Factory.
"""
