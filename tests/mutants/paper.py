"""Faults in the mapping of the authors' command line and of their fork's keys."""

from mutants import Mutant

_LOOP = "test_paper_cli.py::test_the_mapped_run_is_the_authors_loop"

MUTANTS = [
    Mutant(
        "the mean over micro-batches in place of their sum",
        "app/trainer.py",
        'loss / tokens * self.settings.get("gradient_scale", 1.0)',
        "loss / tokens",
        _LOOP,
    ),
    Mutant(
        "every number of GPUs sums one micro-batch",
        "paper/__main__.py",
        "return max(1, TOKENS // num_gpus // MICRO_TOKENS)",
        "return 1",
        "test_paper_cli.py::test_the_gradient_is_what_that_many_gpus_would_have_made",
    ),
    Mutant(
        "the momentum's warm-up ends where it begins",
        "paper/keys.py",
        '"beta_end": "beta", "warmup_steps"',
        '"beta_start": "beta", "beta_end": "beta_start", "warmup_steps"',
        "test_paper_cli.py::test_the_readmes_command_is_mapped_key_by_key",
    ),
    Mutant(
        "other betas for embedding and head",
        "app/authors.py",
        "betas=(0.8, 0.95), fused=True)]",
        "betas=(0.9, 0.95), fused=True)]",
        _LOOP,
    ),
    Mutant("the embedding's rate for the head", "app/authors.py", 'settings["head_lr"]', 'settings["adamw_lr"]', _LOOP),
    Mutant(
        "a configuration file is merged with the base",
        "paper/keys.py",
        "else _from_yaml(path)",
        "else BASES[optimizer] | _from_yaml(path)",
        "test_paper_cli.py::test_a_configuration_file_takes_the_place_of_the_base",
    ),
    Mutant(
        "the authors' validation beside data of one's own",
        "paper/__main__.py",
        'changes["data"] = dataclasses.replace(config.data, validation=[])',
        "pass",
        "test_paper_cli.py::test_what_follows_from_a_flag_follows",
    ),
    Mutant(
        "a recording ends a step early",
        "paper/__main__.py",
        "return 0, snap + 1",
        "return 0, snap",
        "test_paper_cli.py::test_memory_is_recorded_over_the_steps_that_were_named",
    ),
    Mutant(
        "a recording is lost when the run fails",
        "app/run.py",
        "        self._stop_recording()\n        if self.journal is not None:",
        "        if self.journal is not None:",
        "test_app_run.py::test_memory_is_recorded_between_the_steps_that_are_named",
    ),
    Mutant(
        "keys that do nothing are taken",
        "hf/llamafactory/keys.py",
        "        if options[key]:\n            raise",
        "        if False:\n            raise",
        "test_llamafactory_keys.py::test_keys_without_effect_are_refused",
    ),
    Mutant(
        "null means another default",
        "paper/keys.py",
        "        if value is None:",
        "        if False:",
        "test_paper_cli.py::test_null_is_no_value",
    ),
    Mutant(
        "a named file is not the user's",
        "paper/keys.py",
        '{} if path is None else dict.fromkeys(base, "--config-path")',
        "{}",
        "test_paper_cli.py::test_idle_values_of_a_file_are_refused_or_told_of",
    ),
    Mutant(
        "None of the authors' optimizer is another default",
        "authors.py",
        "            check_number(name, value, 0.0)",
        "            pass",
        "test_paper.py::test_none_is_no_value",
    ),
    Mutant(
        "null of the fork's keys means another default",
        "hf/llamafactory/keys.py",
        "if own[key] is None and",
        "if False and",
        "test_llamafactory_keys.py::test_keys_without_effect_are_refused",
    ),
]
