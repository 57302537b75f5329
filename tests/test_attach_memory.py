"""What attached training holds: no tensor of a weight's size in backward, first windows included."""

import gc
import weakref

import pytest
import torch
from attached import GPT, VOCABULARY, gpt_loss
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mofasgd import MoFaSGD, param_groups


class Sizes(TorchDispatchMode):
    """Collects the numbers of elements of every tensor that an operator makes; views of known storage are left out."""

    def __init__(self, known):
        super().__init__()
        self.known, self.made = {t.untyped_storage().data_ptr() for t in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.made |= {t.numel(), t.untyped_storage().nbytes() // t.element_size()}
        return result


@pytest.mark.parametrize("mode", [None, "sketch"])
def test_no_tensor_of_a_weights_size_is_made_in_backward_from_the_first_window_on(mode):
    model = GPT(layers=1, width=256)
    # AdamW's gradient of it would be of the head's size.
    model.embedding.requires_grad_(False)
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    if mode is not None:
        opt.attach(model, mode)
    factored = {p.numel() for g in opt.param_groups if g["algorithm"] == "mofasgd" for p in g["params"]}
    for _ in range(3):
        for _ in range(2):
            loss = gpt_loss(model, torch.randint(0, VOCABULARY, (2, 12)))
            with Sizes(model.parameters()) as sizes:
                loss.backward()
            # Dense training makes them all: the watch works.
            assert sizes.made & factored == (factored if mode is None else set())
        opt.step()
        opt.zero_grad()


def test_the_first_window_keeps_its_sketches_and_no_test_matrices():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    opt = MoFaSGD(param_groups(model, rank=4, lr=0.02))
    handle = opt.attach(model)
    model(torch.randn(9, 256)).square().mean().backward()
    for window in handle._windows.values():
        assert [tuple(probe.grad.shape) for probe in window.probes] == [(256, 16), (256, 33)]
        held = [t for t in vars(window).values() if isinstance(t, torch.Tensor) and t is not window.param]
        assert sum(t.untyped_storage().nbytes() for t in [*held, *window.probes]) <= 24  # keys, and two zeros
    opt.step()
    assert all([tuple(p.shape) for p in w.probes] == [(256, 4)] * 2 for w in handle._windows.values())


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that are still alive."""

    def __init__(self, known):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def count(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    def forget(self, key, size):
        self.seen.discard(key)
        self.live -= size

    def rise(self, work):
        self.peak = before = self.live
        work()
        return self.peak - before


def test_the_first_window_needs_no_more_than_its_sketches_and_one_layers_temporaries(monkeypatch):
    layers, width, rank = 12, 256, 8
    monkeypatch.setattr("mofasgd.rng._TILE", 1000)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    opt = MoFaSGD(param_groups(model, rank=rank, lr=0.02))
    opt.attach(model)
    opt.materialize()
    backward, window = [], []
    with Live([*model.parameters(), *(t for own in opt.state.values() for t in own.values())]) as live:
        for _ in range(2):
            # Cycles of Python objects hold tensors until the collector comes, at any time.
            gc.collect()
            before = live.live
            backward.append(live.rise(lambda: model(torch.randn(9, width)).square().mean().backward()))
            live.rise(opt.step)
            window.append(live.peak - before)
            opt.zero_grad()
    sketches = 4 * width * (2 * rank + 8 + 4 * rank + 17)
    later = 4 * width * 2 * rank
    # One layer's test matrix and its temporaries, in float32.
    assert backward[0] - backward[1] <= layers * (sketches - later) + 2 * sketches
    # The step gives sketches back one by one as it makes the momenta; one layer's for what the collector may hold.
    assert window[0] <= window[1] + sketches
