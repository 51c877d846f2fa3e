"""Against a boolean mask in float64; the same cases on the CPU and by Triton's interpreter."""

import pytest
import torch

from engine_kernels.mask_scale import mask_scale_, op, triton
from tests.kernels.sm90 import Case, compile_all

SHAPES = [(70, 300), (5,), (4096,), (3, 2, 2), (0,), (10_000,)]
INTERVALS = [[(9000, 21_000)], [(0, 0), (1, 2), (4, 5)], [(0, 4096)], [], [], [(3, 4), (10, 1500), (1500, 1501), (8191, 9999)]]
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float32, torch.bfloat16, torch.float16],
}


def sample(dtypes, misaligned=False):
    """Gradients with NaN and inf where they are not trained, and masks of what is."""
    generator = torch.Generator().manual_seed(0)
    grads, masks = [], []
    for i, (shape, own) in enumerate(zip(SHAPES, INTERVALS, strict=True)):
        mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        for begin, end in own:
            mask[begin:end] = True
        poison = torch.where(torch.rand(mask.shape, generator=generator) < 0.5, torch.nan, -torch.inf)
        flat = torch.empty(len(mask) + 1, dtype=dtypes[i % len(dtypes)])[misaligned : len(mask) + misaligned]
        grads.append(flat.copy_(torch.where(mask, torch.randn(mask.shape, generator=generator), poison)).view(shape))
        masks.append(mask.view(shape))
    return grads, masks


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_what_is_trained_is_scaled_and_the_rest_is_zero(on, dtypes, misaligned):
    grads, masks = sample(dtypes, misaligned)
    wanted = [torch.where(mask, grad.double() * 0.3, 0) for grad, mask in zip(grads, masks, strict=True)]
    mask_scale_(grads, INTERVALS, torch.tensor(0.3))
    for grad, wide, mask in zip(grads, wanted, masks, strict=True):
        ulp = torch.finfo(grad.dtype).eps
        rounding = 0.51 if on == "torch" or grad.dtype == torch.float32 else 1.0  # the interpreter truncates
        torch.testing.assert_close(grad.double(), wide, rtol=max(rounding * ulp, 2e-7), atol=1e-7)
        assert not grad[~mask].view(-1).view(torch.uint8).any(), "zeros have no sign"


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_without_a_scale_what_is_trained_keeps_its_bits(on, dtypes):
    grads, masks = sample(dtypes)
    grads[5].view(-1)[20] = torch.nan
    before = [g.clone() for g in grads]
    mask_scale_(grads, INTERVALS)
    for grad, old, mask in zip(grads, before, masks, strict=True):
        assert torch.equal(grad[mask].view(torch.uint8), old[mask].view(torch.uint8))
        assert not grad[~mask].any()


def test_a_scale_of_zero_does_not_hide_what_is_not_finite(on):
    grad = torch.tensor([1.0, torch.inf, torch.nan, torch.inf])
    mask_scale_([grad], [[(0, 3)]], torch.tensor(0.0))
    torch.testing.assert_close(grad, torch.tensor([0.0, torch.nan, torch.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize("misaligned", [False, True])
def test_only_aligned_tensors_are_moved_by_vectors(monkeypatch, misaligned):
    """A 128-bit load from another address is an error on a GPU, which the interpreter does not see."""
    write, whole = triton._write, []
    monkeypatch.setattr(triton, "_write", lambda *args: whole.append(bool(args[-2])) or write(*args))
    triton.mask_scale_(sample([torch.float32], misaligned)[0][5:], [0, 0, 8193], torch.tensor(0.5))
    assert whole == ([False] * 4 if misaligned else [False, True, True, False])


def test_it_repeats_to_the_bit(on):
    found = [sample(DTYPES["mixed"])[0] for _ in range(2)]
    for grads in found:
        mask_scale_(grads, INTERVALS, torch.tensor(0.3))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_tensors(on):
    mask_scale_([], [], torch.tensor(0.5))


def test_float64_on_the_cpu():
    grad = torch.rand(9, dtype=torch.float64)
    wanted = torch.cat([torch.zeros(4), grad[4:] * 0.1])
    mask_scale_([grad], [[(4, 9)]], torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(grad, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)])
def test_torchs_own_checks_of_an_operator(scale):
    grads = [g.nan_to_num(1, 1, 1) for g in sample(DTYPES["mixed"])[0]]  # the checks hold NaN to be a change
    torch.library.opcheck(torch.ops.lockstep.mask_scale.default, (grads, op.spans_of(INTERVALS, [g.numel() for g in grads]), scale))


def test_it_compiles_into_one_graph():
    found = []
    for act in (mask_scale_, torch.compile(mask_scale_, fullgraph=True, backend="aot_eager")):
        found.append(sample(DTYPES["mixed"])[0])
        act(found[-1], INTERVALS, torch.tensor(0.3))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([torch.zeros(3, 4).t()], [[]]), r"grads\[0\] is \(4, 3\) with strides \(1, 4\); it must be contiguous"),
        (([torch.zeros(3), torch.zeros(3, device="meta")], [[], []]), r"grads\[1\] is \(3,\) on meta; it must be \(3,\) on cpu"),
        (([torch.zeros(3).int()], [[]]), r"grads\[0\] is torch.int32 on cpu; it must be float32"),
        (([torch.zeros(3)], [[(0, 2), (1, 3)]]), r"tensor 0 has interval \(1, 3\) after one that ends at 2"),
        (([torch.zeros(3)], [[]], torch.ones(2)), r"scale is \(2,\) on cpu; it must be a 0-d tensor on cpu"),
    ],
)
def test_what_does_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        mask_scale_(*args)


def test_an_h100_moves_whole_tiles_by_vectors_and_others_by_elements():
    module = "engine_kernels.mask_scale.triton"
    types = {"tiles": "*i64", "tensors": "*i64", "scale": "*fp32", "row": "*i64", "begin": "i64", "end": "i64"}
    dtypes = ["tl.float32", "tl.bfloat16", "tl.float16"]
    scales = [Case(module, "_multiply", types, {"DTYPE": dtype, "TILE": 4096}, num_warps=8) for dtype in dtypes]
    zeros = [Case(module, "_multiply", types, {**case.constants, "scale": None}, num_warps=8) for case in scales]
    edges = [Case(module, "_write", types, {**case.constants, "WHOLE": False}, num_warps=8) for case in scales]
    found = compile_all([*scales, *zeros, *edges])
    assert all(made.spilled_bytes == made.stack_bytes == made.register_wgmma == made.atomics == 0 for made in found)
    assert [(made.vector_loads, made.vector_stores) for made in found] == [(4, 4), (2, 2), (2, 2), (0, 4), (0, 2), (0, 2), *[(0, 0)] * 3]
