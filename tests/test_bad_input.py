"""What can go wrong for a user on one process: each gives the right class of error, names the culprit and what to do, and where it
comes before filling leaves the live state as it was."""

import os
import re

import pytest
import torch
from torch import nn

from engine import Progress
from engine.errors import CheckpointCorrupt, CheckpointNotFound, IncompatibleCheckpoint, StorageError, UsageError
from tests.now import Checkpointer
from tests.storage.test_local import file_size_limit
from tests.tiny import make, same, save, state

PARTLY = "The live state is now partly overwritten: resume from another checkpoint or start anew"
SHARD, INDEX, MANIFEST = "rank_00000.0.safetensors", "rank_00000.index", "manifest"


@pytest.fixture
def step(tmp_path):
    return save(tmp_path / "run")


def refused(run, model, kind, *told, what="latest", partly=False, **options):
    """Resuming raises ``kind`` with all of ``told`` in its message; the live state is untouched unless ``partly``, and None is for
    either, if the message says which."""
    checkpointer = Checkpointer(run, model)
    before = state(model)
    with pytest.raises(kind) as error:
        checkpointer.resume(what, **options)
    for text in told:
        assert text in str(error.value), f"{text!r} is not in: {error.value}"
    said = PARTLY in str(error.value)
    assert partly is None or said == partly, str(error.value)
    if not said:
        assert same(state(model), before), "live state has changed"


def test_what_is_sound_is_restored_to_the_bit(step):
    """So that the refusals below are for what was broken."""
    model = make(seed=1)
    checkpointer = Checkpointer(step.parent, model)
    assert not same(state(model), state(make(seed=0)))
    progress = checkpointer.resume()
    assert (progress.epoch, progress.step, progress.samples) == (1, 1, 8)
    assert same(state(model), state(make(seed=0)))
    assert checkpointer.max_difference() == 0.0


def test_a_wrong_path(step, tmp_path):
    refused(tmp_path / "rum", make(1), CheckpointNotFound, "the run folder", str(tmp_path / "rum"), "does not exist. Check the path")
    refused(step.parent, make(1), CheckpointNotFound, "there is no folder", "it has step_00000001. Name one of them", what=str(tmp_path / "rum"))


def test_an_empty_run(tmp_path):
    refused(tmp_path, make(1), CheckpointNotFound, str(tmp_path), "no step has been committed there. Start the run without --resume")


def test_an_empty_run_may_start_fresh(tmp_path, caplog):
    model = make(1)
    before = state(model)
    assert Checkpointer(tmp_path, model).resume(missing="fresh") == Progress()
    assert same(state(model), before)
    assert any("STARTING FRESH" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)


def test_fresh_is_for_latest_only_and_not_for_damage(step):
    refused(step.parent, make(1), CheckpointNotFound, "there is no step 9", what="step:9", missing="fresh")
    (step / MANIFEST).write_bytes(b"")
    refused(step.parent, make(1), CheckpointCorrupt, MANIFEST, missing="fresh")


def test_an_absent_epoch(step):
    refused(step.parent, make(1), CheckpointNotFound, "after 7 completed epochs", "it has step_00000001. Name one of them", what="epoch:7")


def test_a_malformed_name(step):
    refused(step.parent, make(1), UsageError, "'epoch:three' names no checkpoint", "as in 'epoch:3'", what="epoch:three")


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_a_missing_file(step, name):
    (step / name).unlink()
    refused(
        step.parent,
        make(1),
        CheckpointCorrupt,
        str(step / name),
        "written by rank 0, is missing",
        "Restore the file from a copy, or resume from another step",
    )


def test_a_missing_manifest(step):
    (step / MANIFEST).unlink()
    refused(step.parent, make(1), CheckpointNotFound, str(step.parent), "no step has been committed there")


@pytest.mark.parametrize("by", [-1, -4000, 1])
def test_a_shard_of_another_length(step, by):
    size = (step / SHARD).stat().st_size
    os.truncate(step / SHARD, size + by)
    refused(
        step.parent, make(1), CheckpointCorrupt, str(step / SHARD), "rank 0", f"has {size + by} bytes, {size} expected", "resume from another step"
    )


