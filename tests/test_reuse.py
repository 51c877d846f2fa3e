"""What nobody trains is stored once and linked: into steps that are whole by themselves, of content that is always this save's."""

import copy
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import nn

import engine
from engine import Progress
from engine.errors import CheckpointCorrupt, StorageError, UsageError
from engine.events import SaveEvent
from engine.format.layout import REPLICATED, Absent, Flat, Grid, LogicalTensor, Mesh, Part
from engine.plan.assign import assign_writers, place_frozen
from engine.plan.order import reading_order
from engine.storage import LocalStorage
from engine.transfer.stored import StoredCheckpoint
from engine.transfer.verify import verify
from tests.now import Checkpointer
from tests.tiny import forge

WIDTH = 64
FROZEN = {f"model.{i}.base.weight" for i in range(3)}


@pytest.fixture(autouse=True)
def small_is_worth_it(monkeypatch):
    monkeypatch.setattr("engine.plan.assign.FROZEN_BYTES", 1024)


class Adapted(nn.Module):
    """A frozen linear layer, and what is learnt beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


class Run:
    """A model under way, its checkpointer, and the state of every step that was saved."""

    def __init__(self, run: Path, seed: int = 0, *, behind: int = 0, **options) -> None:
        torch.manual_seed(seed)
        self.path = run
        self.model = nn.Sequential(*(Adapted() for _ in range(3)))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.members = {name: value for name, value in options.items() if isinstance(value, nn.Module)}
        self.events: list[SaveEvent] = []
        kept = {name: value for name, value in options.items() if name not in self.members}
        make = engine.Checkpointer if behind else Checkpointer
        kept |= {"max_in_flight": behind} if behind else {}
        self.checkpointer = make(run, (self.model, self.optimizer), events=[self.events.append], **kept, **self.members)
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def train(self) -> float:
        loss = self.model(torch.randn(4, WIDTH)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, step: int) -> Path:
        self.states[step] = self.state()
        return Path(self.checkpointer.save(Progress(step=step)))

    def state(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": p.detach().clone() for name, p in self.model.named_parameters()}
        for name, member in self.members.items():
            found |= {f"{name}.model.{n}": p.detach().clone() for n, p in member.named_parameters()}
        return found

    def go(self, steps: range) -> list[Path]:
        folders = []
        for step in steps:
            self.train()
            folders.append(self.save(step))
        return folders

    def written(self) -> list[int]:
        """The bytes of each save that were not linked."""
        return [event.size_bytes - event.reused_bytes for event in self.events]


def frozen_files(step: Path) -> list[Path]:
    return sorted(step.glob("frozen.*"))


def inodes(step: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in frozen_files(step)}


def tensors_in(step: Path, pattern: str) -> dict[str, torch.Tensor]:
    """By another reader than ours."""
    return {name: value for path in step.glob(pattern) for name, value in load_file(path).items()}


def frozen_in(step: Path) -> set[str]:
    return set(tensors_in(step, "frozen.*.safetensors"))


def problems(step: Path):
    return verify(LocalStorage(step.parent), step.name)


def assert_right(step: Path, state: dict[str, torch.Tensor]) -> None:
    assert problems(step) == []
    stored = tensors_in(step, "*.safetensors")
    for name, value in state.items():
        assert torch.equal(stored[name], value), f"{step.name}: {name}"


def flip(path: Path) -> None:
    """One byte of the last tensor, in place: whoever has this file sees it."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def shared_shard(step: Path) -> Path:
    (found,) = step.glob("frozen.*.safetensors")
    return found


# ---------------------------------------------------------------- what is linked


