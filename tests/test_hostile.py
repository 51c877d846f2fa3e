"""Checkpoints that are made to harm, under right checksums: each kind is refused or read at a cost
in proportion to its bytes."""

import resource
import shutil
import time
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from benchmarks import hostile
from engine import Progress
from engine.cli import main
from engine.errors import CheckpointCorrupt, EngineError, IncompatibleCheckpoint, UsageError
from engine.export import FREE_BYTES, export_model
from engine.format.checksum import digest
from engine.format.containers import MAX_CONTAINERS
from engine.format.manifest import _ENVELOPE, _seal, frozen_index_name
from engine.format.record import EncodedList, decode_record, encode_record
from engine.state.places import FREE_LOOKS
from engine.state.schema import MAX_GROUP_VALUES
from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests import tiny
from tests.now import Checkpointer

ABSENT = [["absent", 0.0], [], [], ""]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture
def step(sound, tmp_path) -> Path:
    shutil.copytree(sound.parent, tmp_path / "run")
    return tmp_path / "run" / sound.name


def forge(step: Path, change) -> None:
    """Change a step's manifest, its tensors and indexes being lists."""

    def rewrite(manifest):
        manifest.update(tensors=list(manifest["tensors"]), indexes=list(manifest["indexes"]))
        change(manifest)

    tiny.forge(step, manifest=rewrite)


def record(step: Path, change) -> None:
    """Change a step's record."""

    def rewrite(manifest):
        value = decode_record(manifest["record"])
        change(value)
        manifest["record"] = encode_record(value)

    forge(step, rewrite)


def refused(step: Path, kind: type[EngineError], told: str) -> None:
    """A resume ends so."""
    with pytest.raises(kind, match=told):
        Checkpointer(step.parent, tiny.make(1)).resume("step:1")


def seconds(act) -> float:
    """Of this process."""
    began = time.process_time()
    act()
    return time.process_time() - began


def test_a_few_hundred_forged_checkpoints_harm_no_reader():
    _, figures = hostile.measure(quick=True)
    assert figures["inputs"] > hostile.QUICK_INPUTS // 2
    assert figures["accepted"] > figures["inputs"], "some readers take what others refuse"
    harm = ("tracebacks", "control_characters", "over_time", "over_memory")
    assert {name: figures[name] for name in harm} == dict.fromkeys(harm, 0)


# ---------------------------------------------------------------- what costs more than it weighs


def test_an_index_is_named_once_and_for_its_digest(step):
    head = msgspec.msgpack.encode({"rank": 0, "files": [], "pages": [], "record": [0, 0, 0, 1, digest(b"\xc0")]})
    data = _seal("index", head, b"\xc0")
    name = frozen_index_name(digest(data[: _ENVELOPE.size + len(head)]))
    (step / name).write_bytes(data)
    entry = [len(data), digest(data[: _ENVELOPE.size + len(head)]), name]
    forge(step, lambda m: m["indexes"].append(entry))
    assert main(["show", str(step)]) == 0
    forge(step, lambda m: m["indexes"].append(entry))
    refused(step, CheckpointCorrupt, "an index is named twice")
    forge(
        step,
        lambda m: m["indexes"].__setitem__(-1, [*entry[:2], name.replace(name[7], "0" if name[7] != "0" else "1", 1)]),
    )
    refused(step, CheckpointCorrupt, r"others are frozen\.<its digest>\.index")


