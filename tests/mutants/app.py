"""Faults in the training application."""

from mutants import Mutant

_BIT_EXACT = "test_app_run.py::test_an_interrupted_run_resumes_bit_for_bit"

MUTANTS = [
    Mutant(
        "attend to the future",
        "app/model.py",
        "is_causal=True",
        "is_causal=False",
        "test_app_training.py::test_the_model_is_causal",
    ),
    Mutant(
        "absolute positions",
        "app/model.py",
        "first * sin + second * cos",
        "first * sin - second * cos",
        "test_app_training.py::test_rotation_makes_scores_relative",
    ),
    Mutant(
        "count padding as tokens",
        "app/model.py",
        "(targets != -1).sum()",
        "torch.tensor(targets.numel())",
        "test_app_training.py::test_the_loss_is_the_sum_over_real_tokens",
    ),
    Mutant(
        "normalize by the micro-batch",
        "app/trainer.py",
        "(loss / tokens * self.settings.get",
        "(loss / micro[:, 1:].numel() * self.settings.get",
        "test_app_training.py::test_micro_batches_change_nothing",
    ),
    Mutant(
        "one learning rate for all groups",
        "app/schedule.py",
        'group.setdefault("initial_lr", group["lr"]) * multiplier',
        'settings["lr"] * multiplier',
        "test_app_training.py::test_every_group_keeps_its_own_rate_and_momentum_warms_up",
    ),
    Mutant(
        "no momentum warm-up",
        "app/schedule.py",
        "group[key] = momentum(step, settings)",
        'group[key] = settings["beta"]',
        "test_app_training.py::test_every_group_keeps_its_own_rate_and_momentum_warms_up",
    ),
    Mutant(
        "an order that cannot be repeated",
        "app/data.py",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng()",
        _BIT_EXACT,
    ),
    Mutant(
        "optimizer state left behind",
        "app/trainer.py",
        "optimizer.load_state_dict(state)",
        "pass",
        _BIT_EXACT,
    ),
    Mutant(
        "the schedule starts anew",
        "app/trainer.py",
        'self.step = content["step"]',
        'self.step = content["step"] - 1',
        _BIT_EXACT,
    ),
    Mutant(
        "checkpoint written in place",
        "app/files.py",
        'part = path.with_name(f"{path.name}.{os.getpid()}.part")',
        "part = path",
        "test_app_run.py::test_a_killed_run_ends_with_the_same_weights",
    ),
    Mutant(
        "checksums not verified",
        "app/checkpoint.py",
        "damaged = archive.testzip()",
        "damaged = None",
        "test_app_run.py::test_a_damaged_checkpoint_is_told_and_nothing_is_removed",
    ),
    Mutant(
        "metrics of repeated steps kept",
        "app/record.py",
        'if line["step"] <= resumed_at',
        "",
        "test_app_run.py::test_lines_of_steps_that_are_taken_again_are_dropped",
    ),
    Mutant(
        "shard length unchecked",
        "app/shards.py",
        "if size != head + 2 * int(header[2]):",
        "if False:",
        "test_app_data.py::test_a_bad_shard_is_refused",
    ),
    Mutant(
        "windows cross shards",
        "app/data.py",
        "begin = self._offsets[shard] + within * self.context",
        "begin = self._offsets[shard] + number * self.context",
        "test_app_data.py::test_windows_predict_every_token_once_a_pass_and_stay_within_a_shard",
    ),
    Mutant(
        "the last validation tokens are dropped",
        "app/data.py",
        "    if rows:\n",
        "    if False:\n",
        "test_app_data.py::test_evaluation_predicts_every_token_once",
    ),
    Mutant(
        "a decay that does nothing",
        "app/baselines.py",
        'own = RowNormSGD(matrices, lr=settings["lr"], weight_decay=settings["weight_decay"])',
        'own = RowNormSGD(matrices, lr=settings["lr"])',
        "test_app_training.py::test_decay_and_betas_reach_every_group",
    ),
    Mutant(
        "the worst learning rate wins",
        "app/compare.py",
        "min(results.of(jobs), key=by_loss)",
        "max(results.of(jobs), key=by_loss)",
        "test_app_compare.py::test_the_best_rate_is_repeated_and_reported",
    ),
]