@pytest.mark.parametrize("behind", [0, 2])
def test_frozen_weights_are_written_once_and_every_step_stands_alone(tmp_path, behind):
    run = Run(tmp_path / "run", behind=behind)
    steps, following = [], {}
    for number in range(1, 5):
        run.train()
        steps.append(run.save(number))
        rng = torch.get_rng_state()
        other = copy.deepcopy((run.model, run.optimizer))
        following[number] = _losses(*other)
        torch.set_rng_state(rng)
    run.checkpointer.close()
    assert all(frozen_in(step) == FROZEN for step in steps)
    assert len({tuple(inodes(step).items()) for step in steps}) == 1, "one file, whatever the step"
    assert len(inodes(steps[0])) == 2, "a shard and an index"
    frozen_bytes = sum(path.stat().st_size for path in frozen_files(steps[0]))
    assert frozen_bytes >= 3 * WIDTH * WIDTH * 4
    first, *later = run.written()
    assert first > frozen_bytes
    assert all(written == first - frozen_bytes for written in later), "only what is trained"
    assert all(event.reused_bytes == frozen_bytes for event in run.events[1:])

    for number, step in enumerate(steps, 1):
        shutil.copytree(step, tmp_path / "copies" / str(number) / step.name)
    for number, step in enumerate(steps, 1):
        _check_alone(tmp_path / "copies" / str(number) / step.name, run.states[number], following[number])
    shutil.rmtree(steps[0])
    shutil.rmtree(steps[3])
    _check_alone(steps[2], run.states[3], following[3])
    shutil.rmtree(steps[1])
    _check_alone(steps[2], run.states[3], following[3])


