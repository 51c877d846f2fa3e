"""The ``engine`` command: what it prints, how it exits, and that looking at a run is instant."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import Progress
from engine.cli import main
from engine.cli.target import locate
from engine.cli.text import Bar, megabytes, printable, table
from engine.errors import CheckpointNotFound, UsageError
from engine.format.layout import REPLICATED, Absent, Flat, Grid, Mesh, Part
from engine.format.manifest import Line
from engine.format.record import Array, Reference
from tests.now import Checkpointer
from tests.synthetic import RECORD, unsynced, write_step

PARTS = {
    "model.w": (Part(Absent(), (0, 0), (2, 4)), Part(Flat(Mesh((2,)), 3, 16), (2, 0), (4, 4), "BF16")),
    "model.x": (Part(Grid(Mesh((2, 2)), (REPLICATED, 1))),),
}
VALUES = {"model.w": torch.arange(24.0).reshape(6, 4), "model.x": torch.ones(3, 8, dtype=torch.bfloat16), "buffers.n": torch.tensor(7)}


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 10, 20 and 30 of one line; 20 was resumed and went on to 25, the latest. 10 is best."""
    step = Line("a", 0)
    for number, lineage, loss in ((10, (step,), 0.25), (20, (step,), 0.5), (30, (step,), 0.125), (25, (step, Line("b", 20)), float("nan"))):
        write_step(
            tmp_path / "run",
            VALUES,
            PARTS,
            step=number,
            lineage=lineage,
            metrics={"val_loss": loss},
            monitor="val_loss",
            mode="min",
            best_step=10,
            created=1.7e9 + (number if number != 25 else 40),
        )
    return tmp_path / "run"


def printed(capsys, *arguments, code=0) -> list[str]:
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments, code) -> str:
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr().err


# ---------------------------------------------------------------- ls


def test_ls_shows_the_steps_and_marks_the_latest(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 2))
    checkpointer.save(Progress(step=7, epoch=1), metrics={"val_loss": 0.25})
    checkpointer.save(Progress(step=12, epoch=2))
    head, first, second = printed(capsys, "ls", tmp_path)
    assert head.split()[:4] == ["step", "epoch", "ranks", "engine"]
    assert first.split()[:4] == ["step_00000007", "1", "1", "single"]
    assert first.endswith("val_loss=0.25")
    assert second.endswith("← latest")


def test_ls_marks_latest_best_and_what_was_left_for_another_line(run, capsys):
    _, ten, twenty, latest, left = printed(capsys, "ls", run)
    assert ten.endswith("val_loss=0.25  ← best val_loss")
    assert twenty.endswith("val_loss=0.5")
    assert latest.startswith("step_00000025")
    assert latest.endswith("val_loss=nan  ← latest")
    assert left.startswith("step_00000030")
    assert left.endswith("← other line")
    assert "2023-11-14 22:13:30" in ten, "when it was saved, in UTC"


def test_ls_goes_on_after_a_step_that_cannot_be_read(run, capsys):
    (run / "step_00000010/manifest").write_bytes(b"x")
    (run / "step_00000030/manifest").write_bytes(b"PK\x1b[31m" + bytes(100))
    _, first, second, _, last = printed(capsys, "ls", run)
    assert first.startswith("step_00000010  cannot be read: ")
    assert "truncated" in first
    assert second.startswith("step_00000020")
    assert last.startswith("step_00000030  cannot be read: ")
    assert "\x1b" not in last


def test_ls_tells_a_step_under_the_name_of_another(run, capsys):
    os.rename(run / "step_00000030", run / "step_00000031")
    assert printed(capsys, "ls", run)[-1].startswith("step_00000031  cannot be read: ")


def test_ls_of_nothing_exits_with_the_errors_code(tmp_path, capsys):
    assert "no committed step" in refused(capsys, "ls", tmp_path, code=4)
    assert "no committed step" in refused(capsys, "ls", tmp_path / "none", code=4)


def test_ls_of_a_folder_of_runs_lists_them(run, capsys):
    shutil.move(run, run.parent / "base/run_002")
    (run.parent / "base/run_010").mkdir()
    head, two, ten = printed(capsys, "ls", run.parent / "base")
    assert head.split()[:2] == ["run", "experiment"]
    assert two.split()[0] == "run_002"
    assert two.endswith("val_loss=0.25 at step 10")
    assert ten.split()[0] == "run_010"


def test_ls_finds_every_run_below_a_folder(run, capsys):
    shutil.copytree(run, run.parent / "base/vocabulary/first try")
    shutil.move(run, run.parent / "base/one")
    (run.parent / "base/empty").mkdir()
    _, *rows = printed(capsys, "ls", run.parent / "base")
    assert [row.split("  ")[0].strip() for row in rows] == ["one", "vocabulary/first try"]


