"""Against float64 and torch.nn.functional.embedding, on fresh random input each time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine_kernels import frozen_embedding
from tests.kernels.sm90 import Case, compile_all


def sample(rows, base, width, shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, rows, shape, generator=generator) if rows else torch.zeros(shape, dtype=torch.int64)
    grad = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype)
    return ids, weight[:base].clone(), weight[base:].clone().requires_grad_(), grad


@pytest.mark.usefixtures("on")
@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows), st.integers(-1, rows - 1))),
    st.integers(1, 13),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_values_and_gradients_are_those_of_the_whole_table(rows_base_padding, width, shape, seed, kind):
    rows, base, padding = rows_base_padding
    ids, frozen, trainable, grad = sample(rows, base, width, tuple(shape), seed)
    out = frozen_embedding(ids.to(kind), frozen, trainable, padding)
    whole = torch.cat([frozen, trainable.detach()]).requires_grad_()
    expected = F.embedding(ids, whole, None if padding < 0 else padding)
    assert torch.equal(out, expected)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(trainable.grad, whole.grad[base:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_tokens_of_one_row_are_summed_wide_and_always_alike(dtype, on):
    tokens = 10000 if on == "torch" else 700  # which are many for an interpreter
    ids = torch.tensor([7, 3]).repeat(tokens // 2)
    _, frozen, trainable, _ = sample(9, 4, 33, (1,), 0, dtype)
    grad = torch.rand(tokens, 33, dtype=torch.float32).to(dtype)
    found = []
    for _ in range(2):
        trainable.grad = None
        frozen_embedding(ids, frozen, trainable).backward(grad)
        found.append(trainable.grad)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0][3].double(), grad[::2].double().sum(0), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0)
    assert not found[0][[0, 1, 2, 4]].any()


def test_nothing_of_the_frozen_rows_gradient_is_looked_at(on):
    ids, frozen, trainable, grad = sample(20, 10, 5, (200,), 1)
    grad[ids < 10] = float("nan")
    frozen[3] = float("inf")
    frozen_embedding(ids, frozen, trainable).backward(grad)
    assert trainable.grad.isfinite().all()


def test_nothing_reads_what_it_has_not_written(on, poisoned_memory):
    ids, frozen, trainable, grad = sample(50, 21, 70, (300,), 7)
    ids[:100] = 33
    out = frozen_embedding(ids, frozen, trainable)
    out.backward(grad)
    assert torch.equal(out, torch.cat([frozen, trainable.detach()])[ids])
    expected = torch.zeros(50, 70, dtype=torch.float64).index_add_(0, ids, grad)[21:]
    torch.testing.assert_close(trainable.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_transposed_table_and_ids_with_gaps(on):
    ids = torch.arange(40).view(2, 20)[:, ::3] % 12
    table = torch.randn(5, 12, dtype=torch.float64).t()
    frozen, trainable = table[:7], table[7:].detach().requires_grad_()
    assert torch.equal(frozen_embedding(ids, frozen, trainable), table[ids])
    frozen_embedding(ids, frozen, trainable).transpose(0, 1).sum().backward()
    assert torch.equal(trainable.grad, (ids.flatten() == torch.arange(7, 12)[:, None]).sum(1)[:, None].double().expand(5, 5))


def test_torchs_own_checks_of_an_operator():
    ids, frozen, trainable, _ = sample(11, 4, 3, (2, 5), 2)
    assert torch.autograd.gradcheck(lambda t: frozen_embedding(ids, frozen, t), trainable)
    torch.library.opcheck(torch.ops.lockstep.frozen_embedding.default, (ids, frozen, trainable, -1))
    torch.library.opcheck(torch.ops.lockstep.frozen_embedding_backward.default, (torch.randn(2, 5, 3), ids, 4, 7, 6))


def test_it_compiles_into_one_graph():
    ids, frozen, trainable, grad = sample(31, 12, 8, (4, 6), 3, torch.float32)
    plain = frozen_embedding(ids, frozen, trainable)
    plain.backward(grad)
    expected, trainable.grad = trainable.grad, None
    out = torch.compile(frozen_embedding, fullgraph=True, backend="aot_eager")(ids, frozen, trainable)
    out.backward(grad)
    assert torch.equal(out, plain)
    assert torch.equal(trainable.grad, expected)


def test_it_counts_no_flops():
    ids, frozen, trainable, grad = sample(31, 12, 8, (4, 6), 3)
    with FlopCounterMode(display=False) as counter:
        frozen_embedding(ids, frozen, trainable).backward(grad)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("bad", [-1, 20, 10**12])
def test_on_a_gpu_an_id_that_is_no_row_gives_nan_and_is_an_error_where_asked_for(bad, as_triton, monkeypatch):
    _, frozen, trainable, _ = sample(20, 10, 5, (1,), 4)
    ids = torch.tensor([3, bad, 19])
    out = frozen_embedding(ids, frozen, trainable)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    out.sum().backward()
    assert trainable.grad.sum() == 5
    monkeypatch.setenv("LOCKSTEP_DEBUG", "1")
    with pytest.raises(IndexError, match="the vocabulary has rows 0 to 19"):
        frozen_embedding(ids, frozen, trainable)


def test_what_an_h100_gets():
    module = "engine_kernels.frozen_embedding.triton"
    types = {"ids": "*i64", "frozen": "*bf16", "trainable": "*bf16", "out": "*bf16", "grad": "*bf16", "sums": "*fp32"}
    types |= dict.fromkeys(["order", "starts", "pieces", "owners"], "*i32")
    types |= dict.fromkeys(["base", "rows", "width", "stride", "frozen_stride", "trainable_stride"], "i32")
    aligned = ["width", "stride", "frozen_stride", "trainable_stride"]
    sums = {"AT_ONCE": 8, "WIDE": "tl.float32", "BLOCK": 512}
    cases = [
        Case(module, "_gather", types, {"BLOCK": 1024}, aligned=aligned),
        Case(module, "_sum_pieces", types, {"PIECE": 32, **sums}, aligned=aligned),
        Case(module, "_sum_rows", types, sums, aligned=aligned),
    ]
    for found in compile_all(cases):
        assert found.spilled_bytes == found.stack_bytes == 0, found
        assert found.vector_loads > 0, found
        assert found.atomics == 0, found


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_that_is_no_row(bad):
    _, frozen, trainable, _ = sample(20, 10, 5, (1,), 4)
    with pytest.raises(IndexError, match=rf"ids are from {min(bad, 3)} to {max(bad, 3)}; the vocabulary has rows 0 to 19"):
        frozen_embedding(torch.tensor([3, bad]), frozen, trainable)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, f, t: (i, f.half(), t), "frozen rows are .* torch.float16 on cpu, trainable ones .* torch.float64 on cpu"),
        (lambda i, f, t: (i, f.to("meta"), t), "both must have one width, dtype and device"),
        (lambda i, f, t: (i, f[:, :2], t), "both must have one width, dtype and device"),
        (lambda i, f, t: (i.double(), f, t), "ids are torch.float64 on cpu; they must be int32 or int64"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        frozen_embedding(*change(*sample(20, 10, 5, (3,), 5)[:3]))


def test_a_second_derivative_is_refused():
    ids, frozen, trainable, _ = sample(20, 10, 5, (3,), 6)
    (grad,) = torch.autograd.grad(frozen_embedding(ids, frozen, trainable).square().sum(), trainable, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()
