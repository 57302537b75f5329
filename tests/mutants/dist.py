"""Faults with several processes."""

from mutants import Mutant

DDP, FSDP = "test_dist_ddp.py::", "test_dist_fsdp.py::"

MUTANTS = [
    Mutant(
        "replicas add dense gradients instead of averaging them",
        "attach/window.py",
        "of_tensors = ranks if self.part is None else self.part.replicas",
        "of_tensors = 1",
        DDP + "test_two_replicas_are_one_process_with_both_batches[ddp release-float32]",
    ),
    Mutant(
        "ranks add what layers have sketched",
        "attach/window.py",
        "alpha=1 / ranks",
        "alpha=1.0",
        DDP + "test_two_replicas_are_one_process_with_both_batches[ddp auto-float32]",
    ),
    Mutant(
        "a shard is sketched by the first rows of U",
        "attach/window.py",
        "_add_sketch(GV[held, rows], GtU[held], G, U[held, rows], V[held])",
        "_add_sketch(GV[held, rows], GtU[held], G, U[held, : rows.stop - rows.start], V[held])",
        FSDP + "test_sharded_training_is_one_process_with_both_batches[dense-float32]",
    ),
    Mutant(
        "the first window's shard is sketched by the first rows of Psi",
        "attach/window.py",
        "first.left(G.device)[rows]",
        "first.left(G.device)[: rows.stop - rows.start]",
        FSDP + "test_sharded_training_is_one_process_with_both_batches[release-float32]",
    ),
    Mutant(
        "factored shards round by local indices",
        "factored.py",
        "replace(rounding, offset=part.offset(member.param.shape))",
        "rounding",
        FSDP + "test_stochastic_rounding_does_not_depend_on_the_sharding",
    ),
    Mutant(
        "AdamW's shards round by local indices",
        "optimizer.py",
        "            rounding = replace(rounding, offset=part.offset(param.shape))\n",
        "            pass\n",
        FSDP + "test_stochastic_rounding_does_not_depend_on_the_sharding",
    ),
    Mutant(
        "AdamW's norms are those of a rank's shards",
        "exchange.py",
        "ranks.sum([*tensors, *present, *squares])",
        "ranks.sum([*tensors, *present])",
        FSDP + "test_all_ranks_clip_by_the_norm_of_all_shards[dense]",
    ),
    Mutant(
        "replicas of a shard count twice in the norm",
        "exchange.py",
        "part.replicas**0.5",
        "1.0",
        FSDP + "test_hybrid_sharding_is_sharding[dense shards of replicas]",
    ),
    Mutant(
        "no gradient on any rank is a zero gradient",
        "exchange.py",
        "plain[param].present = seen > 0",
        "plain[param].present = seen >= 0",
        DDP + "test_what_no_rank_uses_does_not_move_or_decay",
    ),
    Mutant(
        "drift is never looked for",
        "base.py",
        "self._exchanged % self._check_every == 0",
        "False",
        DDP + "test_drifted_replicas_are_told_of_once_and_get_rank_0_s_state",
    ),
    Mutant(
        "ranks begin with their own weights",
        "base.py",
        "            ranks.broadcast([*self._handle.whole(), *self._handle.buffers()])\n",
        "            pass\n",
        DDP + "test_two_replicas_are_one_process_with_both_batches[plain auto-float32]",
    ),
    Mutant(
        "a root's own parameter stays in DDP's buckets",
        "dist/replicas.py",
        'for prefix in ("", ".", "_orig_mod.")',
        'for prefix in ("", "_orig_mod.")',
        DDP + "test_parameters_leave_ddp_s_buckets_and_the_user_s_list_stays",
    ),
    Mutant(
        "the user's ignore list is lost",
        "dist/replicas.py",
        " | set(self._users or ())",
        "",
        DDP + "test_parameters_leave_ddp_s_buckets_and_the_user_s_list_stays",
    ),
    Mutant(
        "a step in backward is by this rank's gradient",
        "optimizer.py",
        "        ranks.sum(window.share(ranks.size))\n",
        "        window.share(1)\n",
        DDP + "test_a_step_in_backward_sums_its_sketches_there",
    ),
    Mutant(
        "release follows no_sync",
        "attach/handle.py",
        "        keep_sync(self._holders)\n",
        "",
        FSDP + "test_windows_without_gradient_sync_are_whole[release]",
    ),
    Mutant(
        "gathered weights are taken for the parameters",
        "attach/handle.py",
        "        reshard(self._model)\n",
        "",
        FSDP + "test_attaching_after_an_evaluation_finds_the_shards",
    ),
    Mutant(
        "a class on top of a sketching layer stops it",
        "attach/sketch.py",
        "not in (kind.forward, _MIXINS[kind].forward)",
        "is not kind.forward",
        FSDP + "test_parameters_swapped_after_attach_are_followed",
    ),
    Mutant(
        "a layer on a gathered weight does not sketch",
        "attach/sketch.py",
        "(weight is not window.param and not window.gathered(weight))",
        "weight is not window.param",
        FSDP + "test_sketched_layers_make_no_gradient_for_fsdp_to_reduce",
    ),
]
