import pytest
import torch

from recipes.lib.lora import LoRALinear, add_lora, freeze_all_but_lora, merged_state_dict
from recipes.lib.wan import PRESETS, VideoDiT

pytestmark = pytest.mark.timeout(30)
TINY = PRESETS["tiny"]


@pytest.fixture
def network() -> VideoDiT:
    torch.manual_seed(0)
    made = VideoDiT(TINY, causal=False)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, TINY.frames, TINY.channels, TINY.height, TINY.width)
    return x, torch.tensor([100.0, 900.0]), torch.randn(2, TINY.text_tokens, TINY.text_dim)


def train_adapters(network: VideoDiT) -> None:
    for module in network.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)


def test_adapters_start_as_the_identity_and_keep_the_names(network):
    with torch.no_grad():
        before, names = network(*inputs()), set(network.state_dict())
        add_lora(network, 4)
        assert torch.equal(network(*inputs()), before)
        assert names < set(network.state_dict())
        train_adapters(network)
        assert not torch.allclose(network(*inputs()), before, atol=1e-3)


def test_only_the_targets_get_adapters(network):
    add_lora(network, 4)
    adapted = {n for n, m in network.named_modules() if isinstance(m, LoRALinear)}
    attention = {f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"}
    assert adapted == {f"blocks.{i}.{n}" for i in range(TINY.layers) for n in attention | {"ffn.0", "ffn.2"}}
    assert all(m.scale == 1 for m in network.modules() if isinstance(m, LoRALinear))


def test_rank_zero_adds_none(network):
    names = set(network.state_dict())
    add_lora(network, 0)
    assert set(network.state_dict()) == names


def test_freezing_leaves_exactly_the_adapters(network):
    add_lora(network, 4)
    freeze_all_but_lora(network)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in network.named_parameters() if ".lora_" in n}
    assert len(trained) == 2 * 10 * TINY.layers


def test_merging_keeps_the_function(network):
    add_lora(network, 4)
    train_adapters(network)
    plain = VideoDiT(TINY, causal=False)
    plain.load_state_dict(merged_state_dict(network))
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs()), network(*inputs()), atol=1e-5, rtol=1e-5)
