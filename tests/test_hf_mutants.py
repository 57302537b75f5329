"""Faults of mofasgd.hf put in by hand, each caught by a named test; as tests/test_mutants.py, but with transformers."""

import pytest
from test_mutants import copied, run  # noqa: F401

pytest.importorskip("transformers")

# what the fault is, file, the code, the fault, the test that must fail
MUTANTS = [
    (
        "Trainer clips what is in p.grad",
        "hf/callback.py",
        "        args.max_grad_norm = 0.0\n",
        "",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "nobody clips",
        "hf/callback.py",
        ".max_grad_norm = limit if limit and limit > 0 else None",
        "",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "args stay changed between steps",
        "hf/callback.py",
        "args.max_grad_norm, self._lent = value, None",
        "self._lent = None",
        "test_hf_trainer.py::test_the_arguments_are_the_users_but_while_gradients_are_gathered",
    ),
    (
        "an interrupted train() loses the user's max_grad_norm",
        "hf/callback.py",
        'detached."""\n        self._give_back()\n',
        'detached."""\n        self._lent = None\n',
        "test_hf_trainer.py::test_an_interrupted_window_is_no_part_of_the_next_training",
    ),
    (
        "half a window is left to the next train()",
        "hf/callback.py",
        "        opt.zero_grad()\n",
        "",
        "test_hf_trainer.py::test_an_interrupted_window_is_no_part_of_the_next_training",
    ),
    (
        "the log shows the norm of p.grad",
        "hf/callback.py",
        'logs["grad_norm"] = real_optimizer',
        "other = real_optimizer",
        "test_hf_trainer.py::test_reporters_are_shown_the_optimizers_norm",
    ),
    (
        "the log's history keeps the norm of p.grad",
        "hf/callback.py",
        'state.log_history[-1]["grad_norm"] = logs["grad_norm"]',
        "pass",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "reporters come first",
        "hf/callback.py",
        "First([*ours, *others,",
        "First([*others, *ours,",
        "test_hf_trainer.py::test_reporters_are_shown_the_optimizers_norm",
    ),
    (
        "a user's list of callbacks is as good",
        "hf/callback.py",
        "return First([*self, *others])",
        "return [*self, *others]",
        "test_hf_trainer.py::test_reporters_are_shown_the_optimizers_norm",
    ),
    (
        "the user's callbacks are lost",
        "hf/callback.py",
        ", *(callback for callback in self if callback not in ours)])",
        "])",
        "test_hf_trainer.py::test_trained_twice_a_model_is_attached_twice_and_free_in_between",
    ),
    (
        "the model stays attached",
        "hf/callback.py",
        "            opt.handle.detach()\n",
        "            pass\n",
        "test_hf_trainer.py::test_trained_twice_a_model_is_attached_twice_and_free_in_between",
    ),
    (
        "a second train() is dense",
        "hf/callback.py",
        "            opt.attach(kwargs",
        "            str(kwargs",
        "test_hf_trainer.py::test_trained_twice_a_model_is_attached_twice_and_free_in_between",
    ),
    (
        "nobody looks at the setup of an optimizer made by hand",
        "hf/callback.py",
        "        refuse_setup(attached=attached)\n",
        "",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "the factory does not look at the setup",
        "hf/factory.py",
        '        refuse_setup(attached=attach != "none")\n',
        "",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "decay by dimensions, not as Trainer",
        "hf/factory.py",
        "    if not weight_decay:\n        return\n",
        "    return\n",
        "test_hf_trainer.py::test_weights_decay_where_trainer_would_decay_them",
    ),
    (
        "the arguments are read once and for all",
        "hf/factory.py",
        "    complete(args, given)\n",
        "    given = complete(args, given)\n",
        "test_hf_trainer.py::test_what_the_arguments_say_reaches_the_optimizer_when_training_begins",
    ),
    (
        "the optimizer's own lr is another one",
        "hf/factory.py",
        'MoFaSGD(groups, given["lr"], ',
        "MoFaSGD(groups, ",
        "test_hf_trainer.py::test_what_the_arguments_say_reaches_the_optimizer_when_training_begins",
    ),
    (
        "attached without being asked",
        "hf/factory.py",
        '        if attach != "none":\n            try',
        "        if True:\n            try",
        "test_hf_refusals.py::test_the_factory_alone_makes_an_attached_optimizer",
    ),
    (
        "a factored norm of zero",
        "factored.py",
        "self.square_norms = torch.where(self.active, squares, 0.0)",
        "self.square_norms = torch.zeros_like(squares)",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "state is loaded in the dtype of the weights",
        "state.py",
        "optimizer.state.update(kept)",
        "pass",
        "test_hf_trainer.py::test_resumed_at_half_time_a_run_ends_as_the_unbroken_one_bit_for_bit",
    ),
    (
        "several processes attach",
        "hf/support.py",
        "if attached and state.num_processes > 1:",
        "if False:",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "any transformers will do",
        "hf/compat.py",
        "check_version(transformers.__version__)\n",
        "",
        "test_hf_refusals.py::test_other_versions_of_transformers_are_refused_at_import",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "code", "fault", "test"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_fault_is_caught(copied, file, code, fault, test):  # noqa: F811
    path = copied / "mofasgd" / file
    text = path.read_text()
    assert text.count(code) == 1, f"{code!r} stands {text.count(code)} times in {file}: update the mutant"
    path.write_text(text.replace(code, fault))
    done = run(copied, test)
    assert done.returncode == 1, done.stdout[-2000:]