def test_ls_of_a_hundred_steps_is_instant_and_imports_neither_torch_nor_numpy(tmp_path):
    """Also run.json is not parsed, nor any index. The time of the process, of which Python's own start is a part."""
    with unsynced():
        write_step(tmp_path, {f"model.{i}.weight": torch.zeros(2) for i in range(500)}, step=1)
    for step in range(2, 101):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / f"step_{step:08d}")
    code = (
        f"import sys; from engine.cli import main; main(['ls', {str(tmp_path)!r}]);"
        "sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, "torch or numpy was imported"
        assert len(done.stdout.splitlines()) == 101
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    found = min(seconds() for _ in range(5))
    print(f"{found:.3f} s")
    assert found < 0.3


@pytest.mark.parametrize("command", [["show", "RUN"], ["verify", "RUN"], ["diff", "RUN@10", "RUN@20"]])
def test_no_command_imports_torch(run, command):
    command = [part.replace("RUN", str(run)) for part in command]
    code = f"import sys; from engine.cli import main; main({command!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60).returncode == 0


# ---------------------------------------------------------------- which step


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("run", "step_00000025"),
        ("run@latest", "step_00000025"),
        ("run@best", "step_00000010"),
        ("run@step:20", "step_00000020"),
        ("run@20", "step_00000020"),
        ("run@epoch:1", "step_00000025"),
        ("run/step_00000030", "step_00000030"),
        ("run/step_00000030/", "step_00000030"),
        ("run@step_00000030", ""),
    ],
)
def test_a_target_is_a_run_and_a_step(run, monkeypatch, what, name):
    monkeypatch.chdir(run.parent)
    if name:
        storage, folder = locate(what)
        assert (storage.root, folder) == (str(run), name)
    else:
        with pytest.raises(CheckpointNotFound, match="there is no folder"):
            locate(what)


def test_a_path_may_have_an_at_sign(run):
    os.rename(run, run.parent / "me@host")
    assert locate(f"{run.parent}/me@host")[1] == "step_00000025"
    assert locate(f"{run.parent}/me@host@20")[1] == "step_00000020"
    assert locate(f"{run.parent}/me@host/step_00000010")[1] == "step_00000010"


def test_a_malformed_target_says_how_it_is_written(run, capsys):
    with pytest.raises(UsageError):
        locate(f"{run}@step:x")
    assert "comes a whole number" in refused(capsys, "show", f"{run}@epoch:", code=2)
    assert "there is no step 7" in refused(capsys, "verify", f"{run}@7", code=4)


# ---------------------------------------------------------------- show


def test_show_tells_all_of_a_step(run, capsys):
    told = "\n".join(printed(capsys, "show", f"{run}@25"))
    assert told.splitlines()[0] == str(run / "step_00000025")
    for line in (
        "step     25, 1 epochs completed, 200 samples",
        "saved    2023-11-14 22:14:00 UTC by synthetic on 4 ranks",
        "line     a → b (from step 20)",
        "metrics  val_loss=nan",
        "best     step 10 by val_loss (min)",
        "model: synthetic, AdamW",
        "group 0, 1 parameters: lr=0.1 betas=[0.9, 0.999]",
        "sampler: {'seed': 3, 'samples': 8}",
        "width: 3",
        "tensors (3 of 3)",
    ):
        assert line in told, f"{line!r} is not in:\n{told}"
    rows = {row.split()[0]: row for row in told.splitlines() if row.startswith("  model.") or row.startswith("  buffers.")}
    assert "F32    [6, 4]  [2:6] flat over 2 ranks, 16 elements each, from 3, kept as BF16  [0:2]" in rows["model.w"]
    assert "BF16   [3, 8]  dim 1 in 2, on 2 ranks each" in rows["model.x"]
    assert "whole, on rank 0" in rows["buffers.n"]
    ranks = told[told.index("\nranks") :].splitlines()[2:]
    assert [row.split()[:2] for row in ranks[1:]] == [["0", "4"], ["1", "2"], ["2", "0"], ["3", "0"]]
    assert ranks[1].endswith("rank_00000.0.safetensors rank_00000.1.safetensors")


def test_show_filters_tensors(run, capsys):
    told = printed(capsys, "show", run, "--tensors", "model.*")
    assert "tensors (2 of 3)" in told
    assert not any(line.startswith("  buffers.n") for line in told)


def test_show_as_json_has_everything(run, capsys):
    told = json.loads("\n".join(printed(capsys, "show", f"{run}@10", "--json", "--tensors", "model.w")), parse_constant=pytest.fail)
    assert told["step"] == 10
    assert told["lineage"] == [["a", 0]]
    assert told["record"]["models"][""]["groups"][0]["values"] == {"lr": 0.1, "betas": [0.9, 0.999]}
    assert told["tensors"] == [
        {
            "name": "model.w",
            "dtype": "F32",
            "shape": [6, 4],
            "layout": "[2:6] flat over 2 ranks, 16 elements each, from 3, kept as BF16",
            "absent": ["[0:2]"],
            "stored_bytes": 64,
        }
    ]
    assert [rank["chunks"] for rank in told["ranks"]] == [4, 2, 0, 0]
    json.loads("\n".join(printed(capsys, "show", f"{run}@25", "--json")), parse_constant=pytest.fail)  # a NaN is no JSON


