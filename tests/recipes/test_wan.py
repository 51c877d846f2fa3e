from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from recipes.lib.wan import PRESETS, KVCache, VideoDiT, WanConfig, attend_block_causal, rope_table, rotate, sinusoid

pytestmark = pytest.mark.timeout(60)
TINY = PRESETS["tiny"]
CPU = torch.device("cpu")


def model(causal: bool, config: WanConfig = TINY) -> VideoDiT:
    torch.manual_seed(1)
    made = VideoDiT(config, causal=causal)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)  # zero at first, and zeros would agree with anything
    return made


def video(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_BTCHW, timestep_BT, text_BLE."""
    torch.manual_seed(2)
    x = torch.randn(batch, TINY.frames, TINY.channels, TINY.height, TINY.width)
    return x, torch.rand(batch, TINY.frames) * 1000, torch.randn(batch, TINY.text_tokens, TINY.text_dim)


def test_block_causal_attention_is_the_masked_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 3, 8).unbind(0)
    block = torch.arange(12) // 4
    mask = block[:, None] >= block[None, :]
    full = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(attend_block_causal(q, k, v, 4), full.transpose(1, 2).flatten(2))


def test_a_rollout_with_cache_equals_the_causal_forward():
    x, t, text = video()
    student = model(causal=True)
    with torch.no_grad():
        cache, step = KVCache.empty(TINY.layers), TINY.frames_per_block
        starts = range(0, TINY.frames, step)
        cached = [student(x[:, i : i + step], t[:, i : i + step], text, cache=cache, remember=True) for i in starts]
        torch.testing.assert_close(torch.cat(cached, dim=1), student(x, t, text), atol=1e-5, rtol=1e-5)


def test_a_forward_that_does_not_remember_leaves_the_cache_alone():
    x, t, text = video()
    student, first = model(causal=True), slice(0, TINY.frames_per_block)
    with torch.no_grad():
        cache = KVCache.empty(TINY.layers)
        one = student(x[:, first], t[:, first], text, cache=cache)
        assert torch.equal(student(x[:, first], t[:, first], text, cache=cache), one)
    assert cache.frames == 0
    assert all(layer.keys is None for layer in cache.layers)


@pytest.mark.parametrize("causal", [True, False])
def test_only_the_bidirectional_model_sees_later_blocks(causal):
    x, t, text = video()
    network, t = model(causal), t if causal else t[:, 0]
    changed = x.clone()
    changed[:, TINY.frames_per_block :] += 1
    with torch.no_grad():
        before, after = network(x, t, text), network(changed, t, text)
    first = slice(0, TINY.frames_per_block)
    assert torch.equal(before[:, first], after[:, first]) == causal
    assert not torch.equal(before[:, TINY.frames_per_block :], after[:, TINY.frames_per_block :])


def test_output_depends_on_time_and_text():
    x, t, text = video()
    student = model(causal=True)
    with torch.no_grad():
        base = student(x, t, text)
        assert base.shape == x.shape
        later = t.clone()
        later[:, -1] += 100
        moved = student(x, later, text)
        assert not torch.equal(moved[:, -1], base[:, -1])
        assert torch.equal(moved[:, : TINY.frames_per_block], base[:, : TINY.frames_per_block])
        assert not torch.allclose(student(x, t, text.flip(0)), base, atol=1e-4)


@pytest.mark.parametrize(("causal", "shape"), [(True, (2,)), (False, (2, TINY.frames))])
def test_timesteps_of_the_other_kind_are_refused(causal, shape):
    x, _, text = video()
    with pytest.raises(ValueError, match="one a frame if causal, one a video if not"):
        model(causal)(x, torch.zeros(shape), text)


def test_recomputed_activations_give_the_same_gradients():
    x, t, text = video()
    grads = []
    for recompute in (False, True):
        student = model(causal=True, config=replace(TINY, recompute=recompute))
        student(x, t, text).square().mean().backward()
        grads.append([p.grad for p in student.parameters()])
    assert all(g is not None for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_rope_products_depend_on_the_distance_in_each_axis_only():
    torch.manual_seed(0)
    frames, rows, columns, size = 4, 3, 5, 24
    cos, sin = rope_table(frames, rows, columns, size, CPU)
    q, k = torch.randn(2, size)

    def product(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        here = [rotate(x.expand(1, frames, rows * columns, 1, size), cos, sin)[0, :, :, 0] for x in (q, k)]
        (qa, kb) = (x.unflatten(1, (rows, columns))[at] for x, at in zip(here, (a, b), strict=True))
        return (qa @ kb).item()

    assert product((0, 0, 0), (0, 0, 0)) == pytest.approx((q @ k).item(), rel=1e-5)
    assert product((1, 0, 2), (3, 1, 4)) == pytest.approx(product((0, 1, 0), (2, 2, 2)), rel=1e-4)
    for axis in range(3):
        moved = tuple(int(i == axis) for i in range(3))
        assert abs(product((0, 0, 0), moved) - product((0, 0, 0), (0, 0, 0))) > 1e-3


def test_rope_shares_the_pairs_as_wan_does():
    _, sin = rope_table(2, 2, 2, 128, CPU)
    turns = [(sin.unflatten(1, (2, 2))[at] != 0).sum().item() for at in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert turns == [22, 21, 21]


def test_sinusoid_is_cosines_then_sines():
    out = sinusoid(torch.tensor([0.0, 3.0]), 256)
    assert torch.equal(out[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert out[1, 0].item() == pytest.approx(torch.tensor(3.0).cos().item())
    assert out[1, 255].item() == pytest.approx(3 * 10_000 ** -(127 / 128), rel=1e-4)


def test_the_full_preset_is_wan_1_3b():
    with torch.device("meta"):
        full = VideoDiT(PRESETS["wan1.3b"], causal=True)
    assert PRESETS["wan1.3b"].frame_tokens == 1560
    assert sum(p.numel() for p in full.parameters()) == 1_418_996_800
    assert not list(full.buffers())


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"height": 7}, {"frames_per_block": 3}])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match=r"heads|patches|blocks"):
        replace(TINY, **wrong)
