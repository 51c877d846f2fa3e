"""FQNs are the same whatever wraps the module."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from engine.errors import LayoutError
from engine.state.names import Names, normalise, unwrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


PARAMETERS = ["embed.weight", "block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"]
BUFFERS = ["scale", "block.1.running_mean", "block.1.running_var", "block.1.num_batches_tracked"]


def test_tied_parameters_have_one_name_and_an_alias():
    net = Net()
    names = Names(net)
    assert list(names.parameters) == PARAMETERS
    assert names.aliases == {"head.weight": "embed.weight"}
    assert names.of(net.head.weight) == "embed.weight"


def test_persistent_buffers_only():
    names = Names(Net())
    assert sorted(names.buffers) == sorted(BUFFERS)
    assert all(names.buffers[name] == name for name in BUFFERS)


def test_a_buffer_under_two_names_is_one():
    net = Net()
    net.register_buffer("same", net.scale)
    assert "same" not in Names(net).buffers
    assert "scale" in Names(net).buffers


def test_compile_and_activation_checkpointing_leave_no_trace():
    net = Net()
    net.block[0] = checkpoint_wrapper(net.block[0])
    net.block[1] = torch.compile(net.block[1])
    for module in (net, unwrap(torch.compile(net))):
        names = Names(module)
        assert list(names.parameters) == PARAMETERS
        assert sorted(names.buffers) == sorted(BUFFERS)
        assert module.get_buffer(names.buffers["block.1.running_mean"]) is net.block[1].running_mean


def test_unwrap_reaches_the_users_module_through_several_wrappers():
    net = Net()
    assert unwrap(net) is net
    assert unwrap(torch.compile(nn.DataParallel(torch.compile(net)))) is net


def test_a_module_named_module_is_not_mistaken_for_a_wrapper():
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    assert unwrap(outer) is outer
    assert list(Names(outer).parameters) == ["module.weight", "module.bias"]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("_orig_mod.a._checkpoint_wrapped_module.weight", "a.weight"),
        ("a._fsdp_wrapped_module.b.bias", "a.b.bias"),
        ("q_proj.base_layer.weight", "q_proj.weight"),
        ("a.my_orig_mod.weight", "a.my_orig_mod.weight"),
    ],
)
def test_only_whole_wrapper_components_go(raw, name):
    assert normalise(raw) == name


def test_peft_prefix_goes_only_for_peft_models():
    assert normalise("base_model.model.a.weight", peft=True) == "a.weight"
    assert normalise("base_model.model.a.weight") == "base_model.model.a.weight"


def test_two_parameters_that_would_share_a_name_are_refused():
    outer = nn.Module()
    outer.a = nn.Module()
    outer.a.weight = nn.Parameter(torch.zeros(1))
    outer.a.base_layer = nn.Module()
    outer.a.base_layer.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(LayoutError, match=r"both called a\.weight"):
        Names(outer)


def test_a_parameter_of_another_module_has_no_name():
    with pytest.raises(LayoutError, match=r"of shape \(7,\).*not in the module"):
        Names(Net()).of(nn.Parameter(torch.zeros(7)))


class Rows(nn.Module):
    row_parts: ClassVar = {"weight": ("frozen", "trainable")}

    def __init__(self, base: int = 3, rows: int = 5, width: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(base, width), requires_grad=False)
        self.trainable = nn.Parameter(torch.zeros(rows - base, width))


def test_declared_rows_are_boxes_of_one_weight():
    names = Names(nn.ModuleDict({"embed": Rows(), "other": nn.Linear(2, 2)}))
    assert set(names.parameters) == {"embed.frozen", "embed.trainable", "other.weight", "other.bias"}
    assert names.places.keys() == {"embed.frozen", "embed.trainable"}
    first, second = names.places["embed.frozen"], names.places["embed.trainable"]
    assert (first.name, first.whole, first.offsets, first.sizes) == ("embed.weight", (5, 2), (0, 0), (3, 2))
    assert (second.name, second.whole, second.offsets, second.sizes) == ("embed.weight", (5, 2), (3, 0), (2, 2))


def test_rows_tied_to_another_modules_are_an_alias_of_the_whole():
    tied = nn.ModuleDict({"embed": Rows(), "head": Rows()})
    tied["head"].frozen, tied["head"].trainable = tied["embed"].frozen, tied["embed"].trainable
    names = Names(tied)
    assert names.aliases == {"head.weight": "embed.weight"}
    assert {place.name for place in names.places.values()} == {"embed.weight"}


def test_rows_under_wrappers_keep_their_names():
    wrapped = checkpoint_wrapper(Rows())
    assert {place.name for place in Names(nn.Sequential(wrapped)).places.values()} == {"0.weight"}


def test_declarations_that_do_not_hold_are_refused():
    missing = Rows()
    missing.row_parts = {"weight": ("frozen", "thawed")}  # type: ignore[misc]
    with pytest.raises(LayoutError, match="declares thawed as rows of weight"):
        Names(missing)
    uneven = Rows()
    uneven.trainable = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(LayoutError, match="cannot be rows of one tensor"):
        Names(uneven)
    taken = Rows()
    taken.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(LayoutError, match="weight is declared to consist of other parameters"):
        Names(taken)
    half = nn.ModuleDict({"embed": Rows(), "head": Rows()})
    half["head"].trainable = half["embed"].frozen
    with pytest.raises(LayoutError, match=r"head\.trainable is tied to embed\.frozen"):
        Names(half)
