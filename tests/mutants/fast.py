"""Faults of the algebra by Gram matrices, of the kernels and of what batches a step."""

from mutants import Mutant

MUTANTS = [
    Mutant(
        "no completion of null directions",
        "algebra.py",
        "    return orthonormal(torch.where(missing, fill, Q))[0]\n\n\ndef complete_frame",
        "    return Q\n\n\ndef complete_frame",
        "test_solver.py::test_the_update_keeps_its_budget_on_every_spectrum",
    ),
    Mutant(
        "one factorization, short by its shift",
        "algebra.py",
        "return R2 @ R1, torch.linalg.solve_triangular(R2, N1, upper=True, left=False)",
        "return R1, N1",
        "test_robustness.py::test_rank_one_gradients_in_new_directions_move_their_span_only_whatever_their_scale",
    ),
    Mutant(
        "dependent columns kept",
        "algebra.py",
        "real = R1.diagonal(dim1=-2, dim2=-1).square() > DEPENDENT",
        "real = R1.diagonal(dim1=-2, dim2=-1).square() > 0",
        "test_kernels.py::test_dependent_columns_are_left_out",
    ),
    Mutant(
        "too few subspace iterations",
        "algebra.py",
        "for power in (core, core.mT, H, *[fourth] * _ITERATIONS):",
        "for power in (core, core.mT):",
        "test_solver.py::test_subspace_iteration_keeps_the_budget_too",
    ),
    Mutant(
        "what a cancelled momentum leaves is a direction",
        "algebra.py",
        "found = torch.where(found <= torch.finfo(torch.float32).eps * terms, 0.0, found)",
        "pass",
        "test_robustness.py::test_a_momentum_of_exactly_zero_is_not_dead",
    ),
    Mutant(
        "a matrix that is not finite spoils its batch",
        "solver.py",
        "left, right = torch.where(mask, left, 0.0), torch.where(mask, right, 0.0)",
        "pass",
        "test_solver.py::test_a_matrix_that_is_not_finite_leaves_its_neighbours_alone",
    ),
    Mutant(
        "the factor scales one sketch only",
        "algebra.py",
        "middle[:, :r, r:] = middle[:, r:, :r] = torch.diag_embed(f * real)",
        "middle[:, :r, r:] = middle[:, r:, :r] = torch.diag_embed(real)",
        "test_solver.py::test_a_factor_scales_the_gradient_and_beta_may_be_a_tensor",
    ),
    Mutant(
        "a stack that its states do not share",
        "stack.py",
        "        state[key] = part\n",
        "        pass\n",
        "test_stack.py::test_parameters_of_one_shape_train_as_they_do_alone",
    ),
    Mutant(
        "neighbours round by the same half",
        "kernels/common.py",
        "halves = tl.interleave(words & 0xFFFF, words >> 16)",
        "halves = tl.interleave(words & 0xFFFF, words & 0xFFFF)",
        "test_kernels.py::test_weights_move_as_by_the_plain_update",
    ),
    Mutant(
        "one column of the factors too few",
        "kernels/apply.py",
        "real = k < rank",
        "real = k < rank - 1",
        "test_kernels.py::test_weights_move_as_by_the_plain_update",
    ),
    Mutant(
        "slices of a stack at the same address",
        "kernels/__init__.py",
        "start and start + i * size",
        "start and start",
        "test_kernels.py::test_addresses_are_those_of_the_matrices",
    ),
    Mutant(
        "the left sketch by the rows of the gradient",
        "kernels/project.py",
        "_multiply(table, left.to(some.dtype), (n, m), (1, n))",
        "_multiply(table, left.to(some.dtype), (n, m), (n, 1))",
        "test_kernels.py::test_sketches_equal_plain_products_and_a_missing_gradient_counts_as_zeros",
    ),
    Mutant(
        "rotations stop early",
        "kernels/jacobi.py",
        "TOLERANCE = 1e-4",
        "TOLERANCE = 2.0",
        "test_kernels.py::test_rotated_rows_are_orthogonal_and_keep_the_singular_values",
    ),
    Mutant(
        "a start without the test matrix",
        "algebra.py",
        "B, NB, _ = orthonormal(PY @ N)",
        "B, NB, _ = orthonormal(PY)",
        "test_solver.py::test_the_start_by_gram_matrices_is_that_of_the_reference",
    ),
]
