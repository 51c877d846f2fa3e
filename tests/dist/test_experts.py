"""All experts of a DeepSpeed MoE layer are one logical tensor: the expert-parallel size may change over a resume."""

import pytest
import torch

from benchmarks.pool import Pools
from tests.dist import experts

EXPERT = "model.moe.deepspeed_moe.experts.deepspeed_experts.0.weight"


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ((4, 1, 2, "fp32"), [(4, 1, 2), (1, 1, 1), (2, 2, 1), (4, 2, 4)]),
        ((2, 2, 2, "bf16"), [(2, 2, 2), (4, 1, 4), (1, 1, 1)]),
        ((2, 0, 2, "fp32"), [(2, 0, 2), (4, 1, 2)]),
    ],
    ids=["zero1", "zero2-bf16", "zero0"],
)
def test_experts_are_restored_at_another_expert_parallel_size(pools: Pools, tmp_path, source, targets):
    world, stage, ep_size, dtype = source
    saved = pools[world].run(experts.save, str(tmp_path), stage, ep_size, dtype)[0]
    assert saved["whole"][EXPERT].shape == (experts.EXPERTS, 5, experts.WIDTH)
    assert len({tuple(row.flatten().tolist()) for row in saved["whole"][EXPERT]}) == experts.EXPERTS, "experts differ"
    for world, stage, ep_size in targets:
        loaded = pools[world].run(experts.load, str(tmp_path), stage, ep_size, dtype)[0]
        assert loaded["difference"] == 0.0
        assert loaded["whole"].keys() == saved["whole"].keys()
        assert all(torch.equal(loaded["whole"][name], saved["whole"][name]) for name in saved["whole"])
        assert not torch.equal(loaded["before"][EXPERT], saved["whole"][EXPERT])
        if (world, stage, ep_size) == source[:3]:
            assert loaded["losses"] == saved["losses"]
