"""Modules with frozen first rows, and conversion of models that exist."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine_kernels import PartiallyFrozenEmbedding, PartiallyFrozenLinear, convert

ROWS, BASE, WIDTH = 23, 11, 6


class Model(nn.Module):
    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.head = nn.Embedding(ROWS, WIDTH, padding_idx=20), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.inner(self.embed(ids[:, :-1])))).flatten(0, 1), ids[:, 1:].flatten())


def batch(number: int) -> torch.Tensor:
    return torch.randint(0, ROWS, (8, 7), generator=torch.Generator().manual_seed(number))


def train(model: nn.Module, steps: int, **options) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **options)
    for number in range(steps):
        model(batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_new_rows_train_as_the_whole_models_would_and_frozen_ones_do_not_move(tied, bias):
    """Without weight decay and momentum of the frozen rows the whole model can be held still by putting its rows back."""
    whole, model = Model(tied, bias), convert(Model(tied, bias), {"embed": BASE, "head": BASE})
    first = {name: t.clone() for name, t in whole.state_dict().items()}
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.05, weight_decay=0.0)
    for number in range(5):
        whole(batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if not name.startswith("inner"):
                    parameter[:BASE] = first[name][:BASE]
    train(model, 5, weight_decay=0.0)
    found = model.state_dict()
    assert found.keys() == first.keys()
    for name, true in whole.state_dict().items():
        torch.testing.assert_close(found[name], true, rtol=1e-4, atol=1e-6)
        if not name.startswith("inner"):
            assert torch.equal(found[name][:BASE], first[name][:BASE])


def test_state_dicts_are_those_of_the_whole_model_in_both_directions():
    whole = Model()
    model = convert(copy.deepcopy(whole), {"embed": BASE, "head": BASE})
    assert list(model.state_dict()) == list(whole.state_dict())
    train(model, 2)
    other = Model()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(batch(9)), model(batch(9)))
    for assign in (False, True):
        again = convert(Model(), {"embed": 5, "head": 7})
        with torch.no_grad():
            again.inner.weight.zero_()
        again.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(again.embed.weight, other.embed.weight)
        assert torch.equal(again.head.trainable_bias, other.head.bias[7:])
        assert not again.embed.frozen.requires_grad
        assert again.embed.trainable.requires_grad


def test_a_state_dict_that_does_not_fit():
    state = Model().state_dict()
    model = convert(Model(), {"embed": BASE, "head": BASE})
    with pytest.raises(RuntimeError, match=r"size mismatch for embed.weight: copying a param with shape \(5, 6\), the shape here is \(23, 6\)"):
        model.load_state_dict({**state, "embed.weight": torch.zeros(5, 6)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"head.bias"'):
        model.load_state_dict({name: t for name, t in state.items() if name != "head.bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"head.frozen"'):
        model.load_state_dict({**state, "head.frozen": torch.zeros(3)})


def test_frozen_rows_are_not_rounded_by_a_state_dict():
    state = Model().state_dict()
    model = convert(Model(), {"embed": BASE, "head": BASE}).to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"embed.weight is torch.float32 in the state dict and its frozen rows are torch.bfloat16 here"):
        model.load_state_dict(state)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in state.items()})
    assert torch.equal(model.embed.weight, state["embed.weight"].bfloat16())


@pytest.mark.parametrize("base", [0, BASE, ROWS])
def test_any_base(base):
    whole, model = Model(), convert(Model(), {"embed": base, "head": base})
    assert torch.equal(model(batch(0)), whole(batch(0)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in whole.parameters()) - base * (2 * WIDTH + 1)
    model(batch(0)).backward()


def test_the_loss_of_a_head_is_that_of_its_logits():
    head = PartiallyFrozenLinear(torch.randn(ROWS, WIDTH), BASE, torch.randn(ROWS))
    x, target = torch.randn(2, 9, WIDTH), torch.randint(0, ROWS, (2, 9))
    torch.testing.assert_close(head(x, target), F.cross_entropy(head(x).flatten(0, 1), target.flatten()))
    torch.testing.assert_close(
        head(x, target, reduction="none"), F.cross_entropy(head(x).flatten(0, 1), target.flatten(), reduction="none").view(2, 9)
    )


def test_tied_modules_stay_tied_and_either_may_be_named():
    model = convert(Model(tied=True), {"head": BASE})
    assert isinstance(model.embed, PartiallyFrozenEmbedding)
    assert model.embed.trainable is model.head.trainable
    assert model.embed.frozen is model.head.frozen
    assert model.embed.padding_idx == 20


def test_a_name_may_be_the_end_of_one_path():
    model = nn.ModuleDict({"a": nn.ModuleDict({"text_embedding": nn.Embedding(5, 2)}), "b": nn.Linear(2, 2)})
    convert(model, {"text_embedding": 3})
    assert model["a"]["text_embedding"].base == 3


def test_a_module_used_at_two_places_is_replaced_at_both():
    embedding = nn.Embedding(5, 2)
    model = convert(nn.ModuleDict({"a": embedding, "b": nn.ModuleDict({"c": embedding})}), {"a": 2})
    assert model["a"] is model["b"]["c"]


def stale() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).backward()
    optimizer.step()
    convert(model, {"embed": BASE})
    optimizer.step()


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda: convert(Model(), {"embed": 24}), ValueError, "embed: base is 24; it has 23 rows, so base must be 0 to 23"),
        (lambda: convert(Model(), {"embed": -1}), ValueError, "base is -1"),
        (lambda: convert(Model(), {"emb": 3}), ValueError, "'emb' is not the name of a module: no module has it"),
        (lambda: convert(nn.Sequential(Model(), Model()), {"embed": 3}), ValueError, "2 modules end in it: 0.embed, 1.embed"),
        (lambda: convert(convert(Model(), {"embed": 3}), {"embed": 3}), ValueError, "embed is already partly frozen, with base 3"),
        (lambda: convert(nn.Sequential(nn.LayerNorm(3)), {"0": 1}), ValueError, "0 is a LayerNorm; only nn.Embedding and nn.Linear"),
        (lambda: convert(Model(tied=True), {"embed": 3, "head": 4}), ValueError, "share a weight, but are to have"),
        (lambda: convert(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), {"0": 1}), ValueError, "has max_norm=1.0"),
        (lambda: PartiallyFrozenEmbedding(torch.zeros(3, 2), 4), ValueError, "base is 4; the weight has 3 rows"),
        (stale, RuntimeError, "the optimizer was built before convert.*: it holds embed.weight"),
    ],
)
def test_what_cannot_be_converted(act, kind, message):
    with pytest.raises(kind, match=message):
        act()


def test_hooks_are_not_lost_in_silence():
    model = Model()
    model.embed.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="embed has hooks, which would be lost"):
        convert(model, {"embed": 3})


def test_a_failed_conversion_changes_nothing():
    model = Model()
    with pytest.raises(ValueError, match="head: base is 99"):
        convert(model, {"embed": 3, "head": 99})
    assert type(model.embed) is nn.Embedding


def test_dtypes_and_copies():
    model = convert(Model(), {"embed": BASE, "head": BASE}).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    twin = copy.deepcopy(model)
    assert twin.embed.trainable is not model.embed.trainable
    assert torch.equal(twin(batch(0)), model(batch(0)))
