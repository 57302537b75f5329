"""Faults in fine-tuning and in the recording of memory."""

from mutants import Mutant

_RESUME = "test_tune_finetune.py::test_an_interrupted_run_resumes_bit_for_bit[mofasgd]"
_LEARNS = "test_tune_finetune.py::test_it_learns_and_saves_what_it_reports[mofasgd]"
_BATCH = "test_tune_finetune.py::test_answers_do_not_depend_on_the_batch"

MUTANTS = [
    Mutant(
        "learn the question too",
        "app/tune/encode.py",
        "labels = [IGNORED] * len(ids)",
        "labels = list(ids)",
        "test_tune_rows.py::test_every_turn_of_the_assistant_is_learned_and_nothing_else",
    ),
    Mutant(
        "a plain answer without an end",
        "app/tune/encode.py",
        '["input_ids"] + [tokenizer.eos_token_id]',
        '["input_ids"]',
        "test_tune_rows.py::test_without_a_chat_template_pairs_are_plain_text_and_chats_an_error",
    ),
    Mutant(
        "rows longer than the context",
        "app/tune/encode.py",
        "if len(example.input_ids) > context:",
        "if False:",
        "test_tune_rows.py::test_what_is_left_out_is_counted_with_its_first_place",
    ),
    Mutant(
        "a mean of means",
        "app/tune/answers.py",
        'reduction="sum"',
        'reduction="mean"',
        _BATCH,
    ),
    Mutant(
        "predict the token that is there",
        "app/tune/answers.py",
        ".logits[:, :-1]",
        ".logits[:, 1:]",
        _LEARNS,
    ),
    Mutant(
        "prompts padded on the right",
        "app/tune/answers.py",
        "ids = _pad(prompts, tokenizer.pad_token_id, device, left=True)",
        "ids = _pad(prompts, tokenizer.pad_token_id, device)",
        _BATCH,
    ),
    Mutant(
        "the last number of an answer",
        "app/tune/answers.py",
        'found[0] if "####" in text else found[-1]',
        "found[-1]",
        "test_tune_finetune.py::test_the_final_number",
    ),
    Mutant(
        "a constant rate",
        "app/tune/training.py",
        "lambda step: lr_multiplier(step, num_training_steps, warmup, cooldown)",
        "lambda step: 1.0",
        _LEARNS,
    ),
    Mutant(
        "resume from the start",
        "app/tune/finetune.py",
        "resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None",
        "resume_from_checkpoint=None",
        _RESUME,
    ),
    Mutant(
        "interrupted without a checkpoint",
        "app/tune/callback.py",
        "control.should_log = control.should_save = control.should_training_stop = True",
        "control.should_training_stop = True",
        _RESUME,
    ),
    Mutant(
        "loaded groups of its own",
        "app/tune/joint.py",
        "super().load_state_dict(state_dict)\n        self._share()",
        "super().load_state_dict(state_dict)",
        "test_tune_methods.py::test_joint_optimizers_step_load_and_follow_schedules_as_apart",
    ),
    Mutant(
        "the matrices' rate for the rest",
        "app/tune/methods.py",
        'AdamW(_decays(params, settings), lr=settings["adamw_lr"]',
        'AdamW(_decays(params, settings), lr=settings["lr"]',
        "test_tune_methods.py::test_every_parameter_is_stepped_at_its_rate",
    ),
    Mutant(
        "equal values in order",
        "app/tune/metrics.py",
        "- (counts.double() - 1) / 2",
        "- (counts.double() - 1)",
        "test_tune_glue.py::test_correlations_against_sums_over_pairs",
    ),
    Mutant(
        "outputs in the order of their lengths",
        "app/tune/glue.py",
        "outputs[torch.tensor(order).argsort()]",
        "outputs",
        "test_tune_glue.py::test_outputs_come_in_the_order_of_the_rows",
    ),
    Mutant(
        "other rows for every seed",
        "app/tune/glue.py",
        "random.Random(config.seeds[0])",
        "random.Random(run.seed)",
        "test_tune_glue.py::test_the_command_makes_a_table_and_goes_on",
    ),
    Mutant(
        "the lowest score is the best",
        "app/tune/grid.py",
        "-value if self.highest else value",
        "value",
        "test_tune_glue.py::test_the_best_rate_is_repeated_and_a_diverged_one_is_the_worst",
    ),
    Mutant(
        "activations are temporaries",
        "memory/record.py",
        'if backward and self._phase == "forward":',
        "if False:",
        "test_tune_memory.py::test_adamw_holds_weights_gradients_and_two_moments",
    ),
    Mutant(
        "nothing is ever freed",
        "memory/record.py",
        "weakref.finalize(storage, self._freed, address, number).atexit = False",
        "pass",
        "test_tune_memory.py::test_all_that_is_made_is_counted_until_it_is_freed",
    ),
    Mutant(
        "sketches are not looked for",
        "memory/record.py",
        'self._mark("sketches", sketches(self.optimizer))',
        "pass",
        "test_tune_memory.py::test_attached_mofasgd_holds_sketches_in_place_of_gradients",
    ),
]
