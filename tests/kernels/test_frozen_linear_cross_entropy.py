"""Against float64 and torch.nn.functional.cross_entropy of whole logits, on fresh random input each time."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine_kernels import frozen_linear_cross_entropy
from engine_kernels.frozen_linear_cross_entropy import op


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


@settings(max_examples=200, deadline=None)
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
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for found, true in zip(torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smaller_dtypes_stay_close_to_float64_and_repeat_to_the_bit(dtype, fp32_logits, reduction):
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


def test_fp32_logits_are_more_exact_than_those_of_the_dtype():
    def error(fp32_logits):
        x, frozen, trainable, target, _ = sample(64, 501, 200, 256, 5, torch.bfloat16, ignored=0)
        found = frozen_linear_cross_entropy(x, frozen, trainable, target, reduction="none", fp32_logits=fp32_logits)
        return (found.double() - expected(x.double(), frozen.double(), trainable.double(), target, None, reduction="none")).norm()

    assert error(True) < 0.1 * error(False)


def test_nothing_reads_what_it_has_not_written(monkeypatch):
    def poisoned(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return make

    args = sample(20, 23, 9, 6, 4)
    clean = torch.autograd.grad(frozen_linear_cross_entropy(*args, chunk=7), (args[0], args[2], args[4][1]))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
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
    args = x, frozen, trainable, target, torch.cat(bias), -100, 0.1, 0.01, 3, False
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropy.default, (*args, True, True, True, True))
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropies.default, args)
    plain = [t.detach() for t in (torch.randn(7).double(), *args[:5])]
    torch.library.opcheck(torch.ops.lockstep.frozen_linear_cross_entropies_backward.default, (*plain, *args[5:], True, True, True))
    torch.library.opcheck(torch.ops.lockstep.scale_gradient.default, (x.detach(), torch.tensor(2.0)))


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


def test_where_all_tokens_are_ignored_loss_and_gradients_are_zero():
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
