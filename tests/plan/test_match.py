"""Every difference between checkpoint and run is listed, with what would allow it."""

import pytest

from engine.errors import IncompatibleCheckpoint
from engine.format.layout import LogicalTensor
from engine.plan.match import Allow, match, match_names


def _tensors(**specs) -> list[LogicalTensor]:
    return [LogicalTensor(name.replace("_", "."), dtype, shape, ()) for name, (dtype, shape) in specs.items()]


def _match(live, stored, names=None, allow=None, also_used=()):
    return match(live, {tensor.name: tensor for tensor in stored}, names or {}, allow or Allow(), also_used)


LIVE = _tensors(a_weight=("F32", (2, 3)), b_weight=("F32", (4,)))


def test_equal_sides_are_paired():
    found = _match(LIVE, LIVE)
    assert found.pairs == {"a.weight": LIVE[0], "b.weight": LIVE[1]}
    assert (found.missing, found.unexpected, found.cast) == ([], [], [])


def test_all_differences_are_told_at_once_with_their_remedies():
    stored = _tensors(a_weight=("F32", (2, 4)), c_weight=("F32", (1,)), d_weight=("BF16", (4,)))
    live = [*LIVE, *_tensors(d_weight=("F32", (4,)))]
    with pytest.raises(IncompatibleCheckpoint) as error:
        _match(live, stored)
    for told in (
        "a.weight: [2, 3] here, [2, 4] in the checkpoint", "b.weight", "c.weight", "d.weight: F32 here, BF16 in the checkpoint",
        "allow_missing=", "allow_unexpected=", "allow_cast=", "build the model that was saved",
    ):  # fmt: skip
        assert told in str(error.value)


def test_what_is_allowed_is_reported_not_refused():
    stored = _tensors(c_weight=("F32", (1,)), a_weight=("BF16", (2, 3)))
    found = _match(LIVE, stored, allow=Allow(missing=["b.*"], unexpected=["c.weight"], cast=["a.*"]))
    assert (found.missing, found.unexpected, found.cast) == (["b.weight"], ["c.weight"], ["a.weight: BF16 to F32"])
    assert set(found.pairs) == {"a.weight"}


@pytest.mark.parametrize("allow", [Allow(missing=["*"], unexpected=["*"]), Allow(missing=["*"], cast=["*"]), Allow(unexpected=["*"], cast=["*"])])
def test_one_permission_does_not_give_another(allow):
    stored = _tensors(c_weight=("F32", (1,)), a_weight=("BF16", (2, 3)))
    with pytest.raises(IncompatibleCheckpoint):
        _match(LIVE, stored, allow=allow)


def test_a_shape_that_differs_cannot_be_allowed():
    with pytest.raises(IncompatibleCheckpoint, match="of another shape"):
        _match(LIVE, _tensors(a_weight=("F32", (3, 2)), b_weight=("F32", (4,))), allow=Allow(["*"], ["*"], ["*"]))


def test_another_stored_name_is_followed():
    stored = _tensors(tied_weight=("F32", (2, 3)), b_weight=("F32", (4,)))
    assert _match(LIVE, stored, {"a.weight": "tied.weight"}).pairs["a.weight"].name == "tied.weight"


def test_names_used_elsewhere_are_not_unexpected():
    stored = [*LIVE, *_tensors(step=("F32", ()))]
    assert _match(LIVE, stored, also_used=["step"]).unexpected == []
    with pytest.raises(IncompatibleCheckpoint, match="step"):
        _match(LIVE, stored)


def test_patterns_heed_case():
    with pytest.raises(IncompatibleCheckpoint):
        _match(LIVE, LIVE[:1], allow=Allow(missing=["B.*"]))


def test_long_lists_are_shortened_with_their_count():
    live = [LogicalTensor(f"layer.{i}", "F32", (1,), ()) for i in range(30)]
    with pytest.raises(IncompatibleCheckpoint, match=r"30 tensors in the model here but not in the checkpoint") as error:
        _match(live, [])
    assert "… and 22 more" in str(error.value)
    assert "layer.8" not in str(error.value)


def test_members_with_plain_state_are_matched_by_name():
    match_names(["data"], ["data"], Allow())
    with pytest.raises(IncompatibleCheckpoint, match=r"\['data'\] only in this run \(allow_missing\), \['ema'\] only in the checkpoint"):
        match_names(["data"], ["ema"], Allow())
    match_names(["data"], ["ema"], Allow(missing=["data"], unexpected=["ema"]))
