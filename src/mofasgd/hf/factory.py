"""From a model and TrainingArguments to an attached optimizer."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mofasgd.attach import MODES
from mofasgd.groups import ParamGroups, param_groups
from mofasgd.hf.callback import USED, First, MoFaSGDCallback
from mofasgd.hf.compat import Trainer, TrainerCallback, TrainingArguments
from mofasgd.hf.support import free, refuse_setup
from mofasgd.optimizer import MoFaSGD
from mofasgd.options import FACTORED_KEYS, check_choice, did_you_mean

_logger = logging.getLogger(__name__)

# What param_groups decides for each parameter cannot be asked for.
_GROUP_KEYS = {*inspect.signature(param_groups).parameters, *FACTORED_KEYS} - {
    *("model", "mofasgd_keys", "layout", "transposed")
}
_ARGUMENTS = {*inspect.signature(MoFaSGD).parameters} - {"params"}
_SETTINGS = _ARGUMENTS - {*FACTORED_KEYS}
# Loading a checkpoint replaces these in the groups.
_LOADED_KEYS = ("rank", "beta", "complement", "update", "lr_scale", "weight_decay", "betas", "eps")
_OPTIMS = ("adamw_torch", "adamw_torch_fused")


def trainer_kwargs(
    args: Any,
    *,
    rank: int = 32,
    lr: float | None = None,
    attach: str = "auto",
    callbacks: Iterable[TrainerCallback] = (),
    **options: Any,
) -> dict[str, Any]:
    """Return the arguments of `transformers.Trainer` that make it train with MoFaSGD.

    Args:
        args: the TrainingArguments that the Trainer is given. Read when the optimizer is made, in the first `train()`
            (with `model_init`: in each): `learning_rate` (of AdamW's parameters, and of all with
            lr_scale="match_rms_adamw"), `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`, `seed`; at each
            step: `max_grad_norm`.
        rank, lr: of the factored parameters. There is no default lr.
        attach: mode of `MoFaSGD.attach`; "none" keeps full gradients in `p.grad` (fp16). With a `complement` "release"
            steps each weight in backward, or "none".
        callbacks: more callbacks for the Trainer.
        **options: more arguments of `mofasgd.param_groups` (`adamw_lr`, `factor`, `adamw`, `head`, group keys such as
            `beta`) and of `mofasgd.MoFaSGD` (`seed`, `state_dtype`, ...); they come before what `args` say.

    Returns:
        {"optimizer_cls_and_kwargs": (OptimizerFactory, {...}), "callbacks": [MoFaSGDCallback(), *callbacks]}; a
        Trainer calls the first of the list before its own callbacks.

    Raises:
        TypeError: if `args` are not TrainingArguments.
        ValueError: for an unknown option, a value out of range, no lr, or an argument of `args` that would be without
            effect.
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args should be the TrainingArguments of the Trainer, not {type(args).__name__}")
    if "max_grad_norm" in options:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']!r} belongs into TrainingArguments: its value there is used"
        )
    check_choice("attach", attach, ("none", *MODES))
    given = {"rank": rank, "lr": lr, **options}
    complete(args, given)
    kwargs = {"training_args": args, "attach": attach, **given}
    return {
        "optimizer_cls_and_kwargs": (OptimizerFactory, kwargs),
        "callbacks": First([MoFaSGDCallback(args), *callbacks]),
    }


class OptimizerFactory:
    """Makes the optimizer of a Trainer: `optimizer_cls_and_kwargs=(OptimizerFactory, {"lr": ..., ...})`.

    Without `MoFaSGDCallback` the Trainer clips what is in `p.grad`, hence AdamW's parameters only: set its
    `max_grad_norm` to 0 and give `max_grad_norm` here.
    """

    def __call__(
        self, opt_model: nn.Module, training_args: Any = None, /, *, attach: str = "auto", **options: Any
    ) -> MoFaSGD:
        """Return an optimizer of all trainable parameters of `opt_model`, attached unless attach="none".

        Weight decay is for the parameters that Trainer would decay. A model that is still attached, by a `train()`
        that an exception has ended, is detached first.

        Args:
            opt_model: the model, not wrapped.
            training_args: TrainingArguments, used as in `trainer_kwargs`; also as a keyword, which Trainer's call
                needs and which may come beside Axolotl's positional one. None: `options` say everything.
            attach, **options: as in `trainer_kwargs`, and `max_grad_norm`.

        Raises:
            ValueError: for an unknown option, no lr, a setup of accelerate that is not supported, or as in
                `mofasgd.param_groups`, `mofasgd.MoFaSGD` and `MoFaSGD.attach`.
        """
        check_choice("attach", attach, ("none", *MODES))
        free(opt_model)
        keyword = options.pop("training_args", None)
        args = training_args if keyword is None else keyword
        given = complete(args, options)
        refuse_setup(args, attached=attach != "none")
        decay = given.pop("weight_decay", 0.0)
        groups = param_groups(opt_model, **{key: value for key, value in given.items() if key in _GROUP_KEYS})
        _decay_as_trainer(groups, opt_model, decay)
        # Schedulers with a minimum take the ratio to the optimizer's own lr.
        opt = MoFaSGD(groups, given["lr"], **{key: value for key, value in given.items() if key in _SETTINGS})
        if attach != "none":
            stepping = attach == "release" and bool(given.get("complement"))
            if stepping:
                _refuse_windows(args)
            try:
                opt.attach(opt_model, attach, step_in_backward=stepping)
            except ValueError as error:
                raise ValueError(f"attach={attach!r}: {error} (attach='none' does not attach)") from None
        opt.register_load_state_dict_pre_hook(_warn_of_loaded)
        _logger.info("%s", groups)
        return opt


