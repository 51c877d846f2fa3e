from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import UsageError
from recipes import causvid
from recipes.lib.arguments import read_yaml, scientific
from recipes.lib.start import what_to_resume

pytestmark = pytest.mark.timeout(30)


class Silent:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def read(*argv: str) -> SimpleNamespace:
    journal = Silent()
    tokens, start = causvid.read_arguments(argv, journal)
    return SimpleNamespace(args=causvid.make_parser().parse_args(tokens), start=start, lines=journal.lines)


def test_the_documents_command_line_is_accepted(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    monkeypatch.setenv("SLURM_JOB_ID", "333")
    argv = (
        f"--config_path {config} --data_path /d/sketch_captions_quickdraw.txt --batch_size 1 --lr 1e-5 "
        "--num_epochs 100 --dataset_repeat 1 --dfake_gen_update_ratio 5 --log_iters 200 "
        "--experiment_name causvid_distillation"
    )
    run_dir = read(*argv.split()).start.run_dir
    name = "causvid_distillation_realLora32-fakeLora32_lr1e-5_ep100_bs1_ratio5_sketch_captions_slurm333"
    assert run_dir == Path.cwd() / "runs" / name


def test_the_name_tells_what_differs(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    argv = "--experiment_name x --experiment_dir /e --lr 0.00025 --dataset_repeat 3 --real_lora_rank 0 --fake_lora_rank 8"
    expected = "/e/x_realLora0-fakeLora8_lr2.5e-4_ep2_bs8_ratio5_glyphs_repeat3"
    assert read(*argv.split()).start.run_dir == Path(expected)
    name = read("--experiment_name", "x", "--data_path", "cats.txt").start.run_dir.name
    assert name == "x_realLora32-fakeLora32_lr1e-4_ep2_bs8_ratio5_cats"
    assert read("--experiment_dir", "/e").start.run_dir == Path("/e")
    assert read().start.run_dir == Path.cwd() / "runs/causvid"


@pytest.mark.parametrize(("number", "text"), [(1e-5, "1e-5"), (5e-7, "5e-7"), (2.5e-4, "2.5e-4"), (1.0, "1e0"), (30, "3e1")])
def test_numbers_are_written_as_people_do(number, text):
    assert scientific(number) == text


def test_every_flag_takes_hyphens_and_none_an_abbreviation():
    assert read("--batch-size", "3", "--num-epochs=7").args.batch_size == 3
    for action in causvid.make_parser()._actions:
        assert {o.replace("-", "_") for o in action.option_strings if o.startswith("--")} == {
            o.replace("-", "_") for o in action.option_strings if o != "-h"
        }
        assert {f"--{action.dest}", f"--{action.dest}".replace("_", "-")} <= {"--" + o[2:] for o in action.option_strings}
    with pytest.raises(UsageError, match="--see"):
        read("--see", "3")


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-5\nbatch_size: 2\nno_save: true\nsave_interval: null\nmodel_name: wan\n")
    found = read("--config_path", str(path), "--batch_size", "4")
    assert found.args.lr == 1e-5
    assert found.args.batch_size == 4
    assert found.args.no_save
    assert found.args.save_interval is None
    assert [line for line in found.lines if "model_name" in line] == [f"{path}: model_name is no setting of this recipe and has no effect"]


@pytest.mark.parametrize("content", ["- a\n", "a: [\n", None])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize("argv", [["--batch_size", "0"], ["--real_lora_rank", "-1"], ["--engine", "zero9"]])
def test_values_out_of_range_are_refused(argv):
    with pytest.raises(UsageError, match=f"argument {argv[0]}.*--help"):
        read(*argv)


def test_a_bad_value_in_the_file_is_refused_as_on_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 0\n")
    with pytest.raises(UsageError, match=r"--batch_size.*0 is not at least 1"):
        read("--config_path", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "latest", "--resume_epoch", "3"], "--resume and --resume_epoch both say which checkpoint"),
        (["--resume", "auto", "--resume_from", "/e"], "--resume auto says where to look, and so does --resume_from"),
        (["--resume", "/e/step_00000001", "--resume_from", "/e"], "so does --resume_from"),
        (["--keep_best", "2"], "--keep_best has no effect without --keep_last"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(argv, message):
    with pytest.raises(UsageError, match=message):
        read(*argv)


@pytest.mark.parametrize(
    ("argv", "folder", "what"),
    [
        ([], "own", ""),
        (["--resume", "latest"], "own", "latest"),
        (["--resume", "auto"], "own", "auto"),
        (["--resume", "best", "--resume_from", "d"], "d", "best"),
        (["--resume_from", "d"], "d", "latest"),
        (["--resume_from", "d", "--resume_epoch", "50"], "d", "epoch:50"),
        (["--resume_epoch", "50"], "own", "epoch:50"),
        (["--resume", "/e/step_00000001"], "/e", "/e/step_00000001"),
    ],
)
def test_what_is_resumed_from_where(argv, folder, what):
    assert what_to_resume(causvid.make_parser().parse_args(argv), Path("own")) == (Path(folder), what)


def test_the_files_base_name_is_cut_to_fifteen_characters(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for path, part in (("/a/b.c/quickdraw_captions_v2.txt", "quickdraw_capti"), ("fifteen_letters", "fifteen_letters"), ("x.txt", "x")):
        assert causvid.experiment_name(read("--experiment_name", "e", "--data_path", path).args).endswith(f"_ratio5_{part}")


@pytest.mark.parametrize(
    ("flags", "step", "epoch", "ends", "due"),
    [
        ([], 10, 1, True, True),
        ([], 10, 0, False, False),
        (["--save_interval", "5"], 10, 0, False, True),
        (["--save_interval", "4"], 10, 0, False, False),
        (["--epoch_save_interval", "2"], 10, 1, True, False),
        (["--epoch_save_interval", "2", "--num_epochs", "5"], 10, 4, True, True),
        (["--epoch_save_interval", "2", "--num_epochs", "5"], 10, 5, True, True),
        (["--no_save", "--save_interval", "5"], 10, 1, True, False),
    ],
)
def test_when_a_checkpoint_is_due(flags, step, epoch, ends, due):
    progress = causvid.Progress(step=step, epoch=epoch)
    assert causvid.save_is_due(read(*flags).args, progress, ends_epoch=ends) is due
