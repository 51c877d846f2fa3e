"""Against float64 and torch.nn.functional.cross_entropy of whole logits, on fresh random input each time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine_kernels import frozen_linear_cross_entropy
from engine_kernels.frozen_linear_cross_entropy import naive, op, triton
from engine_kernels.frozen_linear_cross_entropy.chunks import Columns, Options
from tests.kernels.sm90 import Case, compile_all


def sample(tokens, rows, base, width, seed, dtype=torch.float64, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    target = torch.randint(0, rows, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    weight, bias = draw(rows, width), draw(rows)
    leaves = draw(tokens, width).requires_grad_(), weight[base:].clone().requires_grad_(), bias[base:].clone().requires_grad_()
    return leaves[0], weight[:base].clone(), leaves[1], target, (bias[:base].clone(), leaves[2])


def expected(x, frozen, trainable, target, bias, *, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """By whole logits."""
    logits = F.linear(x, torch.cat([frozen, trainable]), None if bias is None else torch.cat(bias))
    losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    losses = losses + torch.where(target == -100, 0.0, z_loss * logits.logsumexp(1).square())
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, int((target != -100).sum())) if reduction == "mean" else 1)


@pytest.mark.usefixtures("on")
@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(0, rows))),
    st.integers(0, 25),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 0.01]),
    st.booleans(),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([1, 3, 7, 100]),
)
def test_loss_and_gradients_are_those_of_whole_logits(rows_base, tokens, width, seed, reduction, smoothing, z_loss, has_bias, ignored, chunk):
    rows, base = rows_base
    x, frozen, trainable, target, bias = sample(tokens, rows, base, width, seed, ignored=ignored)
    given = bias if has_bias else None
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
    leaves = [x, trainable, *([bias[1]] if has_bias else [])]
    loss = frozen_linear_cross_entropy(x, frozen, trainable, target, given, chunk=chunk, **options)
    truth = expected(x, frozen, trainable, target, given, **options)
    torch.testing.assert_close(loss, truth, rtol=1e-7, atol=1e-7)  # smoothing is an fp32 number for a kernel
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for found, true in zip(torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smaller_dtypes_stay_close_to_float64_and_repeat_to_the_bit(dtype, fp32_logits, reduction, on):
    def run():
        x, frozen, trainable, target, bias = sample(64, 101, 37, 48, 3, dtype)
        loss = frozen_linear_cross_entropy(x, frozen, trainable, target, bias, chunk=17, reduction=reduction, fp32_logits=fp32_logits, z_loss=1e-3)
        return [loss, *torch.autograd.grad(loss.sum(), (x, trainable, bias[1]))]

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [t.dtype for t in first] == [torch.float32, dtype, dtype, dtype]
    x, frozen, trainable, target, bias = sample(64, 101, 37, 48, 3, dtype)
    x, frozen, trainable, bias = x.detach().double(), frozen.double(), trainable.detach().double(), tuple(b.detach().double() for b in bias)
    leaves = [t.requires_grad_() for t in (x, trainable, bias[1])]
    truth = expected(x, frozen, trainable, target, bias, z_loss=1e-3, reduction=reduction)
    scale = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-5}[dtype]
    for found, true in zip(first, [truth, *torch.autograd.grad(truth.sum(), leaves)], strict=True):
        assert (found.double() - true).norm() <= scale * true.norm()


def test_tensors_with_gaps_or_transposed(on):
    x, frozen, trainable, target, bias = sample(24, 23, 9, 6, 14)
    gaps = x.detach().repeat_interleave(2, 0)[::2].t().contiguous().t().view(2, 12, 6).requires_grad_()
    weights = frozen.t().contiguous().t(), trainable.detach().t().contiguous().t().requires_grad_()
    apart = bias[0].repeat_interleave(3)[::3], bias[1].detach().repeat_interleave(3)[::3].requires_grad_()
    loss = frozen_linear_cross_entropy(gaps, *weights, target.repeat_interleave(2)[::2].view(2, 12), apart, chunk=5)
    whole = frozen_linear_cross_entropy(x, frozen, trainable, target, bias, chunk=5)
    torch.testing.assert_close(loss, whole)
    found, true = torch.autograd.grad(loss, (gaps, weights[1], apart[1])), torch.autograd.grad(whole, (x, trainable, bias[1]))
    torch.testing.assert_close([g.reshape(t.shape) for g, t in zip(found, true, strict=True)], list(true))


def test_fp32_logits_are_more_exact_than_those_of_the_dtype():
    def error(fp32_logits):
        x, frozen, trainable, target, _ = sample(64, 501, 200, 256, 5, torch.bfloat16, ignored=0)
        found = frozen_linear_cross_entropy(x, frozen, trainable, target, reduction="none", fp32_logits=fp32_logits)
        return (found.double() - expected(x.double(), frozen.double(), trainable.double(), target, None, reduction="none")).norm()

    assert error(True) < 0.1 * error(False)


def test_nothing_reads_what_it_has_not_written(on, request):
    args = sample(20, 23, 9, 6, 4)
    clean = torch.autograd.grad(frozen_linear_cross_entropy(*args, chunk=7), (args[0], args[2], args[4][1]))
    request.getfixturevalue("poisoned_memory")
    found = torch.autograd.grad(frozen_linear_cross_entropy(*args, chunk=7), (args[0], args[2], args[4][1]))
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_torchs_own_checks_of_an_operator():
    x, frozen, trainable, target, bias = sample(7, 11, 4, 3, 6)

    def loss(reduction):
        return lambda x, t, b: frozen_linear_cross_entropy(
            x, frozen, t, target, (bias[0], b), reduction=reduction, label_smoothing=0.1, z_loss=0.01, chunk=3
        )

    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(loss(reduction), (x, trainable, bias[1]))
    args = x, frozen, trainable, target, torch.cat(bias), -100, 0.1, 0.01, 3, False, -1
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropy.default, (*args, True, True, True, True))
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropies.default, args)
    plain = [t.detach() for t in (torch.randn(7).double(), *args[:5])]
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropies_backward.default, (*plain, *args[5:], True, True, True))
    torch.library.opcheck(torch.ops.lockstep.scale_gradient.default, (x.detach(), torch.tensor(2.0)))


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_it_computes_as_a_linear_layer_does(compiled):
    x, frozen, trainable, target, bias = sample(12, 31, 13, 8, 7, torch.float32)
    weight = torch.cat([frozen, trainable.detach()])

    def loss(x, trainable, own):
        return frozen_linear_cross_entropy(x, frozen, trainable, target, (bias[0], own), fp32_logits=True)

    with torch.autocast("cpu", torch.bfloat16):
        found = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(x, trainable, bias[1])
        expected = F.cross_entropy(F.linear(x, weight, torch.cat(bias)).float(), target)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    exact = loss(x, trainable, bias[1])
    assert 0 < abs(found - exact) < 0.02 * exact, "it was not computed in bfloat16"
    grads = torch.autograd.grad(found, (x, trainable, bias[1]))
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_compiles_into_one_graph(reduction):
    x, frozen, trainable, target, bias = sample(12, 31, 13, 8, 7, torch.float32)

    def loss(x, trainable, own):
        return frozen_linear_cross_entropy(x, frozen, trainable, target, (bias[0], own), reduction=reduction).sum()

    plain = torch.autograd.grad(loss(x, trainable, bias[1]), (x, trainable, bias[1]))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, trainable, bias[1]), (x, trainable, bias[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_flops_are_those_of_the_three_products_without_the_frozen_rows_gradient():
    tokens, rows, base, width = 40, 24, 12, 16
    x, frozen, trainable, target, _ = sample(tokens, rows, base, width, 8)
    with FlopCounterMode(display=False) as ours:
        frozen_linear_cross_entropy(x, frozen, trainable, target).backward()
    with FlopCounterMode(display=False) as whole:
        weight = torch.cat([frozen, trainable.detach()]).requires_grad_()
        F.cross_entropy(F.linear(x, weight), target).backward()
    assert ours.get_total_flops() * 6 == whole.get_total_flops() * 5
    assert whole.get_total_flops() == 6 * tokens * rows * width
    with FlopCounterMode(display=False) as shapes:  # without storage
        frozen_linear_cross_entropy(
            *(t.detach().to("meta").requires_grad_(t.requires_grad) for t in (x, frozen, trainable)), target.to("meta")
        ).backward()
    assert shapes.get_total_flops() == ours.get_total_flops()
    with FlopCounterMode(display=False) as alone, torch.no_grad():
        frozen_linear_cross_entropy(x, frozen, trainable, target)
    assert alone.get_total_flops() == 2 * tokens * rows * width


def test_logits_are_never_whole(monkeypatch):
    widest = []
    real = op.naive.cross_entropy_
    monkeypatch.setattr(op.naive, "cross_entropy_", lambda z, *args: widest.append(z.shape[0]) or real(z, *args))
    monkeypatch.setattr(op, "CHUNK_BYTES", 5 * 101 * 8)
    args = sample(64, 101, 37, 8, 9, ignored=0)
    frozen_linear_cross_entropy(*args).backward()
    assert max(widest) == 5
    assert len(widest) == math.ceil(64 / 5)


def test_ignored_tokens_cost_nothing(monkeypatch):
    done = []
    real = op.naive.cross_entropy_
    monkeypatch.setattr(op.naive, "cross_entropy_", lambda z, *args: done.append(z.shape[0]) or real(z, *args))
    args = sample(64, 101, 37, 8, 9, ignored=0.5)
    args[0].data[args[3] == -100] = float("nan")
    frozen_linear_cross_entropy(*args).backward()
    assert sum(done) == int((args[3] != -100).sum()) < 64
    assert args[2].grad.isfinite().all()
    assert not args[0].grad[args[3] == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spare", [0, 3])
def test_a_known_number_of_valid_tokens_saves_counting_them(as_triton, monkeypatch, reduction, spare):
    args = sample(40, 101, 37, 8, 9, ignored=0.5)
    args[3][0] = -100  # what spare places point at
    args[0].data[args[3] == -100] = float("nan")
    valid, leaves = int((args[3] != -100).sum()), (args[0], args[2], args[4][1])
    plain = frozen_linear_cross_entropy(*args, reduction=reduction)
    expected = torch.autograd.grad(plain.sum(), leaves)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # which would wait
    loss = frozen_linear_cross_entropy(*args, reduction=reduction, valid=valid + spare)
    found = torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, expected)
    assert frozen_linear_cross_entropy(*args, reduction=reduction, valid=valid - 1).isnan().any()


def test_padding_between_frozen_and_trainable_rows_is_seen_by_nothing(as_triton, monkeypatch):
    """What is in the padding of a buffer of logits, before and after: a kernel reads it, and must choose."""
    columns, options = Columns(5, 7, 64), Options(-100, 0.1, 0.01, 4, False, -1)
    assert (columns.first, columns.width, columns.classes) == (64, 128, 12)
    z = torch.full((3, 128), float("nan"))
    logits = torch.randn(3, 12)
    columns.frozen(z)[:], columns.trainable(z)[:] = logits[:, :5], logits[:, 5:]
    target, grad = torch.tensor([4, 5, 11]), torch.rand(3)
    plain = logits.clone()
    expected = naive.cross_entropy_(plain, Columns(5, 7), target, None, grad, options)
    found = triton.cross_entropy_(z, columns, target, None, grad, options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat([columns.frozen(z), columns.trainable(z)], 1), plain)
    assert z.isfinite().all()


def test_a_row_too_long_for_registers_is_read_twice(as_triton, monkeypatch):
    args, options = sample(9, 301, 117, 16, 13), {"label_smoothing": 0.1, "z_loss": 0.01}
    leaves = (args[0], args[2], args[4][1])
    whole = frozen_linear_cross_entropy(*args, **options)
    expected = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr(triton, "_WHOLE", 16)
    monkeypatch.setattr(triton, "_BLOCK", 64)
    loss = frozen_linear_cross_entropy(*args, **options)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


def test_on_a_gpu_a_target_that_is_no_class_gives_nan_and_is_an_error_where_asked_for(as_triton, monkeypatch):
    x, frozen, trainable, target, bias = sample(6, 9, 4, 3, 11, ignored=0)
    target[2] = 9
    losses = frozen_linear_cross_entropy(x, frozen, trainable, target, bias, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[2]]
    monkeypatch.setenv("LOCKSTEP_DEBUG", "1")
    with pytest.raises(IndexError, match="there are classes 0 to 8"):
        frozen_linear_cross_entropy(x, frozen, trainable, target, bias)


def test_what_an_h100_gets():
    module = "engine_kernels.frozen_linear_cross_entropy.triton"
    types = {"z": "*bf16", "targets": "*i64", "bias": "*bf16", "grads": "*fp32", "losses": "*fp32", "smoothing": "fp32", "z_loss": "fp32"}
    types |= dict.fromkeys(["stride", "base", "first", "rows", "width", "ignore_index"], "i32")
    flags = {"HAS_BIAS": True, "HAS_GRAD": True, "WIDE": "tl.float32"}
    aligned = ["stride", "first", "width"]
    whole, long = {**flags, "IS_WHOLE": True}, {**flags, "IS_WHOLE": False, "BLOCK": triton._BLOCK}
    cases = [
        Case(module, "_cross_entropy", types, {**whole, "BLOCK": triton._WHOLE}, 32, aligned),
        Case(module, "_cross_entropy", types, {**whole, "BLOCK": 2048}, 4, aligned),
        Case(module, "_cross_entropy", types, long, 16, aligned),
        Case(module, "_cross_entropy", types | {"z": "*fp32"}, long, 16, aligned),
    ]
    for found in compile_all(cases):
        assert found.spilled_bytes == found.stack_bytes == 0, found
        assert found.vector_loads > 0, found
        assert found.vector_stores > 0, found
        assert found.register_wgmma == found.atomics == 0, found


def test_where_all_tokens_are_ignored_loss_and_gradients_are_zero(on):
    x, frozen, trainable, target, bias = sample(6, 9, 4, 3, 10, ignored=1.1)
    loss = frozen_linear_cross_entropy(x, frozen, trainable, target, bias)
    loss.backward()
    assert loss == 0
    assert not any(t.grad.any() for t in (x, trainable, bias[1]))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a: [a[0], a[1].half(), *a[2:]], ValueError, "frozen is torch.float16 on cpu: all must be alike"),
        (lambda a: [a[0], a[1], a[2].to("meta"), *a[3:]], ValueError, "trainable is torch.float64 on meta"),
        (lambda a: [a[0][:, :2], *a[1:]], ValueError, "x has width 2; frozen"),
        (lambda a: [*a[:3], a[3][:4], a[4]], ValueError, r"target is \(4,\) torch.int64 on cpu; it must be \(6,\) int64"),
        (lambda a: [*a[:3], a[3].int(), a[4]], ValueError, "torch.int32"),
        (lambda a: [*a[:4], (a[4][1], a[4][0])], ValueError, r"biases are \(5,\) and \(4,\)"),
        (lambda a: [*a[:3], a[3].clamp(min=0) + 9, a[4]], IndexError, "there are classes 0 to 8, and ignore_index"),
        (lambda a: [*a[:3], a[3].clamp(min=0) - 12, a[4]], IndexError, "targets are from -12"),
    ],
)
def test_what_does_not_fit(change, kind, message):
    with pytest.raises(kind, match=message):
        frozen_linear_cross_entropy(*change(list(sample(6, 9, 4, 3, 11))))


def test_another_reduction():
    with pytest.raises(ValueError, match="reduction is 'median'; it is 'mean', 'sum' or 'none'"):
        frozen_linear_cross_entropy(*sample(6, 9, 4, 3, 11), reduction="median")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    args = sample(6, 9, 4, 3, 12)
    loss = frozen_linear_cross_entropy(*args, reduction=reduction).square().sum()
    (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()
