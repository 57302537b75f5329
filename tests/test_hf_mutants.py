"""Faults of mofasgd.hf put in by hand, each caught by a named test; as tests/test_mutants.py, but with transformers."""

import pytest
from test_mutants import copied, run  # noqa: F401

pytest.importorskip("transformers")

# what the fault is, file, the code, the fault, the test that must fail
MUTANTS = [
    (
        "Trainer clips what is in p.grad",
        "hf/callback.py",
        "        args.max_grad_norm = Lent(args.max_grad_norm)\n",
        "        args.max_grad_norm = Lent(args.max_grad_norm) if False else args.max_grad_norm\n",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "nobody clips",
        "hf/callback.py",
        ".max_grad_norm = _limit(args.max_grad_norm.value)",
        "",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "args stay changed between steps",
        "hf/callback.py",
        "        args.max_grad_norm = args.max_grad_norm.value\n",
        "        pass\n",
        "test_hf_trainer.py::test_the_arguments_are_the_users_but_while_gradients_are_gathered",
    ),
    (
        "an interrupted train() loses the user's max_grad_norm",
        "hf/callback.py",
        "    if isinstance(args.max_grad_norm, Lent):\n",
        "    if isinstance(args.max_grad_norm, Lent) and args.max_grad_norm.value != 0.5:\n",
        "test_hf_trainer.py::test_what_an_interrupted_training_leaves_behind_does_not_reach_the_next_trainer",
    ),
    (
        "a second callback lends what is lent",
        "hf/callback.py",
        "        _give_back(args)\n        if not self._told",
        "        if not self._told",
        "test_hf_trainer.py::test_the_arguments_are_the_users_but_while_gradients_are_gathered",
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
        "        logs.update(found)\n",
        "",
        "test_hf_trainer.py::test_reporters_are_shown_the_optimizers_norm",
    ),
    (
        "the log's history keeps the norm of p.grad",
        "hf/callback.py",
        "state.log_history[-1].update(found)",
        "pass",
        "test_hf_trainer.py::test_a_trainer_takes_the_steps_of_a_loop_without_one",
    ),
    (
        "reporters come first",
        "hf/callback.py",
        "[*self[:1], *others,",
        "[*others, *self[:1],",
        "test_hf_trainer.py::test_reporters_are_shown_the_optimizers_norm",
    ),
    (
        "the user's callbacks are lost",
        "hf/callback.py",
        ", *self[1:]]",
        "]",
        "test_hf_trainer.py::test_trained_twice_a_model_is_attached_twice_and_free_in_between",
    ),
    (
        "the model stays attached",
        "hf/callback.py",
        "            opt.handle.detach()\n\n\n",
        "            pass\n\n\n",
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
        "            refuse_setup(args, attached=opt.handle is not None)\n",
        "",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "the factory does not look at the setup",
        "hf/factory.py",
        '        refuse_setup(args, attached=attach != "none")\n',
        "",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "decay by dimensions, not as Trainer",
        "hf/factory.py",
        "if (p in decayed) == decays]",
        "if (p.ndim > 1) == decays]",
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
        "a model that an interrupted train() left attached stays so",
        "hf/factory.py",
        "        free(opt_model)\n",
        "",
        "test_hf_trainer.py::test_what_an_interrupted_training_leaves_behind_does_not_reach_the_next_trainer",
    ),
    (
        "what was refused stays attached",
        "hf/callback.py",
        "                opt.handle.detach()\n            raise\n",
        "                pass\n            raise\n",
        "test_hf_refusals.py::test_setups_that_would_train_wrongly_are_refused_when_training_begins",
    ),
    (
        "an optimizer that another training has detached goes on dense",
        "hf/callback.py",
        "            _attached[opt] = opt.handle.mode, opt.handle.stepping\n",
        "            pass\n",
        "test_hf_trainer.py::test_an_optimizer_detached_by_another_training_attaches_again",
    ),
    (
        "a limit set within a window is overwritten",
        "hf/callback.py",
        "        if not isinstance(args.max_grad_norm, Lent):\n",
        "        args.max_grad_norm = Lent(args.max_grad_norm)\n        if False:\n",
        "test_hf_trainer.py::test_a_limit_set_while_gradients_are_gathered_is_refused",
    ),
    (
        "the optimizer's own limit is overwritten",
        "hf/callback.py",
        "            _refuse_others(args, self._args or args, opt)\n",
        "",
        "test_hf_refusals.py::test_an_optimizer_that_clips_to_another_norm_is_refused",
    ),
    (
        "a model that is attached elsewhere trains dense, in part",
        "hf/callback.py",
        '            free(kwargs["model"])\n',
        "",
        "test_hf_trainer.py::test_an_optimizer_detached_by_another_training_attaches_again",
    ),
    (
        "nobody compares the arguments",
        "hf/callback.py",
        "        if value != used:\n",
        "        if False:\n",
        "test_hf_refusals.py::test_other_arguments_than_the_trainers_are_refused",
    ),
    (
        "the limit outlives the training",
        "hf/callback.py",
        "        opt.max_grad_norm = None\n",
        "",
        "test_hf_refusals.py::test_an_optimizer_that_clips_to_another_norm_is_refused",
    ),
    (
        "infinity is a limit",
        "hf/callback.py",
        "value and 0 < value < math.inf",
        "value and 0 < value",
        "test_hf_trainer.py::test_the_arguments_are_the_users_but_while_gradients_are_gathered",
    ),
    (
        "steps that were not finite are not told of",
        "hf/callback.py",
        "if count := opt.nonfinite_steps:",
        "if count := 0:",
        "test_hf_trainer.py::test_the_log_counts_steps_whose_gradients_were_not_finite",
    ),
    (
        "a checkpoint's options replace others without a word",
        "hf/factory.py",
        "        opt.register_load_state_dict_pre_hook(_warn_of_loaded)\n",
        "",
        "test_hf_trainer.py::test_a_resume_with_other_options_says_that_the_checkpoints_are_used",
    ),
    (
        "groups depend on whether anything decays",
        "hf/factory.py",
        "        _decay_as_trainer(groups, opt_model, decay)\n",
        "        if decay:\n            _decay_as_trainer(groups, opt_model, decay)\n",
        "test_hf_trainer.py::test_a_resume_with_other_options_says_that_the_checkpoints_are_used",
    ),
    (
        "another optim is ignored",
        "hf/factory.py",
        "        if optim not in _OPTIMS:\n",
        "        if False:\n",
        "test_hf_refusals.py::test_mistakes_are_refused_before_a_trainer_is_made",
    ),
    (
        "several GPUs share one set of sketches",
        "hf/support.py",
        "args.n_gpu > 1:",
        "False:",
        "test_hf_refusals.py::test_several_gpus_in_one_process_are_refused",
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
        "test_hf_refusals.py::test_older_versions_of_transformers_are_refused_at_import",
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
