"""What each engine's state becomes, beyond the matrix."""

import pytest

from benchmarks.pool import Pools
from tests.dist import jobs


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("zero1_master", {"dtype": "bf16"}),
        ("zero1", {"zero": {"round_robin_gradients": True}}),
        ("zero2", {"accumulation": 2}),
        ("zero3", {"accumulation": 2, "dtype": "bf16"}),
        ("fsdp2", {"accumulation": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_resume_continues_bitwise(pools: Pools, tmp_path, engine, options):
    reference = pools[2].run(jobs.save_then_continue, engine, str(tmp_path), 3, options)
    found = pools[2].run(jobs.resume_then_continue, engine, str(tmp_path), 3, options)
    for losses, after in zip(reference, found, strict=True):
        assert after == {"progress": (3, 36), "difference": 0.0, "losses": losses}


@pytest.mark.parametrize(
    ("engine", "world_size", "mark"),
    [
        ("zero1_offload", 2, "offloaded"),
        ("zero3_offload", 2, "offloaded"),
        ("zero3_hpz", 4, "second copies"),
        ("hsdp", 4, "Replicate Shard"),
        ("tp", 2, "Shard"),
        ("fsdp2_tp", 4, "_StridedShard Shard"),
        ("ddp_compiled", 2, "compiled"),
        ("fsdp2_compiled", 2, "compiled"),
        ("fsdp2_recomputed", 2, "FSDPCheckpointWrapper"),
    ],
)
def test_a_variant_of_the_zoo_is_what_it_is_called(pools: Pools, engine, world_size, mark):
    assert mark in pools[world_size].run(jobs.marks, engine)[0]


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2", "ddp"])
def test_a_save_before_the_first_step_clears_what_the_target_had(pools: Pools, tmp_path, engine):
    reference = pools[2].run(jobs.save_then_continue, "ddp", str(tmp_path), 0, {})
    found = pools[2].run(jobs.resume_then_continue, engine, str(tmp_path), 0, {}, own_steps=2)
    assert found[0]["losses"] == reference[0]
    assert found[0]["difference"] == 0.0


def test_names_tied_frozen_and_unused(pools: Pools, tmp_path):
    names = pools[2].run(jobs.stored_names, "ddp", str(tmp_path), unused=True)[0]
    assert len(names) == len(set(names))
    assert "model.embed.weight" in names
    assert "model.head.weight" not in names, "tied weights are stored once"
    assert "model.frozen.weight" in names
    assert not [n for n in names if n.startswith(("optim.state.frozen", "optim.state.unused"))]
    assert {"optim.state.mix.exp_avg", "optim.state.mix.exp_avg_sq", "optim.state.mix.step"} <= set(names)
    assert [n for n in names if n.startswith("buffers.")] == ["buffers.shift"], "buffers that are not persistent are not stored"


def test_hyper_parameters_follow_their_parameters(pools: Pools, tmp_path):
    pools[2].run(jobs.save_then_continue, "zero2", str(tmp_path), 2, {})
    for engine in ("fsdp2", "zero3"):
        found = pools[2].run(jobs.hyper_parameters_after_resume, engine, str(tmp_path))[0]
        assert found["lr"] == pytest.approx([3e-3 * 3 / 4, 1e-3 * 3 / 4])
        assert found["weight_decay"] == [0.1, 0.0]
        assert found["betas"] == [(0.9, 0.95)] * 2


def test_deepspeed_counters_are_restored(pools: Pools, tmp_path):
    pools[2].run(jobs.save_then_continue, "fsdp2", str(tmp_path), 3, {})
    assert pools[2].run(jobs.counters_after_resume, "zero1", str(tmp_path))[0] == {
        "global_steps": 3,
        "global_samples": 36,
        "micro_steps": 3,
        "skipped_steps": 0,
    }


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_a_save_inside_gradient_accumulation_is_deferred_to_its_boundary(pools: Pools, tmp_path, engine):
    for found in pools[2].run(jobs.save_inside_accumulation, engine, str(tmp_path / "run")):
        assert found["answer"] == ""
        assert found["before"] == []
        assert found["seen"] == ["step_00000002"], "with the progress of the boundary"
        assert found["losses"][0] == found["losses"][1]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_weights_changed_behind_the_masters_are_an_error_on_attach(pools: Pools, tmp_path, engine):
    for error in pools[2].run(jobs.attach_after_change, engine, str(tmp_path)):
        assert error.startswith("LayoutError")
        assert "load them before" in error


def test_another_order_of_flat_buffers_is_an_error_on_attach(pools: Pools, tmp_path):
    for error in pools[2].run(jobs.attach_to_other_order, str(tmp_path)):
        assert error.startswith("LayoutError")


def test_random_state_is_each_ranks_own(pools: Pools, tmp_path):
    drawn = pools[2].run(jobs.save_and_draw, str(tmp_path))
    assert drawn[0] != drawn[1]
    assert pools[2].run(jobs.resume_and_draw, str(tmp_path)) == drawn


def test_random_state_at_another_world_size_is_derived_and_repeatable(pools: Pools, tmp_path):
    drawn = pools[2].run(jobs.save_and_draw, str(tmp_path))
    found = pools[3].run(jobs.resume_and_draw, str(tmp_path))
    assert len(set(found)) == 3
    assert not set(found) & set(drawn)
    assert pools[3].run(jobs.resume_and_draw, str(tmp_path)) == found


def test_fsdp2_does_not_go_on_with_gathered_copies_of_old_weights(pools: Pools, tmp_path):
    for found in pools[2].run(jobs.resume_while_gathered, str(tmp_path)):
        assert found["moved"] != found["saved"]
        assert found["resumed"] == found["saved"]
        assert found["engine"] == "fsdp2"


def test_values_that_differ_by_rank_are_named_not_lost(pools: Pools, tmp_path):
    for found in pools[2].run(jobs.records_that_differ, str(tmp_path)):
        assert "ranks [1] have another state of loader than rank 0" in found["member"]
        assert "ranks [1] have other optimizer settings, schedules or counters than rank 0" in found["lr"]
        assert "UsageError" in found["metric"]


def test_fsdp1_is_refused(pools: Pools, tmp_path):
    assert all("fully_shard" in error for error in pools[2].run(jobs.fsdp1, str(tmp_path)))


def test_zero3_without_an_optimizer(pools: Pools, tmp_path):
    reference = pools[2].run(jobs.frozen_zero3, str(tmp_path), 0, load=False)
    assert pools[2].run(jobs.frozen_zero3, str(tmp_path), 1, load=True) == reference


@pytest.mark.parametrize("own_step", [False, True])
def test_an_optimizer_on_local_shards_gets_each_ranks_state_back(pools: Pools, tmp_path, own_step):
    for found in pools[2].run(jobs.local_state, str(tmp_path), own_step):
        assert found["losses"] == found["reference"]
        assert found["step"] == "int"
