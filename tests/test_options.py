"""Every option, group and mistake: what is refused, with the value and the fix, and what is accepted."""

import io
import warnings

import numpy as np
import pytest
import torch
from common import F64, gradients, run, weight
from torch import nn

from mofasgd import MoFaSGD
from mofasgd.paper import AuthorsMFSGD

BAD = [
    ({"lr": -0.1}, "lr=-0.1"),
    ({"lr": float("nan")}, "lr=nan"),
    ({"rank": 0}, "rank=0"),
    ({"rank": 2.5}, "rank=2.5"),
    ({"beta": 1.0}, "beta=1.0"),
    ({"weight_decay": -1}, "weight_decay=-1"),
    ({"complement": -1.0}, "complement=-1.0"),
    ({"update": "polr"}, "did you mean 'polar'"),
    ({"lr_scale": "rms"}, "lr_scale='rms'"),
    ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
    ({"state_dtype": torch.bfloat16}, "float32 or float64"),
    ({"solver": "qr"}, "solver='qr'"),
    ({"adamw_betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
    ({"adamw_betas": 0.9}, "betas=0.9"),
    ({"adamw_eps": -1e-8}, "eps=-1e-08"),
    ({"eta1": 2.0}, "eta1=2.0 takes effect with update='reciprocal' only"),
    ({"clip_eps": 2.0}, "clip_eps=2.0 takes effect"),
    ({"update": "reciprocal", "max_value": 0.0}, "max_value=0.0"),
    ({"update": "reciprocal", "lr_scale": "match_rms_adamw"}, "lr_scale='match_rms_adamw'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_raise_with_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        MoFaSGD([weight(4, 4)], **{"rank": 2, **options})


BAD_GROUPS = [
    ({"params": [weight(4)]}, "param_groups"),
    ({"params": [weight(4, 4)], "betta": 0.9}, "did you mean 'beta'"),
    ({"params": [weight(4, 4)], "betas": (0.9, 0.9)}, "'betas' has no effect"),
    ({"params": [weight(4, 4)], "algorithm": "adamw", "rank": 4}, "'rank' has no effect"),
    ({"params": [weight(4, 4)], "algorithm": "adam"}, "did you mean 'adamw'"),
    ({"params": [weight(4, 4, 4)], "layout": "matrix"}, "'stack' or 'flatten'"),
    ({"params": [weight(4, 4)], "layout": "matrx"}, "did you mean 'matrix'"),
    ({"params": [weight(4, 4)], "transposed": 1}, "transposed=1"),
    ({"params": [weight(0, 4)]}, "empty"),
    ({"params": [weight(4, 4, dtype=torch.float16)]}, "bfloat16, float32 or float64"),
    ({"params": [weight(4, 4)], "lr": torch.zeros(2)}, "give one number"),
]


@pytest.mark.parametrize(("group", "message"), BAD_GROUPS)
def test_bad_groups_raise_and_leave_the_optimizer_as_it_was(group, message):
    opt = MoFaSGD([weight(4, 4)], rank=2)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


def test_added_groups_train_and_rank_is_lowered_aloud():
    W, small = weight(9, 7), weight(3, 7)
    opt = MoFaSGD([W], rank=5, **F64)
    run(opt, [W], gradients((9, 7), 2))
    with pytest.warns(UserWarning, match="3 x 7: its rank is lowered from 5 to 3"):
        opt.add_param_group({"params": [small]})
    before = small.detach().clone()
    run(opt, [W, small], [(gradients((9, 7), 1)[0], gradients((3, 7), 1)[0])])
    assert opt.factors(small).s.shape == (3,)
    assert not torch.equal(small, before)


def test_sparse_gradients_and_foreign_parameters_are_refused():
    embedding = nn.Embedding(10, 6, sparse=True)
    opt = MoFaSGD([embedding.weight], rank=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        opt.step()
    with pytest.raises(ValueError, match="no factors"):
        opt.momentum(weight(4, 4))


def test_a_changed_rank_is_refused_at_the_step():
    W = weight(9, 7)
    opt = MoFaSGD([W], rank=3)
    run(opt, [W], gradients((9, 7), 3))
    opt.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="rank of a running optimizer is fixed"):
        opt.step()


def test_groups_of_a_used_optimizer_build_another():
    opt = MoFaSGD([weight(9, 7)], rank=3)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=False)
    assert MoFaSGD(opt.param_groups).param_groups[0]["rank"] == 3


MISTAKES = [
    (lambda: MoFaSGD([weight(4, 4)], rank=2, seed=1.5), ValueError, "seed=1.5"),
    (lambda: MoFaSGD([weight(4, 4)], rank=2, stochastic_rounding="no"), ValueError, "stochastic_rounding='no'"),
    (lambda: AuthorsMFSGD([weight(4, 4)], nesterov="no"), ValueError, "nesterov='no'"),
    (lambda: AuthorsMFSGD([{"params": [weight(4, 4)], "complement": 1.0}]), ValueError, "complement=1.0 has no effect"),
    (lambda: MoFaSGD([weight(4, 4)], rank=2).add_param_group([weight(4, 4)]), TypeError, "should be a dict"),
]


@pytest.mark.parametrize(("make", "kind", "message"), MISTAKES)
def test_more_mistakes_raise(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    opt = MoFaSGD([weight(9, 7)], lr=np.float32(0.1), rank=np.int64(2))
    assert opt.factors(opt.param_groups[0]["params"][0]).s.shape == (2,)


def test_a_parameter_listed_twice_is_refused():
    W = weight(6, 5)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=r"parameter 1 .* twice"):
        MoFaSGD([W, W], rank=2)


def test_numbers_of_numpy_become_pythons():
    W = weight(6, 5, dtype=torch.bfloat16)
    opt = MoFaSGD([W], lr=np.float64(0.1), rank=np.int64(2), beta=np.float32(0.5), seed=np.int32(5))
    opt.add_param_group({"params": [weight(3)], "algorithm": "adamw", "betas": (np.float64(0.5), np.float32(0.75))})
    run(opt, [W], gradients((6, 5), 2))
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    groups = torch.load(saved, weights_only=True)["param_groups"]
    assert [groups[0][key] for key in ("lr", "rank", "beta")] == [0.1, 2, 0.5]
    assert groups[1]["betas"] == (0.5, 0.75)


def test_a_group_that_warns_where_warnings_are_errors_is_not_added():
    opt = MoFaSGD([weight(6, 5)], rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="rank is lowered"):
            opt.add_param_group({"params": [weight(3, 5)]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group, W: group.update(lr_scale="bogus"), "lr_scale='bogus' is unknown"),
        (lambda group, W: group.update(update="reciprocal"), "lacks its key 'eta1'"),
        (lambda group, W: group.update(algorithm="adamw"), "lacks its key 'eps'"),
        (lambda group, W: setattr(W, "data", torch.zeros(7, 5)), "is 7 x 5 but its momentum 6 x 5"),
    ],
)
def test_what_a_running_optimizer_cannot_do_is_refused_before_it_steps(change, message):
    W = weight(6, 5)
    opt = MoFaSGD([W], rank=2)
    run(opt, [W], gradients((6, 5), 2))
    change(opt.param_groups[0], W)
    W.grad = torch.ones_like(W)
    before = W.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(W, before)
