"""Faults put in by hand, each caught by a named test. A test that no fault can break proves nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from app_mutants import APP_MUTANTS

ROOT = Path(__file__).parents[1]

# what the fault is, file, the code, the fault, the test that must fail
MUTANTS = [
    (
        "drop beta",
        "momentum.py",
        "torch.diag_embed(beta * s) + C",
        "torch.diag_embed(s) + C",
        "test_momentum.py::test_update_is_the_truncated_svd_of_decayed_momentum_plus_projected_gradient",
    ),
    (
        "drop the C block",
        "momentum.py",
        "torch.diag_embed(beta * s) + C",
        "torch.diag_embed(beta * s)",
        "test_momentum.py::test_update_is_the_truncated_svd_of_decayed_momentum_plus_projected_gradient",
    ),
    (
        "swap U and V",
        "momentum.py",
        "return Factors(Qu @ A, s * scale[..., 0], Qv @ B)",
        "return Factors(Qu @ B, s * scale[..., 0], Qv @ A)",
        "test_optimizer.py::test_ten_steps_equal_the_dense_algorithm",
    ),
    (
        "random factors",
        "momentum.py",
        "return Factors(Qu @ A, s * scale[..., 0], Qv @ B)",
        "return Factors(torch.linalg.qr(torch.randn_like(U))[0], s * scale[..., 0], V)",
        "test_optimizer.py::test_ten_steps_equal_the_dense_algorithm",
    ),
    (
        "missing decay",
        "apply.py",
        "if keep is not None:",
        "if False:",
        "test_optimizer.py::test_ten_steps_equal_the_dense_algorithm",
    ),
    (
        "lr scale upside down",
        "factored.py",
        "max(1.0, out / inp)",
        "max(1.0, inp / out)",
        "test_optimizer.py::test_spectral_scale_is_the_root_of_out_over_in",
    ),
    (
        "stale factors for the step",
        "factored.py",
        "left = after.U * coefficients[:, None, :]",
        "left = before.U * coefficients[:, None, :]",
        "test_optimizer.py::test_ten_steps_equal_the_dense_algorithm",
    ),
    (
        "state in the dtype of the weight",
        "base.py",
        "return new_factored(param, shape, rank, self.state_dtype)",
        "return new_factored(param, shape, rank, param.dtype)",
        "test_state.py::test_state_is_tensors_of_the_documented_shapes_and_dtypes",
    ),
    (
        "loaded state in the dtype of the weight",
        "state.py",
        "optimizer.state.update(kept)",
        "pass",
        "test_state.py::test_loading_copies_and_keeps_float32_factors_of_bfloat16_weights",
    ),
    (
        "unmasked completion columns",
        "momentum.py",
        "return s > tol * s[..., :1]",
        "return s > -1",
        "test_robustness.py::test_a_gradient_of_rank_q_below_r_moves_the_weight_in_its_space_only",
    ),
    (
        "a zero sketch is a gradient",
        "factored.py",
        "self.finite.repeat_interleave(self.b) & _any_nonzero((GV, GtU))",
        "self.finite.repeat_interleave(self.b)",
        "test_robustness.py::test_zero_or_missing_gradients_move_nothing_and_leave_the_start_pending",
    ),
    (
        "completion columns in the tangent space",
        "momentum.py",
        "return moving(s, tol) | (s[..., :1] == 0)",
        "return torch.ones_like(s, dtype=torch.bool)",
        "test_robustness.py::test_rank_one_gradients_in_new_directions_move_their_span_only_whatever_their_scale",
    ),
    (
        "a momentum of zero is dead",
        "momentum.py",
        "return moving(s, tol) | (s[..., :1] == 0)",
        "return moving(s, tol)",
        "test_robustness.py::test_a_momentum_of_exactly_zero_is_not_dead",
    ),
    (
        "dead rows in the complement",
        "complement.py",
        "(length > noise) & (length * unit > floor)",
        "length > noise",
        "test_robustness.py::test_dead_units_stay_where_they_are_under_the_complement",
    ),
    (
        "overflowing momentum is stored",
        "factored.py",
        "fits = after.s.isfinite().all(dim=-1) | ~self.active",
        "fits = torch.ones_like(self.active)",
        "test_robustness.py::test_finite_gradients_whose_momentum_overflows_are_clipped_or_skipped_and_counted",
    ),
    (
        "a slice is skipped without its stack",
        "factored.py",
        "self.finite = _all_finite((GV, GtU)).view(-1, self.b).all(dim=1)",
        "self.finite = _all_finite((GV, GtU)).view(-1, self.b).any(dim=1)",
        "test_robustness.py::test_a_nan_in_one_slice_skips_the_stack_and_a_nan_in_a_vector_is_counted",
    ),
    (
        "one beta for all groups of a shape",
        "optimizer.py",
        "key = (id(group), member.shape, param.device)",
        "key = (member.shape, param.device)",
        "test_optimizer.py::test_groups_of_equal_shapes_keep_their_own_options",
    ),
    (
        "the scaler's scale left in the raw gradient",
        "authors.py",
        "return G if member.factor is None else G * member.factor",
        "return G",
        "test_optimizer.py::test_gradscaler_reaches_the_raw_gradient_of_the_authors_step_and_unscaled_gradients",
    ),
    (
        "norms squared in float32",
        "momentum.py",
        "scale[..., 0, 0].double().square()",
        "scale[..., 0, 0].square().double()",
        "test_robustness.py::test_clipping_and_norms_hold_over_the_whole_range_of_float32",
    ),
    (
        "rounding without the parameter's number",
        "apply.py",
        "key_of(seed, ROUNDING, index)",
        "key_of(seed, ROUNDING, 0)",
        "test_rounding.py::test_equal_parameters_are_rounded_by_their_own_numbers",
    ),
    (
        "the step of bfloat16 weights doubled",
        "apply.py",
        "value.baddbmm_(left[b, rows], right[b].mT, alpha=-1)",
        "value.baddbmm_(left[b, rows], right[b].mT, alpha=-1 if in_place else -2)",
        "test_rounding.py::test_a_step_of_bfloat16_weights_is_the_rounded_step_of_float32_weights",
    ),
    (
        "a value read back in the step",
        "factored.py",
        "after = self.advance(factor)\n",
        "after = self.advance(factor)\n        bool(self.active.any())\n",
        "test_optimizer.py::test_a_step_reads_nothing_back_once_no_matrix_is_pending",
    ),
    (
        "start with the wrong inverse",
        "momentum.py",
        "X = torch.linalg.solve_triangular(T, P.mT @ Z.mT, upper=True)",
        "X = T @ (P.mT @ Z.mT)",
        "test_momentum.py::test_start_equals_the_svd_of_a_gradient_of_rank_at_most_r",
    ),
    (
        "clip leaves factored parameters out",
        "factored.py",
        "(self.GV * factor, self.GtU * factor)",
        "(self.GV, self.GtU)",
        "test_optimizer.py::test_one_factor_clips_factored_and_adamw_parameters_together",
    ),
    (
        "biased rounding",
        "apply.py",
        "words & 0xFFFF",
        "words & 0x7FFF",
        "test_rounding.py::test_rounding_is_unbiased_and_to_a_neighbour",
    ),
    (
        "rounding without the step",
        "rng.py",
        "step.to(device, torch.int32) ^ word",
        "0 * step.to(device, torch.int32) ^ word",
        "test_rounding.py::test_words_equal_the_hash_in_python_integers",
    ),
    (
        "autocast reaches the algebra",
        "precision.py",
        "torch.autocast(device_type, enabled=False) if cast else nullcontext()",
        "nullcontext()",
        "test_robustness.py::test_reduced_precision_settings_and_autocast_change_no_bit",
    ),
    (
        "complement of the factors alone",
        "complement.py",
        "torch.cat([U, _new_directions(U, GV / scale, noise)], dim=-1)",
        "U",
        "test_optimizer.py::test_ten_steps_equal_the_dense_algorithm",
    ),
    (
        "nesterov along the first update",
        "authors.py",
        "if self.nesterov:",
        "if False:",
        "test_paper.py::test_twenty_steps_equal_the_published_formula",
    ),
    (
        "a layer sketches the first window by another matrix",
        "attach/sketch.py",
        "GtU = _cast(x.mT @ (d @ U)",
        "GtU = _cast(x.mT @ (d @ U.flip(0))",
        "test_attach_layers.py::test_attached_training_is_dense_training[plain-auto]",
    ),
    (
        "an embedding sketches by another matrix",
        "attach/sketch.py",
        "U[ids])",
        "U[ids.flip(0)])",
        "test_attach_layers.py::test_attached_training_is_dense_training[embedding-auto]",
    ),
    (
        "padding rows have a gradient",
        "attach/sketch.py",
        "torch.where((ids == ctx.padding)[:, None], 0.0, U[ids])",
        "U[ids]",
        "test_attach_layers.py::test_attached_training_is_dense_training[embedding with padding-auto]",
    ),
    (
        "the weight's gradient is computed as well",
        "attach/sketch.py",
        "        if sketch:\n            V = ",
        "        if sketch:\n            d.mT @ x\n            V = ",
        "test_attach_memory.py::test_no_tensor_of_a_weights_size_is_made_in_backward_from_the_first_window_on",
    ),
    (
        "sketched layers without a net",
        "attach/release.py",
        "        self.window.add(grad)\n",
        "",
        "test_attach_layers.py::test_attached_training_is_dense_training[multihead attention-auto]",
    ),
    (
        "the last micro-batch wins",
        "attach/window.py",
        "GV.baddbmm_(G, V)",
        "GV.copy_(G @ V)",
        "test_attach_layers.py::test_attached_training_is_dense_training[convolution-release]",
    ),
    (
        "sketches outlive the step",
        "attach/handle.py",
        "            window.open(pending.get(param, []))\n",
        "            if window.pending:\n                window.open(pending.get(param, []))\n",
        "test_attach.py::test_sketches_are_forgotten_by_either_zero_grad_and_by_step_and_outlive_nothing_else",
    ),
    (
        "the model's zero_grad leaves the sketches",
        "attach/handle.py",
        "            self._mofasgd_handle.clear()",
        "            pass",
        "test_attach.py::test_sketches_are_forgotten_by_either_zero_grad_and_by_step_and_outlive_nothing_else",
    ),
    (
        "the optimizer's zero_grad leaves the sketches",
        "base.py",
        "            self._handle.clear()",
        "            pass",
        "test_attach.py::test_sketches_are_forgotten_by_either_zero_grad_and_by_step_and_outlive_nothing_else",
    ),
    (
        "factors cast in the first window for ever",
        "attach/handle.py",
        "        if casts:\n",
        "        if False:\n",
        "test_attach_failures.py::test_layers_in_bfloat16_sketch_by_the_newest_factors",
    ),
    (
        "bfloat16 layers sketch by old factors",
        "attach/handle.py",
        "        if casts:\n",
        "        if False:\n",
        "test_attach.py::test_autocast_sketches_stay_as_near_to_float32_as_dense_autocast_does",
    ),
    (
        "autocast's result loses the weight's rounding",
        "attach/sketch.py",
        "_cast(d @ _cast(weight, d.dtype), ctx.input)",
        "(d.to(weight.dtype) @ weight)",
        "test_attach_node.py::test_the_gradients_of_input_and_bias_are_the_layers_own_to_the_bit",
    ),
    (
        "a weight edited before backward",
        "attach/sketch.py",
        "weight._version != ctx.weight_version",
        "False",
        "test_attach_node.py::test_a_weight_changed_before_backward_raises_where_the_inputs_gradient_needs_it",
    ),
    (
        "sketches by factors that a step has changed",
        "attach/sketch.py",
        "if _versions(U, V, keys) != ctx.versions:",
        "if False:",
        "test_attach_life.py::test_a_graph_kept_over_a_step_raises_instead_of_sketching_by_new_factors",
    ),
    (
        "a weight frozen since the forward is sketched",
        "attach/sketch.py",
        "if not weight.requires_grad:\n            return x",
        "if False:\n            return x",
        "test_attach_node.py::test_a_weight_frozen_between_forward_and_backward_gets_nothing",
    ),
    (
        "a layer under vmap",
        "attach/sketch.py",
        "torch._C._are_functorch_transforms_active() or ",
        "",
        "test_attach_node.py::test_what_the_node_does_not_know_runs_dense_and_the_net_takes_its_gradient",
    ),
    (
        "release casts a whole gradient",
        "attach/window.py",
        "rows = max(1, _TILE // (m * n)), max(1, _TILE // n)",
        "rows = batch, m",
        "test_attach_node.py::test_release_casts_a_gradient_tile_by_tile",
    ),
    (
        "a view as a layer's output",
        "attach/sketch.py",
        "if not torch.compiler.is_compiling() and not y._is_view():",
        "if True:",
        "test_attach_layers.py::test_attached_training_is_dense_training[plain-auto]",
    ),
    (
        "double backward loses the weight",
        "attach/sketch.py",
        "        if torch.is_grad_enabled():\n            raise",
        "        if False:\n            raise",
        "test_attach_layers.py::test_double_backward_through_a_sketch_is_refused_and_released_gradients_allow_it",
    ),
    (
        "hooks outlive detach",
        "attach/handle.py",
        "            removable.remove()\n",
        "",
        "test_attach_life.py::test_detaching_restores_the_model_exactly",
    ),
    (
        "hooks outlive the optimizer",
        "attach/handle.py",
        "self._finalizer = weakref.finalize(owner, self._restore)",
        "self._finalizer = weakref.finalize(owner, lambda: None)",
        "test_attach_life.py::test_detaching_restores_the_model_exactly",
    ),
    (
        "copies are attached",
        "attach/swap.py",
        "if not key.startswith(_PREFIX)}",
        "}",
        "test_attach_life.py::test_copies_of_an_attached_model_are_plain_and_train_on_their_own",
    ),
    (
        "bound once for all",
        "attach/handle.py",
        "        if self._signature(owner) == self._bound:\n",
        "        if self._bound:\n",
        "test_attach_life.py::test_parameters_replaced_after_attaching_are_bound_at_the_next_forward",
    ),
    (
        "four updates instead of one",
        "attach/release.py",
        "        if self.window.stepped:\n",
        "        if False:\n",
        "test_attach.py::test_a_second_backward_raises_when_the_weights_have_moved",
    ),
    (
        "bad gradients of steps in backward are not counted",
        "optimizer.py",
        "        self._taken.finite.append(update.finite)\n",
        "",
        "test_attach_layers.py::test_a_parameter_with_a_non_finite_sketch_is_left_and_counted",
    ),
    (
        "steps in backward are not in the norm",
        "optimizer.py",
        "        self._taken.squares.append(update.square_norms.sum())\n",
        "",
        "test_attach.py::test_steps_in_backward_equal_dense_steps_and_hold_one_gradient",
    ),
    (
        "a complement asked for later is ignored",
        "optimizer.py",
        "            self._refuse_full_gradient(group)\n",
        "",
        "test_attach.py::test_what_reads_the_full_gradient_is_refused_with_the_reason",
    ),
    (
        "loss scales reach the sketches",
        "optimizer.py",
        "if self._handle is not None and not (grad_scale is None and found_inf is None):",
        "if False:",
        "test_attach.py::test_gradscaler_is_refused_while_attached",
    ),
    (
        "a loaded state is not sketched by",
        "base.py",
        "            self._handle.renew()",
        "            pass",
        "test_attach_failures.py::test_a_window_that_is_open_while_a_state_is_loaded_is_dropped",
    ),
    (
        "test matrices that autocast rounds",
        "rng.py",
        "part.copy_(value.to(torch.bfloat16))",
        "part.copy_(value)",
        "test_rounding.py::test_gaussian_is_exact_in_bfloat16_and_equal_in_tiles",
    ),
    (
        "completion columns of stored factors count",
        "factored.py",
        "torch.where(kept, torch.cat(parts), 0.0)",
        "torch.cat(parts)",
        "test_robustness.py::test_rank_one_gradients_in_new_directions_move_their_span_only_whatever_their_scale",
    ),
    (
        "both sides by one test matrix",
        "attach/sketch.py",
        "gaussian(*shape, keys[side], delta",
        "gaussian(*shape, keys[0], delta",
        "test_attach_layers.py::test_attached_training_is_dense_training[plain-auto]",
    ),
    (
        "a graph for each compiled layer",
        "attach/window.py",
        "window = None if torch.compiler.is_compiling() else self",
        "window = self",
        "test_attach.py::test_compiled_models_have_no_graph_break_and_train_as_uncompiled_ones",
    ),
    (
        "other weights in place of the attached ones are sketched",
        "attach/sketch.py",
        "weight is not window.param or ",
        "",
        "test_attach_layers.py::test_weights_put_in_place_of_the_attached_ones_get_their_own_gradients",
    ),
    (
        "the first window's sketches are held through the step",
        "attach/window.py",
        "        assert total is not None\n        self.clear()\n",
        "        assert total is not None\n",
        "test_attach_memory.py::test_the_first_window_needs_no_more_than_its_sketches_and_one_layers_temporaries",
    ),
    (
        "an old handle detaches a new one",
        "attach/handle.py",
        "        if self._finalizer.detach() is None:\n            return\n",
        "        self._finalizer.detach()\n",
        "test_attach_life.py::test_an_old_handle_does_not_touch_a_new_attachment",
    ),
]

MUTANTS += APP_MUTANTS


def run(source, test):
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / test)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "src" / "mofasgd", tmp_path / "mofasgd")
    return tmp_path


@pytest.mark.slow
def test_the_unharmed_copy_is_what_the_tests_import_and_passes(copied):
    path = subprocess.run(
        [sys.executable, "-c", "import mofasgd; print(mofasgd.__file__)"],
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
    ).stdout
    assert path.startswith(str(copied))
    for test in sorted({m[4] for m in MUTANTS}):
        assert run(copied, test).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("file", "code", "fault", "test"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_fault_is_caught(copied, file, code, fault, test):
    path = copied / "mofasgd" / file
    text = path.read_text()
    assert text.count(code) == 1, f"{code!r} stands {text.count(code)} times in {file}: update the mutant"
    path.write_text(text.replace(code, fault))
    done = run(copied, test)
    # 1: a test failed. Anything else (2: no collection, 4: no such test) is not a catch.
    assert done.returncode == 1, done.stdout[-2000:]