@pytest.mark.parametrize("name", [INDEX, MANIFEST])
def test_a_truncated_index_or_manifest(step, name):
    os.truncate(step / name, (step / name).stat().st_size - 1)
    refused(step.parent, make(1), CheckpointCorrupt, str(step / name))


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [0, 9, 100, 4095])
def test_a_flipped_byte_in_a_shards_header(step, position):
    _flip(step / SHARD, position)
    refused(step.parent, make(1), CheckpointCorrupt, str(step / SHARD), "rank 0", "its header has changed", "resume from another step")


@pytest.mark.parametrize("name", [INDEX, MANIFEST])
def test_a_flipped_byte_in_an_index_or_a_manifest(step, name):
    for position in (0, 30, 600, (step / name).stat().st_size - 1):
        _flip(step / name, position)
        late = None if position > 600 else False  # the end of an index is its rank's own record, restored last
        refused(step.parent, make(1), CheckpointCorrupt, str(step / name), partly=late)
        _flip(step / name, position)


def test_a_flip_in_any_element_of_a_shards_data_is_detected_and_its_tensor_named(step):
    named = set()
    for position in range(4096, (step / SHARD).stat().st_size, 3):  # at least once in every element
        _flip(step / SHARD, position)
        with pytest.raises(CheckpointCorrupt, match="has changed: the checksum of bytes") as error:
            Checkpointer(step.parent, make(1)).resume()
        message = str(error.value)
        assert str(step / SHARD) in message
        assert "written by rank 0" in message
        first, last = map(int, re.search(r"bytes (\d+) to (\d+)", message).groups())
        assert first <= position < last
        tensor = re.search(r"rank 0: (\S+) at", message)[1]
        assert (PARTLY in message) == (not tensor.endswith(".step")), "step counts are read first: they decide whether the rest fits"
        named.add(tensor)
        _flip(step / SHARD, position)
    assert len(named) == 4 + 3 + 4 * 3, "each of the parameters, buffers and states"


def test_another_architecture(step):
    refused(
        step.parent, make(1, width=5), IncompatibleCheckpoint, "model.0.weight: [5, 4] here, [3, 4] in the checkpoint",
        "optim.state.0.weight.exp_avg: [5, 4] here, [3, 4]", "buffers.1.running_mean: [5] here, [3]", "build the model that was saved",
    )  # fmt: skip


def _with(extra):
    module, _ = make(1)
    if extra:
        module.append(nn.Linear(3, 2))
    return module, torch.optim.AdamW(module.parameters())


def test_a_tensor_that_the_checkpoint_lacks(step, caplog):
    refused(
        step.parent,
        _with(extra=True),
        IncompatibleCheckpoint,
        "model.2.weight",
        "model.2.bias",
        "in the model here but not in the checkpoint",
        "allow_missing",
    )
    model = _with(extra=True)
    kept = model[0][2].weight.detach().clone()
    Checkpointer(step.parent, model).resume(allow_missing=["model.2.*"])
    assert torch.equal(model[0][2].weight, kept)
    assert torch.equal(model[0][0].weight, make(seed=0)[0][0].weight)
    assert "kept as they were, as allowed: model.2.weight, model.2.bias" in caplog.text


def test_a_tensor_that_the_model_lacks(step, tmp_path, caplog):
    wider = _with(extra=True)
    Checkpointer(tmp_path / "wide", wider).save(Progress(step=1))
    refused(
        tmp_path / "wide",
        _with(extra=False),
        IncompatibleCheckpoint,
        "model.2.weight",
        "in the checkpoint but not in the model here",
        "allow_unexpected",
    )
    Checkpointer(tmp_path / "wide", _with(extra=False)).resume(allow_unexpected=["*.2.*"])
    assert "left out, as allowed" in caplog.text


def test_another_dtype(step, caplog):
    model = make(1, dtype=torch.float64)
    refused(step.parent, model, IncompatibleCheckpoint, "model.0.weight: F64 here, F32 in the checkpoint", "allow_cast")
    refused(step.parent, model, IncompatibleCheckpoint, "buffers.1.running_var: F64 here, F32", allow_cast=["model.*", "optim.*"])
    Checkpointer(step.parent, model).resume(allow_cast=["*"])
    saved = make(seed=0)
    assert torch.equal(model[0][0].weight, saved[0][0].weight.double())
    assert torch.equal(model[1].state[model[0][0].weight]["exp_avg"], saved[1].state[saved[0][0].weight]["exp_avg"].double())
    assert "converted, as allowed" in caplog.text


