"""Against float64 and torch.nn.utils.clip_grad_norm_; the same cases on the CPU and by Triton's interpreter."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.pool import Pools
from engine_kernels.masked_norm import masked_norm, op, triton
from tests.kernels.sm90 import Case, compile_all

SHAPES = [(70, 300), (5,), (8192,), (3, 2, 2), (0,), (20_000,)]
INTERVALS = [[(900, 21_000)], [(0, 0), (1, 2), (4, 5)], [(0, 8192)], [], [], [(3, 4), (10, 1500), (1500, 1501), (2047, 19_999)]]
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float32, torch.bfloat16, torch.float16],
}


def sample(dtypes, misaligned=False, seed=0):
    """Gradients that are NaN where they are not trained, and those elements that are, in float64."""
    generator = torch.Generator().manual_seed(seed)
    grads, trained = [], []
    for i, (shape, own) in enumerate(zip(SHAPES, INTERVALS, strict=True)):
        numel = torch.Size(shape).numel()
        flat = torch.full((numel + 1,), torch.nan, dtype=dtypes[i % len(dtypes)])[misaligned : numel + misaligned]
        for begin, end in own:
            flat[begin:end] = torch.randn(end - begin, generator=generator)
            trained.append(flat[begin:end].double())
        grads.append(flat.view(shape))
    return grads, torch.cat(trained)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_the_norm_is_that_of_the_trained_elements(on, dtypes, misaligned, max_norm):
    grads, trained = sample(dtypes, misaligned)
    found = masked_norm(grads, INTERVALS, inverse_scale=torch.tensor(0.25), max_norm=max_norm)
    norm = float(trained.norm()) / 4
    assert all(t.dtype == torch.float32 and t.ndim == 0 for t in found)
    assert float(found.norm) == pytest.approx(norm, rel=1e-6)
    assert found.found_inf == 0
    assert float(found.scale) == pytest.approx(0.25 * min(1.0, max_norm / (norm + 1e-6)) if max_norm else 0.25, rel=1e-6)


def test_clipping_is_torchs(on):
    grads, trained = sample([torch.float32])
    compact = torch.nn.Parameter(torch.zeros(len(trained)))
    compact.grad = trained.float()
    norm = torch.nn.utils.clip_grad_norm_(compact, 2.0)
    found = masked_norm(grads, INTERVALS, max_norm=2.0)
    torch.testing.assert_close(found.norm, norm)
    torch.testing.assert_close(trained.float() * found.scale, compact.grad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e19])
@pytest.mark.parametrize(("tensor", "at"), [(0, 900), (1, 4), (2, 0), (2, 8191), (5, 1500), (5, 19_998)])
def test_any_trained_element_that_is_not_finite_or_too_large_is_found(on, bad, tensor, at):
    grads, _ = sample([torch.float32])
    grads[tensor].view(-1)[at] = bad
    assert masked_norm(grads, INTERVALS).found_inf == 1


def test_the_sum_of_finite_squares_may_be_too_large(on):
    assert masked_norm([torch.full((20_000,), 1e18)], [[(0, 20_000)]]).found_inf == 1
    assert masked_norm([torch.full((20_000,), 1e18)], [[(0, 100)]]).found_inf == 0


@pytest.mark.parametrize("misaligned", [False, True])
def test_only_aligned_tensors_are_read_by_vectors(monkeypatch, misaligned):
    """A 128-bit load from another address is an error on a GPU, which the interpreter does not see."""
    sum_, whole = triton._sum, []
    monkeypatch.setattr(triton, "_sum", lambda *args: whole.append(bool(args[-2])) or sum_(*args))
    triton.sum_of_squares(sample([torch.float32], misaligned)[0], [5, 0, 16_385])
    assert whole == ([False] * 3 if misaligned else [True, True, False])


def test_it_repeats_to_the_bit(on):
    grads, _ = sample(DTYPES["mixed"])
    assert masked_norm(grads, INTERVALS).norm == masked_norm([g.clone() for g in grads], INTERVALS).norm


def test_without_trained_elements(on):
    for found in (masked_norm([], [], max_norm=1.0), masked_norm(sample([torch.float32])[0], [[]] * 6, max_norm=1.0)):
        assert (found.norm, found.found_inf, found.scale) == (0, 0, 1)


def test_the_results_share_neither_memory_nor_a_graph():
    scale = torch.tensor(0.5)
    found = masked_norm([torch.ones(3, requires_grad=True)], [[(0, 3)]], inverse_scale=scale)
    assert not any(t.requires_grad for t in found)
    found.scale.zero_()
    assert scale == 0.5


def of_a_part(bad: float) -> tuple[list[float], list[float]]:
    """What each rank finds of its own part, what all find where the first has no gradients, and what they find of all parts."""
    rank = dist.get_rank()
    grads = [[torch.full((10,), 3.0)], [torch.tensor([4.0, 0.0, bad])]][rank]
    own = masked_norm(grads, [[(0, 1)], [(0, 3)]][rank : rank + 1])
    everyones = masked_norm(grads, [[(0, 1)], [(0, 3)]][rank : rank + 1], max_norm=1.0, group=dist.group.WORLD)
    none = masked_norm(grads if rank else [], [[(0, 2)]] if rank else [], group=dist.group.WORLD)
    return [float(own.norm), float(none.norm)], [float(t) for t in everyones]


def test_a_group_finds_the_norm_of_all_its_parts(pools: Pools):
    (first, everyones), (second, others) = pools[2].run(of_a_part, 0.0)
    assert first == [3, 4]
    assert second == [4, 4]
    assert everyones == others == pytest.approx([5, 0, 0.2])
    found = pools[2].run(of_a_part, float("inf"))
    assert [everyones[1] for _, everyones in found] == [1, 1]
    assert found[0][0] == [3, 4]


def test_torchs_own_checks_of_an_operator():
    grads, _ = sample(DTYPES["mixed"])
    torch.library.opcheck(torch.ops.lockstep.sum_of_squares.default, (grads, op.spans_of(INTERVALS, [g.numel() for g in grads])))


def test_it_compiles_into_one_graph():
    grads, _ = sample(DTYPES["mixed"])
    options = {"inverse_scale": torch.tensor(0.5), "max_norm": 1.0}
    compiled = torch.compile(masked_norm, fullgraph=True, backend="aot_eager")
    assert compiled(grads, INTERVALS, **options) == masked_norm(grads, INTERVALS, **options)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([torch.zeros(3, 4).t()], [[]]), {}, r"grads\[0\] is \(4, 3\) with strides \(1, 4\); it must be contiguous"),
        (([torch.zeros(3), torch.zeros(3, device="meta")], [[], []]), {}, r"grads\[1\] is \(3,\) on meta; it must be \(3,\) on cpu"),
        (([torch.zeros(3).int()], [[]]), {}, r"grads\[0\] is torch.int32 on cpu; it must be float32"),
        (([torch.zeros(3)], [[(0, 4)]]), {}, r"tensor 0 has interval \(0, 4\)"),
        (([torch.zeros(3)], [[]]), {"max_norm": -1.0}, "max_norm is -1.0; it must be positive, or 0 for no clipping"),
        (([torch.zeros(3)], [[]]), {"inverse_scale": torch.ones(1)}, r"inverse_scale is \(1,\) on cpu; it must be a 0-d tensor on cpu"),
    ],
)
def test_what_does_not_fit(args, options, message):
    with pytest.raises(ValueError, match=message):
        masked_norm(*args, **options)


def test_an_h100_reads_whole_tiles_by_vectors_and_others_by_elements():
    module = "engine_kernels.masked_norm.triton"
    types = {"tiles": "*i64", "tensors": "*i64", "sums": "*fp32", "row": "*i64", "begin": "i64", "end": "i64"}
    dtypes = ["tl.float32", "tl.bfloat16", "tl.float16"]
    cases = [Case(module, "_squares", types, {"DTYPE": dtype, "TILE": 8192}, num_warps=8, unaligned=["sums"]) for dtype in dtypes]
    found = compile_all(cases)
    assert all(made.spilled_bytes == made.stack_bytes == made.register_wgmma == made.atomics == 0 for made in found)
    assert [made.vector_loads for made in found] == [8, 4, 4]
