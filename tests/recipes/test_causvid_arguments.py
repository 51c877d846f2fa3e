from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import causvid
from recipes.lib.arguments import UsageError, read_yaml, scientific

pytestmark = pytest.mark.timeout(30)


class Silent:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def read(*argv: str) -> SimpleNamespace:
    journal = Silent()
    args, start = causvid.read_arguments(argv, journal)
    return SimpleNamespace(args=args, start=start, lines=journal.lines)


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
    assert run_dir == Path("runs") / name


def test_the_name_tells_what_differs(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    argv = "--experiment_name x --experiment_dir /e --lr 0.00025 --dataset_repeat 3 --real_lora_rank 0 --fake_lora_rank 8"
    expected = "/e/x_realLora0-fakeLora8_lr2.5e-4_ep2_bs8_ratio5_glyphs_repeat3"
    assert read(*argv.split()).start.run_dir == Path(expected)
    name = read("--experiment_name", "x", "--data_path", "cats.txt").start.run_dir.name
    assert name == "x_realLora32-fakeLora32_lr1e-4_ep2_bs8_ratio5_cats"
    assert read("--experiment_dir", "/e").start.run_dir == Path("/e")
    assert read().start.run_dir == Path("runs/causvid")


@pytest.mark.parametrize(("number", "text"), [(1e-5, "1e-5"), (5e-7, "5e-7"), (2.5e-4, "2.5e-4"), (1.0, "1e0"), (30, "3e1")])
def test_numbers_are_written_as_people_do(number, text):
    assert scientific(number) == text


def test_every_flag_takes_hyphens_and_none_an_abbreviation(capsys):
    assert read("--batch-size", "3", "--num-epochs=7").args.batch_size == 3
    for action in causvid.make_parser()._actions:
        assert {o.replace("-", "_") for o in action.option_strings if o.startswith("--")} == {
            o.replace("-", "_") for o in action.option_strings if o != "-h"
        }
        assert {f"--{action.dest}", f"--{action.dest}".replace("_", "-")} <= {"--" + o[2:] for o in action.option_strings}
    with pytest.raises(SystemExit):
        read("--see", "3")
    capsys.readouterr()


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
def test_values_out_of_range_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        read(*argv)
    assert argv[0] in capsys.readouterr().err


def test_resume_is_said_in_one_way():
    with pytest.raises(UsageError, match="either it or"):
        read("--resume", "latest", "--resume_epoch", "3")


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
