"""State of equal shapes lies side by side in memory, and is each parameter's own all the same."""

import copy

import pytest
import torch
from torch import nn

from mofasgd import MoFaSGD
from mofasgd.buckets import Inventory, stacked

SHAPE = (12, 9)  # small: the start is the gradient's own SVD, which no parameter's index enters


def gradients(steps=5):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(steps, 3, *SHAPE, generator=generator)
    found[3, 2] = 0
    return found


def train(params, places, skip=None):
    """Step `params` by the gradients of their places; at step 2 parameter number `skip` has none."""
    opt = MoFaSGD(params, lr=0.1, rank=3, weight_decay=0.1)
    for i, step in enumerate(gradients()):
        for place, p in zip(places, params, strict=True):
            p.grad = None if (i, place) == (2, skip) else step[place].clone()
        opt.step()
    return opt


def weights():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(3)]


def test_parameters_of_one_shape_train_as_they_do_alone():
    together, alone = weights(), weights()
    opt = train(together, range(3), skip=1)
    for place, p in enumerate(alone):
        own = train([p], [place], skip=1)
        # A batch of small products rounds otherwise than one alone.
        assert (p - together[place]).abs().max() <= 1e-5
        assert (own.momentum(p) - opt.momentum(together[place])).abs().max() <= 1e-5
        assert own.state[p]["step"] == opt.state[together[place]]["step"]
    for key in ("U", "s", "V", "step"):
        assert len({opt.state[p][key].untyped_storage().data_ptr() for p in together}) == 1


def test_copies_and_loaded_states_are_apart():
    params = weights()
    opt = train(params, range(3))
    saved, kept = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt)
    before = [opt.momentum(p) for p in params]
    opt.step()
    for p, q, M in zip(params, kept.param_groups[0]["params"], before, strict=True):
        assert not torch.equal(opt.momentum(p), M)
        assert torch.equal(kept.momentum(q), M)
    opt.load_state_dict(saved)
    assert all(torch.equal(opt.momentum(p), M) for p, M in zip(params, before, strict=True))


def test_a_stack_is_made_once_and_again_where_its_parts_have_moved():
    states = [{"s": torch.full((4,), float(i))} for i in range(3)]
    stack = stacked(states, "s")
    assert stack.tolist() == [[i] * 4 for i in range(3)]
    assert stacked(states, "s").data_ptr() == stack.data_ptr()
    assert stacked(states[1:], "s").tolist() == [[1] * 4, [2] * 4]
    states[1]["s"] = torch.full((4,), 7.0)
    again = stacked(states, "s")
    assert again.tolist() == [[0] * 4, [7] * 4, [2] * 4]
    again += 1
    assert [state["s"][0].item() for state in states] == [1, 8, 3]


def test_state_that_others_move_in_memory_is_found():
    # Offloading gives the tensors of the state new storage and keeps them as objects.
    kept, moved = weights(), weights()
    expected, opt = train(kept, range(3)), train(moved, range(3))
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.clone()
    for step in gradients()[:2]:
        for params, own in ((kept, expected), (moved, opt)):
            for p, G in zip(params, step, strict=True):
                p.grad = G.clone()
            own.step()
    for p, q in zip(moved, kept, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(opt.momentum(p), expected.momentum(q))


class Other(nn.Parameter):
    """What `torch.utils.swap_tensors` may put into the object that an optimizer holds."""


def swap(params, groups):
    torch.utils.swap_tensors(params[1], Other(torch.zeros(SHAPE)))


@pytest.mark.parametrize(
    "change",
    [
        swap,
        lambda params, groups: groups[0]["params"].reverse(),
        lambda params, groups: groups[0]["params"].pop(),
        lambda params, groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
        lambda params, groups: groups.__setitem__(0, dict(groups[0])),
    ],
    ids=["another kind of tensor", "order", "fewer", "another group", "another dict"],
)
def test_a_list_of_parameters_holds_until_they_or_their_groups_change(change):
    params = weights()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    listed = Inventory(groups)
    assert listed.holds(groups)
    change(params, groups)
    assert not listed.holds(groups)