def _check_alone(step: Path, state, losses) -> None:
    assert_right(step, state)
    run = Run(step.parent / "other", seed=9)
    run.checkpointer.resume(str(step))
    assert run.checkpointer.max_difference() == 0.0
    assert all(torch.equal(value, state[name]) for name, value in run.state().items())
    assert _losses(run.model, run.optimizer) == losses


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for _ in range(2):
        loss = model(torch.randn(4, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("behind", [0, 2])
def test_retention_never_breaks_what_is_kept(tmp_path, behind):
    run = Run(tmp_path, behind=behind, keep_last=2, keep_every=4)
    run.go(range(1, 8))
    run.checkpointer.close()
    left = sorted(tmp_path.glob("step_*"))
    assert [step.name for step in left] == ["step_00000004", "step_00000006", "step_00000007"]
    for step in left:
        assert_right(step, run.states[int(step.name[5:])])
    assert inodes(left[0]) == inodes(left[2]), "the file outlives the step that wrote it"
    for name in inodes(left[0]):
        assert (left[0] / name).stat().st_nlink == 3


def test_a_linked_file_is_never_opened_for_writing(tmp_path, monkeypatch):
    opened: list[str] = []
    create = LocalStorage.create
    monkeypatch.setattr(LocalStorage, "create", lambda self, path, *args: (opened.append(os.path.basename(path)), create(self, path, *args))[1])
    run = Run(tmp_path)
    (step,) = run.go(range(1, 2))
    files = frozen_files(step)
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    assert {path.name for path in files} <= set(opened)
    opened.clear()
    for path in files:
        path.chmod(0o400)
    run.go(range(2, 5))
    run.save(1)
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    assert not [name for name in opened if name.startswith("frozen")]
    assert_right(step, run.states[1])


def test_a_resume_in_the_same_run_goes_on_linking(tmp_path):
    first = Run(tmp_path)
    steps = first.go(range(1, 3))
    second = Run(tmp_path, seed=5)
    second.checkpointer.resume()
    steps += second.go(range(3, 5))
    assert len({tuple(inodes(step).items()) for step in steps}) == 1
    assert all(event.reused_bytes for event in second.events)
    elsewhere = Run(tmp_path / "elsewhere", seed=6)
    elsewhere.checkpointer.resume(str(tmp_path))
    (copied,) = elsewhere.go(range(5, 6))
    assert not elsewhere.events[0].reused_bytes, "another run's files are not this one's"
    for step, run in [(steps[1], first), (steps[3], second), (copied, elsewhere)]:
        assert_right(step, run.states[int(step.name[5:])])


def test_after_a_step_is_deleted_the_next_is_written_in_full(tmp_path):
    run = Run(tmp_path)
    first, second = run.go(range(1, 3))
    shutil.rmtree(second)
    third, fourth = run.go(range(3, 5))
    assert inodes(third).keys() == inodes(first).keys()
    assert not set(inodes(third).values()) & set(inodes(first).values())
    assert inodes(fourth) == inodes(third)
    for step in (first, third, fourth):
        assert_right(step, run.states[int(step.name[5:])])


def test_little_is_not_worth_a_file(tmp_path, monkeypatch):
    bytes_of_all = 3 * WIDTH * WIDTH * 4
    for limit, expected in [(bytes_of_all, FROZEN), (bytes_of_all + 1, set())]:
        monkeypatch.setattr("engine.plan.assign.FROZEN_BYTES", limit)
        run = Run(tmp_path / str(limit))
        for step in run.go(range(1, 3)):
            assert frozen_in(step) == expected
            assert_right(step, run.states[int(step.name[5:])])


# ---------------------------------------------------------------- what changes though nobody trains it


@pytest.mark.parametrize(("behind", "waits"), [(0, False), (1, True), (2, True), (2, False)])
def test_an_average_is_saved_right_at_every_step_and_leaves_the_frozen_files(tmp_path, behind, waits):
    torch.manual_seed(3)
    average = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    run = Run(tmp_path, behind=behind, ema=average)
    steps = []
    for number in range(1, 9):
        run.train()
        versions = [p._version for p in average.parameters()]
        for name, p in average.named_parameters():
            if name != "1.weight":  # not all of it changes
                p.data.mul_(0.9).add_(number * 0.1)
        assert [p._version for p in average.parameters()] == versions
        steps.append(run.save(number))
        if waits:  # that it could be known earlier changes nothing: another rank may not know it
            run.checkpointer.wait()
    run.checkpointer.close()
    for step in steps:
        assert_right(step, run.states[int(step.name[5:])])
    named = {f"ema.model.{name}" for name, _ in average.named_parameters()}
    assert [frozen_in(step) for step in steps[: behind + 2]] == [FROZEN | named] * (behind + 2), "it is not known before"
    assert [frozen_in(step) for step in steps[behind + 2 :]] == [FROZEN | {"ema.model.1.weight"}] * (6 - behind)
    assert len({tuple(inodes(step).items()) for step in steps[behind + 2 :]}) == 1, "the rest is linked again"
    assert not any(event.reused_bytes for event in run.events[: behind + 3])
    assert all(event.reused_bytes for event in run.events[behind + 3 :])


def test_a_teacher_that_is_replaced_once_is_saved_right(tmp_path):
    torch.manual_seed(3)
    teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    run = Run(tmp_path, teacher=teacher)
    steps = run.go(range(1, 3))
    teacher.weight.data = torch.randn(WIDTH, WIDTH)
    steps += run.go(range(3, 6))
    for step in steps:
        assert_right(step, run.states[int(step.name[5:])])
    assert inodes(steps[1]) != inodes(steps[2])
    assert inodes(steps[3]) == inodes(steps[4])


@pytest.mark.parametrize("behind", [0, 2])
def test_what_a_resume_has_replaced_is_frozen_all_the_same(tmp_path, behind):
    Run(tmp_path / "other", seed=7).go(range(1, 2))
    run = Run(tmp_path / "run", behind=behind)
    steps = run.go(range(1, 3))
    run.checkpointer.resume(str(tmp_path / "other"))
    steps += run.go(range(3, 9))
    run.checkpointer.close()
    for step in steps:
        assert frozen_in(step) == FROZEN
        assert_right(step, run.states[int(step.name[5:])])
    assert len({tuple(inodes(step).items()) for step in steps[2:]}) == 1


def test_a_model_without_an_optimizer_is_frozen_where_it_says_so(tmp_path):
    teacher = nn.Linear(WIDTH, WIDTH, bias=False)
    run = Run(tmp_path, teacher=teacher)
    steps = run.go(range(1, 3))
    for number, flag in [(3, False), (5, True)]:
        teacher.requires_grad_(flag)
        steps += run.go(range(number, number + 2))
    assert ["teacher.model.weight" in frozen_in(step) for step in steps] == [False] * 2 + [True] * 2 + [False] * 2
    for step in steps:
        assert_right(step, run.states[int(step.name[5:])])


def test_what_is_unfrozen_or_frozen_in_mid_run_changes_its_place(tmp_path):
    run = Run(tmp_path)
    weight, name = run.model[1].base.weight, "model.1.base.weight"
    steps = run.go(range(1, 3))
    weight.requires_grad_(True)
    run.optimizer.add_param_group({"params": [weight]})
    steps += run.go(range(3, 5))
    assert not torch.equal(run.states[2][name], run.states[3][name]), "it is trained"
    assert [frozen_in(step) for step in steps] == [FROZEN] * 2 + [FROZEN - {name}] * 2
    assert inodes(steps[2]) == inodes(steps[3])

    weight.requires_grad_(False)  # its optimizer still has it, and may still decay it
    steps += run.go(range(5, 6))
    assert frozen_in(steps[4]) == FROZEN - {name}
    run.optimizer.param_groups.pop()
    run.optimizer.state.pop(weight)
    steps += run.go(range(6, 9))
    assert [frozen_in(step) for step in steps[5:]] == [FROZEN] * 3
    assert inodes(steps[6]) == inodes(steps[7])
    for step in steps:
        assert_right(step, run.states[int(step.name[5:])])
    losses = _losses(run.model, run.optimizer)
    again = Run(tmp_path, seed=4)
    again.checkpointer.resume()
    assert _losses(again.model, again.optimizer) == losses


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EMLINK, errno.EPERM], ids=errno.errorcode.get)
def test_where_nothing_can_be_linked_all_is_written(tmp_path, monkeypatch, code):
    tried: list[str] = []

    def refuse(source: str, target: str, **_) -> None:
        tried.append(target)
        raise OSError(code, os.strerror(code), source)

    monkeypatch.setattr(os, "link", refuse)
    run = Run(tmp_path)
    steps = run.go(range(1, 4))
    assert len(tried) == 4, "a shard and an index, at the second and third save"
    assert len({tuple(inodes(step)) for step in steps}) == 1, "names tell content"
    assert not any(event.reused_bytes for event in run.events)
    for step in steps:
        assert all(path.stat().st_nlink == 1 for path in step.iterdir())
        assert_right(step, run.states[int(step.name[5:])])