def test_containers_of_a_record_are_counted_before_they_are_made():
    many = MAX_CONTAINERS * 8
    bomb = b"\xdd" + many.to_bytes(4) + b"\x80" * many
    tracemalloc.start()
    with pytest.raises(CheckpointCorrupt, match=f"more than {MAX_CONTAINERS} containers"):
        decode_record(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * many


@pytest.mark.parametrize(
    "inner",
    [b"\x80", b"\xd4\x01\x90", b"\xc7\x03\x06\x92\xa0\x80", b"\xdc\x00\x00", b"\xd5\x02\x00\x01"],
)
def test_no_container_hides(inner):
    each = {b"\xd4\x01\x90": 2, b"\xc7\x03\x06\x92\xa0\x80": 3}.get(inner, 1)
    for count, is_fine in ((MAX_CONTAINERS // each - 1, True), (MAX_CONTAINERS // each + 1, False)):
        data = b"\xdd" + count.to_bytes(4) + inner * count
        if is_fine:
            assert len(decode_record(data)) == count
        else:
            with pytest.raises(CheckpointCorrupt, match="containers"):
                decode_record(data)


def test_bytes_and_text_are_not_taken_for_containers():
    value = [
        b"\x80" * (2 * MAX_CONTAINERS),
        "é" * MAX_CONTAINERS,
        [1, -5, 0.5, None, "x" * 40, "y"] * 1000,
        (1, 2),
        10**30,
        1j,
    ]
    assert decode_record(encode_record(value)) == value


def test_a_record_that_no_reader_would_take_is_not_saved():
    items = bytearray(b"\x80" * (MAX_CONTAINERS + 1))
    with pytest.raises(UsageError, match="Keep large collections as tensors or NumPy arrays"):
        encode_record({"history": EncodedList(len(items), items, len(items))})


def test_fifty_thousand_parameters_in_groups_of_their_own_are_no_bomb():
    values = {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
        "maximize": False,
        "initial_lr": 0.1,
    }
    groups = [{"params": [f"model.layers.{i}.self_attn.q_proj.weight"], "values": values} for i in range(50_000)]
    assert decode_record(encode_record({"models": {"": {"groups": groups}}}))["models"][""]["groups"] == groups


def _indexes(step: Path, count: int, tensors: int) -> None:
    """A step of ``count`` ranks that wrote nothing, and tensors that each are cut over all of them."""

    def change(manifest):
        manifest["summary"]["world_size"], manifest["indexes"] = count, []
        for rank in range(count):
            head = msgspec.msgpack.encode({"rank": rank, "files": [], "pages": [], "record": [0, 0, 0, 1, digest(b"\xc0")]})
            data = _seal("index", head, b"\xc0")
            (step / f"rank_{rank:05d}.index").write_bytes(data)
            manifest["indexes"].append([len(data), digest(data[: _ENVELOPE.size + len(head)]), ""])
        rule = ["grid", [[count], 0, [], []], [0], 0]
        manifest["tensors"] = [[f"model.{i}", "F32", [count + i, 2], [[rule, [], [], ""]]] for i in range(tensors)]

    forge(step, change)


def test_verify_and_diff_do_not_take_each_rank_by_each_tensor(step, sound):
    """By ranks and tensors alone it would be a million; nothing promises as many boxes as there are
    bytes."""
    _indexes(step, 1000, 1000)
    assert seconds(lambda: verify(LocalStorage(step.parent), step.name)) < 4
    told = "\n".join(map(str, verify(LocalStorage(step.parent), step.name)))
    assert "its layouts promise more boxes than the indexes have room for" in told
    assert seconds(lambda: main(["diff", str(step), str(step)])) < 4


def test_parts_are_looked_up_by_their_rows(step, tmp_path):
    """20,000 rows against 20,000 others; columns, which nobody lays out, are given up."""
    count = 20_000

    def of(rows: bool, shift: float):
        parts = [
            [
                ["absent", float(i % 7 + shift)],
                [i, 0] if rows else [0, i],
                [1, count] if rows else [count, 1],
                "",
            ]
            for i in range(count)
        ]
        return lambda manifest: manifest["tensors"].append(["model.t", "F32", [count, count], parts])

    other = Path(shutil.copytree(step, tmp_path / "other" / "step_00000001"))
    forge(step, of(True, 0.0))
    forge(other, of(True, 1.0))
    began = time.process_time()
    assert main(["diff", str(step), str(other)]) == 1
    assert time.process_time() - began < 4
    forge(other, lambda m: (m["tensors"].pop(), of(False, 1.0)(m)))
    assert count * count > 100 * FREE_LOOKS
    assert seconds(lambda: main(["diff", str(step), str(other)])) < 8
    assert main(["diff", str(step), str(other)]) == CheckpointCorrupt.exit_code


def test_values_of_param_groups_are_not_compared_for_each_parameter(step, tmp_path):
    def grow(value):
        value["models"][""]["groups"] = [
            {
                "params": [str(i) for i in range(100_000)],
                "values": {str(i): i for i in range(100_000)},
            }
        ]

    other = Path(shutil.copytree(step, tmp_path / "other" / "step_00000001"))
    record(step, grow)
    assert seconds(lambda: main(["diff", str(step), str(other)])) < 4
    record(
        other,
        lambda value: (grow(value), value["models"][""]["groups"][0]["values"].update({"lr": 2})),
    )
    assert seconds(lambda: main(["diff", str(step), str(other)])) < 4
    refused(step, CheckpointCorrupt, f"of length <= {MAX_GROUP_VALUES}")


def test_a_long_key_is_not_repeated_in_every_path_below_it(step, tmp_path, capsys):
    other = Path(shutil.copytree(step, tmp_path / "other" / "step_00000001"))
    record(
        step,
        lambda value: value["config"].update({"k" * 100_000: {str(i): i for i in range(10_000)}}),
    )
    record(
        other,
        lambda value: value["config"].update({"k" * 100_000: {str(i): -i for i in range(10_000)}}),
    )
    main(["diff", str(step), str(other)])
    assert len(capsys.readouterr().out) < 5_000_000


def test_one_long_name_does_not_widen_every_line(step, capsys):
    forge(
        step,
        lambda m: m["tensors"].extend([["model." + "x" * 50_000, "F32", [1], [ABSENT]], *_more(1000)]),
    )
    main(["show", str(step)])
    assert len(capsys.readouterr().out) < 1_000_000


def _more(count: int) -> list:
    return [[f"model.{i}.more", "F32", [1], [ABSENT]] for i in range(count)]


def test_an_export_is_in_proportion_to_what_it_reads(step, tmp_path):
    forge(step, lambda m: m["tensors"].append(["model.huge", "F32", [FREE_BYTES], [ABSENT]]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # should it begin to write
    try:
        for suffix in (".safetensors", ".pt"):
            with pytest.raises(CheckpointCorrupt, match="from the files of this step come at most"):
                export_model(step.parent, "step:1", tmp_path / f"model{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*model*"))


def test_what_is_declared_absent_is_not_allocated(step):
    class Holder:
        def state_dict(self):
            return {"x": torch.ones(100_000)}

        def load_state_dict(self, state):
            raise AssertionError("there is nothing to load")

    run = step.parent / "held"
    Checkpointer(run, tiny.make(), held=Holder()).save(Progress(step=1))

    def change(manifest):
        number = [tensor[0] for tensor in manifest["tensors"]].index("held.x")
        manifest["tensors"][number] = ["held.x", "F32", [2**45], [ABSENT]]

    forge(run / "step_00000001", change)
    with pytest.raises(CheckpointCorrupt, match=r"held\.x of shape .* is declared absent in part"):
        Checkpointer(run, tiny.make(1), held=Holder()).resume("step:1")


# ---------------------------------------------------------------- numbers, types and names that training does not reach


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 10**30), ("step", 10**18), ("step", -1), ("samples", -8), ("samples", 2**63), ("epoch", -1), ("epoch", float("nan")),
        ("epoch", float("inf")), ("stale", -1), ("best", {"value": 0.1, "step": -1, "epoch": 0}),
        ("best", {"value": float("nan"), "step": 1, "epoch": 0}), ("history", [{"step": float("nan")}]), ("history", [{"epoch": 1e30}]),
        ("history", [{"step": -1.0}]), ("step", 2), ("samples", 9), ("metrics", {"loss": "low"}),
    ],
)  # fmt: skip
def test_progress_out_of_range_is_corrupt(step, field, value):
    record(step, lambda r: r["progress"].update({field: value}))
    refused(step, CheckpointCorrupt, "its state record is")


@pytest.mark.parametrize("field", ["step", "best_step", "parent_step", "mode", "epoch", "samples", "created"])
def test_a_summary_out_of_range_is_corrupt(step, field):
    def change(manifest):
        if field == "parent_step":
            manifest["summary"]["lineage"][0][1] = 10**18
        else:
            manifest["summary"][field] = {"mode": "median", "created": float("inf")}.get(field, 2**63 - 1)

    forge(step, change)
    refused(step, CheckpointCorrupt, "does not follow the format")


@pytest.mark.parametrize(
    "progress",
    [
        Progress(step=10**18),
        Progress(epoch=2**63),
        Progress(step=1, history=[{"step": float("nan")}]),
    ],
)
def test_such_progress_is_not_saved(tmp_path, progress):
    with pytest.raises(UsageError, match="progress"):
        Checkpointer(tmp_path, tiny.make()).save(progress)


@pytest.mark.parametrize(
    "field",
    [
        "groups",
        "scalars",
        "counters",
        "more_optimizers",
        "scheduler",
        "keys",
        "empty_buffers",
        "stateless",
    ],
)
@pytest.mark.parametrize("value", [7, ["x", 3], {"a": 3}])
def test_a_model_of_other_types_is_an_error_of_ours(step, field, value):
    record(step, lambda r: r["models"][""].update({field: value}))
    try:
        Checkpointer(step.parent, tiny.make(1)).resume("step:1")
    except EngineError:
        return
    assert field in ("counters", "scheduler"), "a plain model has none"


@pytest.mark.parametrize("random", [7, {"torch": 2**62}, {"numpy": ("MT19937", b"", 10**6, 0, 0.0)}, {"cuda": None}])
def test_random_state_of_other_types_is_corrupt(step, random):
    def change(index):
        value = decode_record(index["record"])
        value["rng"] = {**value["rng"], **random} if isinstance(random, dict) else random
        index["record"] = encode_record(value)

    tiny.forge(step, index=change)
    refused(step, CheckpointCorrupt, "the record of rank 0 is not as this version writes it")


def test_what_a_member_does_not_take_is_an_error_of_ours(step):
    module, optimizer = tiny.make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    run = step.parent / "scheduled"
    Checkpointer(run, (module, optimizer, scheduler)).save(Progress(step=1))
    record(run / "step_00000001", lambda r: r["models"][""]["scheduler"].update({"base_lrs": 3}))
    model = tiny.make(1)
    with pytest.raises(
        IncompatibleCheckpoint,
        match="schedulers and extra state cannot be taken over by this run: TypeError",
    ):
        Checkpointer(run, (*model, torch.optim.lr_scheduler.StepLR(model[1], 3))).resume("step:1")


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("name", ["__metadata__", "x" * 70_000])
def test_a_name_that_no_file_can_carry_is_refused_on_attach_and_when_read(step, tmp_path, name):
    with pytest.raises(UsageError, match="rename it"):
        Checkpointer(tmp_path, Named(name))
    forge(step, lambda m: m["tensors"].append([f"model.{name}", "F32", [1], [ABSENT]]))
    refused(step, CheckpointCorrupt, "a tensor is called")


def test_such_a_name_of_a_members_tensor_is_refused_at_the_save(tmp_path):
    class Holder:
        def state_dict(self):
            return {"__metadata__": torch.ones(100_000)}

        def load_state_dict(self, state): ...

    with pytest.raises(UsageError, match="__metadata__ is what safetensors calls the metadata of a file; rename it"):
        Checkpointer(tmp_path, tiny.make(), held=Holder()).save(Progress(step=1))


def test_keys_of_an_export_that_no_reader_takes_are_refused(step, tmp_path):
    record(step, lambda r: r["models"][""].update({"keys": {"0.weight": "__metadata__"}}))
    with pytest.raises(CheckpointCorrupt, match="has the key __metadata__"):
        export_model(step.parent, "step:1", tmp_path / "model.safetensors")
    record(step, lambda r: r["models"][""].update({"keys": {}}))
    forge(step, lambda m: m["aliases"].update({"model.format": "model.0.weight"}))
    with pytest.raises(UsageError, match=r"export to a \.pt file"):
        export_model(step.parent, "step:1", tmp_path / "model.safetensors")
    export_model(step.parent, "step:1", tmp_path / "model.pt")