def test_another_optimizer(step):
    model = make(1, optimizer=torch.optim.SGD)
    refused(step.parent, model, IncompatibleCheckpoint, "optimizer is SGD here", "saved with AdamW", "Resume with the same optimizer")


def test_a_member_that_the_checkpoint_lacks(step):
    class Counter:
        def state_dict(self):
            return {"n": 3}

        def load_state_dict(self, state):
            raise AssertionError("nothing was saved for it")

    with pytest.raises(IncompatibleCheckpoint, match=r"\['counter'\] only in this run \(allow_missing\)"):
        Checkpointer(step.parent, make(1), counter=Counter()).resume()
    Checkpointer(step.parent, make(1), counter=Counter()).resume(allow_missing=["counter"])


def test_an_object_that_is_no_member(tmp_path):
    with pytest.raises(
        UsageError, match=r"rate=0.1 is neither an option nor a member \(float has no state\).*a member is a DeepSpeed engine, a module"
    ):
        Checkpointer(tmp_path, make(), rate=0.1)


def test_state_that_no_record_holds(tmp_path):
    class Odd:
        def state_dict(self):
            return {"callback": print}

        def load_state_dict(self, state):
            pass

    with pytest.raises(UsageError, match=r"state_dict\(\)\.callback is a builtins\.builtin_function_or_method"):
        Checkpointer(tmp_path, make(), odd=Odd()).save(Progress(step=1))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["replaced", "added", "removed", "in another module"])
def test_parameters_that_are_others_than_at_the_start(tmp_path, how):
    module, optimizer = make()
    checkpointer = Checkpointer(tmp_path, (module, optimizer))
    checkpointer.save(Progress(step=1))
    name = "0.weight"
    if how == "replaced":
        module[0].weight = nn.Parameter(torch.zeros_like(module[0].weight))
    elif how == "added":
        module[0].extra, name = nn.Parameter(torch.zeros(3)), "0.extra"
    elif how == "removed":
        del module[0].weight
    else:
        module[0] = nn.Linear(module[0].in_features, module[0].out_features)
    with pytest.raises(UsageError, match=rf"the module's parameters changed since the Checkpointer was made: {name}"):
        checkpointer.save(Progress(step=2))
    assert sorted(path for path in os.listdir(tmp_path) if "step_" in path) == ["step_00000001"]


def test_a_wrapper_put_around_a_layer_later_changes_nothing(tmp_path):
    module, optimizer = make()
    checkpointer = Checkpointer(tmp_path, (module, optimizer))
    checkpointer.save(Progress(step=1))
    module[0] = nn.Sequential(module[0])
    for step in (2, 3):
        checkpointer.save(Progress(step=step))
    checkpointer.resume()
    assert checkpointer.max_difference() == 0.0


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"cannot create folder {tmp_path}/file/run: .*give the path of a run folder"):
        Checkpointer(tmp_path / "file" / "run", make()).save(Progress(step=1))


def test_a_disk_that_is_full_loses_nothing_committed(step):
    """As ENOSPC, but for this process only: the kernel refuses bytes past a limit. The shard passes it, in the middle."""
    model = make(seed=2)
    checkpointer = Checkpointer(step.parent, model)
    with (
        file_size_limit(4200),
        pytest.raises(StorageError, match=rf"cannot write .*{re.escape(SHARD)}: File too large .*committed before are untouched"),
    ):
        checkpointer.save(Progress(step=2))
    assert sorted(os.listdir(step.parent)) == [".lease_00000002", "latest", "run.json", step.name], "nothing torn is left"
    checkpointer.save(Progress(step=3))
    Checkpointer(step.parent, model).resume("step:1")
    assert same(state(model), state(make(seed=0)))


def test_a_disk_that_is_full_while_a_step_is_replaced_leaves_the_old_one(step):
    with file_size_limit(4200), pytest.raises(StorageError):
        Checkpointer(step.parent, make(seed=2)).save(Progress(step=1))
    model = make(seed=1)
    Checkpointer(step.parent, model).resume()
    assert same(state(model), state(make(seed=0)))


def test_a_torn_attempt_of_a_killed_job_is_no_checkpoint(step):
    os.rename(step, step.parent / ".step_00000001.0123456789ab")
    refused(step.parent, make(1), CheckpointNotFound, "no step has been committed there")