def test_a_link_that_fails_otherwise_fails_the_save_and_nothing_else(tmp_path, monkeypatch):
    run = Run(tmp_path)
    (first,) = run.go(range(1, 2))
    with monkeypatch.context() as patch:

        def refuse(*_, **__) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "link", refuse)
        with pytest.raises(StorageError, match="Input/output error"):
            run.go(range(2, 3))
    assert_right(first, run.states[1])
    (third,) = run.go(range(3, 4))
    assert inodes(third) == inodes(first)
    assert_right(third, run.states[3])


# ---------------------------------------------------------------- a shared file goes bad


def test_verify_names_every_step_that_shares_a_bad_file(tmp_path):
    run = Run(tmp_path)
    steps = run.go(range(1, 4))
    shutil.copytree(steps[0], tmp_path / "step_00000009")  # a copy shares nothing
    flip(shared_shard(steps[1]))
    for step in steps:
        (found,) = problems(step)
        assert found.file == shared_shard(step).name
        assert found.shared_with == tuple(other.name for other in steps if other != step)
        assert all(name in str(found) for name in found.shared_with)
        assert found.tensor in FROZEN


def test_a_resume_never_falls_back_to_a_step_with_the_same_bad_file(tmp_path):
    run = Run(tmp_path)
    flip(shared_shard(run.go(range(1, 4))[2]))
    other = Run(tmp_path, seed=1)
    with pytest.raises(CheckpointCorrupt, match="frozen"):
        other.checkpointer.resume(corrupt="previous")
    with pytest.raises(UsageError):
        other.save(4)