def _refuse_windows(args: Any) -> None:
    """Raise ValueError if TrainingArguments `args` (or None) need several gradients, or all of them, before a step."""
    for key, fix in (("gradient_accumulation_steps", 1), ("max_grad_norm", 0)):
        value = getattr(args, key, None) or fix
        if value != fix:
            raise ValueError(
                f"{key}={value:g} does not go with attach='release' and a complement, which steps each weight while "
                f"its gradient exists: set {key}={fix}, or attach='none'"
            )


def complete(args: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with what TrainingArguments `args` (or None) say of the rest.

    Raises:
        ValueError: as in `trainer_kwargs`.
    """
    for key in options:
        if key not in _GROUP_KEYS | _SETTINGS:
            raise ValueError(f"unknown option {key!r}{did_you_mean(key, tuple(sorted(_GROUP_KEYS | _SETTINGS)))}")
    given = {key: value for key, value in options.items() if value is not None}
    matched = given.get("lr_scale") == "match_rms_adamw"
    if args is not None:
        refuse_optim(args)
        given = _of_args(args, matched) | given
    if "lr" not in given:
        raise ValueError(
            "MoFaSGD has no default learning rate here, and an lr of AdamW is not one of it: give lr=..., or "
            "lr_scale='match_rms_adamw', which makes args.learning_rate one"
        )
    # An optimizer of nothing: for its checks.
    MoFaSGD([{"params": []}], **{key: value for key, value in given.items() if key in _ARGUMENTS})
    return given


def refuse_optim(args: Any) -> None:
    """Raise ValueError if TrainingArguments `args` ask for another optimizer, or for options of one."""
    for key in ("optim_args", "optim_target_modules"):
        if getattr(args, key, None):
            raise ValueError(f"{key}={getattr(args, key)!r} has no effect on MoFaSGD: give its options as keywords")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in _OPTIMS:
        raise ValueError(f"optim={optim!r} has no effect, MoFaSGD replaces it: leave it at {_OPTIMS[0]!r}")


def _of_args(args: Any, matched: bool) -> dict[str, Any]:
    rate, beta1, beta2, eps, decay, seed = (getattr(args, key) for key in USED)
    found = {"adamw_lr": rate, "adamw_betas": (beta1, beta2), "adamw_eps": eps, "weight_decay": decay, "seed": seed}
    return {**found, "lr": args.learning_rate} if matched else found


def _decay_as_trainer(groups: ParamGroups, model: nn.Module, weight_decay: float) -> None:
    """Split `groups`, which do not decay, into what Trainer, which goes by names, would decay and the rest.

    Also where `weight_decay` is 0: a checkpoint fits whatever the decay.
    """
    # The method does not use its instance, which nobody passes on to a factory.
    names = set(Trainer.get_decay_parameter_names(None, model))
    decayed: set[Tensor] = {p for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    parts = []
    for group in groups:
        for decays in (True, False):
            params = [p for p in group["params"] if (p in decayed) == decays]
            if params:
                parts.append({**group, "params": params, "weight_decay": weight_decay if decays else 0.0})
    groups[:] = parts


def _warn_of_loaded(opt: Any, loaded: Any) -> None:
    """Warn if the groups of a state_dict differ from the optimizer's, which they are about to replace."""
    groups = loaded.get("param_groups", ()) if isinstance(loaded, dict) else ()
    news = {
        f"{key}={saved[key]!r} instead of {own[key]!r}"
        for own, saved in zip(opt.param_groups, groups, strict=False)
        for key in _LOADED_KEYS
        if key in own and key in saved and own[key] != saved[key]
    }
    if news:
        warnings.warn(f"the checkpoint's values replace those asked for: {', '.join(sorted(news))}", stacklevel=2)
