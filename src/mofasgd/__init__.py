"""MoFaSGD: full-parameter training of large models with a rank-r factored momentum.

groups = mofasgd.param_groups(model, rank=32, lr=0.02, adamw_lr=3e-4)
opt = mofasgd.MoFaSGD(groups)
"""

from mofasgd.groups import ParamGroups, param_groups
from mofasgd.momentum import Factors
from mofasgd.optimizer import MoFaSGD

__version__ = "0.1.0.dev0"
__all__ = ["Factors", "MoFaSGD", "ParamGroups", "__version__", "param_groups"]