def test_a_file_is_written_anew_now_and_then_so_that_a_bad_one_does_not_last(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "engine")  # whatever other tests have set
    monkeypatch.setattr("engine.writer.REWRITE_AFTER", 2)
    run = Run(tmp_path)
    steps = run.go(range(1, 6))
    assert inodes(steps[0]) == inodes(steps[1]) == inodes(steps[2])
    assert inodes(steps[3]) == inodes(steps[4])
    assert not set(inodes(steps[2]).values()) & set(inodes(steps[3]).values())
    flip(shared_shard(steps[4]))

    other = Run(tmp_path, seed=1, read_only=True)
    assert other.checkpointer.resume(corrupt="previous").step == 3
    assert "IS DAMAGED" in caplog.text
    assert all(torch.equal(value, run.states[3][name]) for name, value in other.state().items())
    (fourth,) = Run(tmp_path / "apart").go(range(4, 5))
    assert problems(fourth) == []

    steps += run.go(range(6, 9))
    assert "HAS CHANGED since it was written" in caplog.text
    assert [bool(problems(step)) for step in steps] == [False] * 3 + [True] * 2 + [False] * 3
    for step in (*steps[:3], *steps[5:]):
        assert_right(step, run.states[int(step.name[5:])])


def test_after_falling_back_saves_link_to_what_was_sound(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.writer.REWRITE_AFTER", 1)
    steps = Run(tmp_path).go(range(1, 5))
    flip(shared_shard(steps[3]))
    other = Run(tmp_path, seed=1)
    assert other.checkpointer.resume().step == 2
    (third,) = other.go(range(3, 4))
    assert_right(third, other.states[3])
    assert inodes(third) == inodes(steps[1])


# ---------------------------------------------------------------- plans


def _tensor(name: str, layout, shape=(32, 16), dtype="F32") -> LogicalTensor:
    return LogicalTensor(name, dtype, shape, (Part(layout),))


def _model(world: int) -> list[LogicalTensor]:
    mesh = Mesh((world,))
    return [
        _tensor("model.z", Grid(mesh, (0,), 0)),
        _tensor("model.m", Flat(mesh, 5, 300)),
        _tensor("model.a", Grid(mesh, (REPLICATED,))),
        _tensor("model.b", Grid(mesh, (0,), 0)),
        LogicalTensor("model.rows", "F32", (32, 16), (Part(Grid(mesh, (0,), 0), (0, 0), (20, 16)), Part(Grid(mesh, (0,), 0), (20, 0), (12, 16)))),
        LogicalTensor("model.gone", "F32", (8, 4), (Part(Absent()),)),
    ]


def _states(world: int) -> list[LogicalTensor]:
    return [_tensor(f"optim.state.{n}.exp_avg", Grid(Mesh((world,)), (0,), 0), (n + 5, 2)) for n in range(7)]


KNOWN = frozenset({("model.z", ()), ("model.a", ()), ("model.rows", (0, 0)), ("model.gone", ()), ("model.absent", ())})


@pytest.mark.parametrize("world", [1, 2, 5])
def test_frozen_parts_go_to_further_writers_and_nothing_else_does(world):
    plain = assign_writers(_model(world))
    placed = {tensor.name: tensor for tensor in place_frozen(plain, KNOWN, world)}
    for tensor in plain:
        for part, before in zip(placed[tensor.name].parts, tensor.parts, strict=True):
            if (tensor.name, part.offsets) in KNOWN and not isinstance(before.layout, Absent):
                assert part.layout.mesh.first == world
                assert replace(part.layout, mesh=before.layout.mesh) == before.layout
                assert (part.offsets, part.sizes) == (before.offsets, before.sizes)
            else:
                assert part == before
    assert place_frozen(plain, frozenset(), world) == plain


def test_too_little_stays_where_it_is():
    plain = assign_writers(_model(2))
    assert place_frozen(plain, frozenset({("model.rows", (20, 0))}), 2) == plain, "768 bytes of 1024"
    assert place_frozen(plain, frozenset({("model.rows", (0, 0))}), 2) != plain


@pytest.mark.parametrize("world", [1, 3])
def test_frozen_tensors_come_first_and_keep_their_numbers_when_states_appear(world):
    numbers, classes = [], []
    for tensors in (_model(world), [*_states(world), *_model(world)], [*_model(world), *_states(world)][::-1]):
        placed = place_frozen(assign_writers(tensors), KNOWN, world)
        order, found = reading_order(placed, world)
        assert sorted(order) == list(range(len(placed)))
        names = [placed[place].name for place in order]
        assert names[:3] == ["model.a", "model.rows", "model.z"]
        numbers.append(names[:3])
        classes.append(found[:3])
        assert set(found[:3]) == {0}
        assert 0 not in found[3:]
    assert numbers[0] == numbers[1] == numbers[2]
    plain = assign_writers(_model(world))
    assert reading_order(plain, world) == reading_order(plain), "without frozen ones nothing is another"


# ---------------------------------------------------------------- forged manifests


def _named(name: str):
    def change(root: dict) -> None:
        rank, frozen = root["indexes"]
        root["indexes"] = [rank, [*frozen[:2], name]]

    return change


def _rank_named(root: dict) -> None:
    rank, frozen = root["indexes"]
    root["indexes"] = [[*rank[:2], frozen[2]], frozen]


def _unnamed(root: dict) -> None:
    rank, frozen = root["indexes"]
    root["indexes"] = [rank, frozen[:2]]


def _lost(root: dict) -> None:
    root["indexes"] = root["indexes"][:1]


FORGERIES = {
    "slash": _named("frozen./" + "0" * 31 + ".index"),
    "above": _named("../frozen." + "0" * 32 + ".index"),
    "another step's": _named("step_00000001/frozen." + "0" * 32 + ".index"),
    "a line more": _named("frozen." + "0" * 32 + ".index\n"),
    "a rank's": _named("rank_00000.index"),
    "the manifest": _named("manifest"),
    "missing": _named("frozen." + "0" * 32 + ".index"),
    "a rank's has a name": _rank_named,
    "a frozen one has none": _unnamed,
    "its index is not listed": _lost,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.plan.assign.FROZEN_BYTES", 1024)
        yield Run(tmp_path_factory.mktemp("forged")).go(range(1, 2))[0]


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_forged_names_of_indexes_are_refused(tmp_path, saved, change):
    step = tmp_path / saved.name
    shutil.copytree(saved, step)
    run = Run(tmp_path / "other", seed=1)
    run.checkpointer.resume(str(step))
    forge(step, manifest=change)
    with pytest.raises(CheckpointCorrupt):
        run.checkpointer.resume(str(step))
    if change is not FORGERIES["missing"]:
        with pytest.raises(CheckpointCorrupt):
            StoredCheckpoint(LocalStorage(tmp_path), step.name)
    assert problems(step)


def test_show_says_what_is_frozen(tmp_path, monkeypatch, capsys):
    from engine.cli import main

    monkeypatch.setattr("engine.plan.assign.FROZEN_BYTES", 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    Checkpointer(tmp_path, (model, torch.optim.SGD(model[1].parameters(), lr=0.1))).save(Progress(step=1))
    assert main(["show", str(tmp_path)]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("model.")}
    assert "frozen, whole, on rank 0" in told["model.0.weight"]
    assert "frozen" not in told["model.1.weight"]