def test_show_survives_whatever_a_record_may_hold(tmp_path, capsys):
    record = {
        **RECORD,
        "models": {"a": 3, "b": {"groups": 7, "optimizer": None}, "c": {"groups": [1, {"values": 2, "params": 3}]}},
        "odd": {1: (b"bytes", complex(1, 2), Reference("model.w"), Array("torch", "F32", (1,), b"1234")), None: 10**2000, "\x1b[31m": "\u202e"},
        "config": "text",
    }
    write_step(tmp_path, VALUES, PARTS, record=record)
    told = "\n".join(printed(capsys, "show", tmp_path))
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "'5 bytes', '(1+2j)', 'tensor model.w', 'torch array, F32 [1]'" in told
    assert json.loads("\n".join(printed(capsys, "show", tmp_path, "--json")))["record"]["models"]["a"] == 3


def test_show_of_very_many_ranks_is_short(tmp_path, capsys):
    with unsynced():
        write_step(tmp_path, {"w": torch.zeros(100)}, {"w": (Part(Grid(Mesh((100,)), (0,))),)})
    told = printed(capsys, "show", tmp_path)
    assert told[-1].startswith("  … 100 ranks, 0.0041 to 0.0041 MB each")
    assert len(told) < 80


# ---------------------------------------------------------------- verify


def test_verify_of_a_sound_step(run, capsys):
    (line,) = printed(capsys, "verify", run)
    assert line.startswith("step_00000025: sound; 0.0")
    assert line.endswith("GB/s)")
    assert [line.split(";")[0] for line in printed(capsys, "verify", run, "--all")] == [f"step_{n:08d}: sound" for n in (10, 20, 25, 30)]


def test_verify_names_every_problem_and_exits_with_5(run, capsys):
    (run / "step_00000025/rank_00000.0.safetensors").unlink()
    (run / "step_00000025/stray\x1b[31m").write_text("")
    assert main(["verify", str(run)]) == 5
    told = capsys.readouterr()
    missing, stray = told.err.splitlines()
    assert missing == "step_00000025/rank_00000.0.safetensors (rank 0): is missing"
    assert stray == "step_00000025/stray\\x1b[31m: does not belong to this step: nothing refers to it"
    assert told.out.startswith("step_00000025: 2 problems; ")


def test_verify_all_goes_on_after_a_bad_step_and_sees_one_that_lost_its_manifest(run, capsys):
    (run / "step_00000010/rank_00000.index").write_bytes(b"")
    (run / "step_00000020/manifest").unlink()
    assert main(["verify", "--all", str(run)]) == 5
    told = capsys.readouterr()
    assert [line.split(";")[0] for line in told.out.splitlines()] == [
        "step_00000010: 3 problems",
        "step_00000020: 1 problem",
        "step_00000025: sound",
        "step_00000030: sound",
    ]
    assert "step_00000020/manifest: " in told.err


# ---------------------------------------------------------------- the command itself


def test_names_never_steer_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;title\x07\r\u202e\u2028\ud800"
    assert printable(evil).isprintable()
    assert printable("grün 重み") == "grün 重み"
    record = {**RECORD, "config": {"a": evil[:-1]}}
    write_step(tmp_path, {f"model.{evil[:-1]}": torch.zeros(1)}, record=record, engine=evil[:-1], metrics={evil[:-1]: 1.0}, monitor=evil[:-1])
    for command in (["ls"], ["show"], ["verify"]):
        out = "".join(printed(capsys, *command, tmp_path))
        assert all(c.isprintable() for c in out), command


def test_a_reader_that_stops_reading_is_no_error(run):
    code = f"import sys; from engine.cli import main; sys.exit(main(['show', {str(run)!r}]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_output_that_an_encoding_cannot_carry_is_escaped(run):
    code = f"import sys; from engine.cli import main; sys.exit(main(['ls', {str(run)!r}]))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0
    assert b"\\u2190 latest" in done.stdout


def test_the_bar_is_for_terminals_only(monkeypatch):
    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.text, self.isatty = "", lambda: terminal

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for terminal in (True, False):
        now[0] = 0.0
        stream = Stream(terminal)
        bar = Bar(200, stream)
        bar.add(50)
        now[0] = 2.0
        bar.add(50)
        assert ("50 %" in stream.text) == terminal
        assert bar.close() == 2.0
        assert bool(stream.text) == terminal


def test_tables_are_aligned_and_sizes_readable():
    assert table(["a", ">b"], [["x\ny", "1"], ["", "22"]]) == ["a      b", "x\\ny   1", "      22"]
    assert table(["a"], []) == ["a"]
    assert [megabytes(n) for n in (0, 1, 123_456, 12_345_678_900)] == ["0.0", "1e-06", "0.1", "12,345.7"]
