"""The tools around recipes/indextts_amharic.py, on data that they have made themselves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Progress
from engine.errors import UsageError
from recipes import check_amharic_data, prepare_amharic, verify_amharic_training
from recipes.lib import amharic
from recipes.lib.indextts import PRESETS, IndexTTS
from recipes.lib.pairs import Pairs
from tests.now import Checkpointer

pytestmark = pytest.mark.timeout(60)
RECIPES = Path(prepare_amharic.__file__).parent
USAGE = UsageError.exit_code


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Nobody writes to it."""
    folder = tmp_path_factory.mktemp("prepared") / "amharic"
    assert prepare_amharic.main(["--output-dir", str(folder), "--max-samples", "40"]) == 0
    return folder


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def tool(capsys) -> Callable[..., tuple[int, str, str]]:
    """A tool's ``main``: its exit code, what it told, and its error, which is one line."""

    def start(main, *argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        told = capsys.readouterr()
        assert told.err.count("\n") == (code != 0)
        return code, told.out, told.err

    return start


@pytest.fixture
def check(tool, data):
    return lambda: tool(check_amharic_data.main, "--train-manifest", data / "train_manifest.jsonl", "--train-pairs", data / "train_pairs.jsonl")


@pytest.fixture
def verify(tool, data):
    model = data / "tokenizers/amharic_extended_bpe.model"
    return lambda *argv: tool(verify_amharic_training.main, "--tokenizer", model, "--base-vocab-size", 300, *argv)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def edit(path: Path, number: int, **changes: object) -> None:
    """Of a manifest's line: a value of None takes the key out."""
    entries = lines(path)
    for entry in entries if number == 0 else [entries[number - 1]]:
        entry.update(changes)
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


# Text and audio.


def test_there_are_thousands_of_distinct_amharic_texts():
    texts = amharic.texts()
    assert amharic.texts() == texts
    assert 2000 < len(texts) == len(set(texts))
    assert texts == sorted(texts)
    assert {"ሰኞ", "ኢትዮጵያ", "አማርኛ"} <= set(texts)
    assert all(text == " ".join(text.split()) and "{" not in text and amharic.ethiopic_share(text) > 0.5 for text in texts)


@pytest.mark.parametrize(("text", "share"), [("ሰላም", 1), ("ሰላም 12, 3!", 1), ("ሰላ ab", 0.5), ("hello", 0), ("", 0), ("12", 0), ("ⶀꬁ", 1)])
def test_the_share_of_ethiopic_counts_letters(text, share):
    assert amharic.ethiopic_share(text) == share


def test_audio_is_a_function_of_the_text():
    codes = amharic.codes("ሰላም", 8192)
    assert codes.dtype == np.int32
    assert codes.tolist() == [1901, 4239, 3718, 2847, 4884, 7478]  # as on any machine
    assert amharic.codes("ምሰ", 8192).tolist() == [*codes[4:], *codes[:2]]
    near, far = (amharic.condition("almaz", "ሰላም", 32, 64) - amharic.condition(other, "ቡና", 32, 64) for other in ("almaz", "abebe"))
    assert near.shape == (32, 64)
    assert near.dtype == amharic.emotion("ሰላም", 64).dtype == np.float32
    assert np.abs(near).mean() < np.abs(far).mean()


# Preparation.


def test_a_second_run_writes_the_same_bytes(prepared, data):
    assert prepare_amharic.main(["--output-dir", str(data), "--max-samples", "40"]) == 0
    assert tree(data) == tree(prepared)


def test_another_process_with_other_hashes_writes_the_same_bytes(prepared, tmp_path):
    command = [sys.executable, str(RECIPES / "prepare_amharic.py"), "--output-dir", str(tmp_path / "again"), "--max-samples", "40"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert tree(tmp_path / "again") == tree(prepared)


def test_the_recipe_reads_what_was_prepared(prepared):
    train, val = (Pairs(prepared / f"{split}_pairs.jsonl", PRESETS["tiny"]) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    first = lines(prepared / "train_manifest.jsonl")[0]
    assert train[0]["codes"].tolist() == amharic.codes(first["text"], 64).tolist()


def test_training_and_validation_share_no_text_and_all_speakers(prepared):
    train, val = (lines(prepared / f"{split}_manifest.jsonl") for split in ("train", "val"))
    assert not {entry["text"] for entry in train} & {entry["text"] for entry in val}
    assert {entry["speaker"] for entry in train} == {entry["speaker"] for entry in val} == set(amharic.SPEAKERS)


def test_a_prompt_is_another_utterance_of_the_same_speaker(prepared):
    speakers = {entry["id"]: entry["speaker"] for entry in lines(prepared / "train_manifest.jsonl")}
    for pair in lines(prepared / "train_pairs.jsonl"):
        prompt, target = pair["id"].split("__")
        assert prompt != target
        assert speakers[prompt] == speakers[target]
        assert prompt in pair["prompt_condition_path"]
        assert target in pair["target_codes_path"]


def test_another_seed_takes_other_texts(prepared, tmp_path):
    assert prepare_amharic.main(["--output-dir", str(tmp_path), "--max-samples", "40", "--seed", "1"]) == 0
    assert lines(tmp_path / "train_manifest.jsonl") != lines(prepared / "train_manifest.jsonl")


def test_texts_without_positions_in_the_network_are_left_out(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], mel_positions=22))
    assert tool(prepare_amharic.main, "--output-dir", tmp_path)[0] == 0
    assert max(entry["target_code_len"] for entry in lines(tmp_path / "train_pairs.jsonl")) == 20


def test_too_little_text_for_the_full_vocabulary_is_told_with_the_largest(tool, tmp_path):
    code, _, error = tool(prepare_amharic.main, "--output-dir", tmp_path / "full", "--preset", "full")
    assert code == USAGE
    assert "an extension of 12000 to 24000 pieces" in error
    assert "the largest possible size is 2" in error
    assert "--vocab-size" in error
    assert not (tmp_path / "full").exists()
    sizes = ("--base-vocab-size", 12000, "--vocab-size", 20000, "--max-samples", 8)
    assert tool(prepare_amharic.main, "--output-dir", tmp_path / "full", "--preset", "full", *sizes)[0] == 0
    assert len(Pairs(tmp_path / "full/train_pairs.jsonl", PRESETS["full"])) == 7


def test_given_tokenizers_are_used(tool, data, tmp_path):
    base, extended = data / "tokenizers/base_bpe.model", data / "tokenizers/amharic_extended_bpe.model"
    into = ("--output-dir", tmp_path / "other", "--max-samples", 4)
    assert tool(prepare_amharic.main, *into, "--tokenizer", extended, "--base-tokenizer", base)[0] == 0
    assert tree(tmp_path / "other/tokenizers") == tree(data / "tokenizers")
    code, _, error = tool(prepare_amharic.main, *into, "--tokenizer", base, "--base-tokenizer", extended)
    assert code == USAGE
    assert "does not extend its base" in error


@pytest.mark.parametrize("flags", [["--max-samples", "1"], ["--tokenizer", __file__], ["--output-dir", __file__], ["--vocab-size", "350"]])
def test_what_cannot_be_prepared_is_told(tool, tmp_path, flags):
    code, _, error = tool(prepare_amharic.main, "--output-dir", tmp_path / "out", *flags)
    assert code != 0
    assert flags[1] in error


# The check of the data.


def test_sound_data_pass(check):
    code, told, _ = check()
    assert code == 0
    assert "✅ Dataset is primarily Amharic\n" in told
    assert "✅ Good speaker diversity\n" in told
    assert "36 utterances" in told
    assert "36 pairs" in told


def test_mixed_languages_are_told(check, data):
    for number in range(3, 9):
        edit(data / "train_manifest.jsonl", number, text="a text in English")
    code, told, error = check()
    assert code == USAGE
    assert "primarily Amharic" not in told
    assert "train_manifest.jsonl, line 8: text: 0% of its letters are Ethiopic" in told
    assert "mixed languages: field text is mostly Ethiopic in 30 of 36 lines, expected 90%; the first in another script is line 3" in error


def test_a_few_foreign_texts_pass(check, data):
    edit(data / "train_manifest.jsonl", 3, text="OK")
    assert check()[0] == 0


def test_too_few_speakers_are_told(check, data):
    manifest = data / "train_manifest.jsonl"
    edit(manifest, 0, speaker="almaz")
    for speakers in (["abebe"], ["abebe", "kebede"]):
        for number, speaker in enumerate(speakers, 1):
            edit(manifest, number, speaker=speaker)
        code, told, error = check()
        assert code == USAGE
        assert "Good speaker diversity" not in told
    assert "train_manifest.jsonl: speaker almaz has 34 of 36 lines, expected at most 80%" in error


def test_two_speakers_are_too_few(check, data):
    edit(data / "train_manifest.jsonl", 0, speaker="almaz")
    edit(data / "train_manifest.jsonl", 1, speaker="abebe")
    assert "too few speakers: field speaker has 2 values, expected at least 3" in check()[2]


@pytest.mark.parametrize("name", ["train_manifest.jsonl", "train_pairs.jsonl"])
@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_an_empty_or_missing_manifest_is_told(check, data, name, content):
    (data / name).unlink()
    if content is not None:
        (data / name).write_text(content)
    code, told, error = check()
    assert code == USAGE
    assert f"{name}: the manifest {'cannot be read' if content is None else 'is empty'}" in error
    assert "✅" not in told


@pytest.mark.parametrize("key", ["id", "text", "speaker"])
def test_a_missing_key_of_an_utterance_is_told(check, data, key):
    edit(data / "train_manifest.jsonl", 2, **{key: None})
    code, _, error = check()
    assert code == USAGE
    assert "train_manifest.jsonl, line 2: " in error
    assert f"`{key}`" in error


@pytest.mark.parametrize(
    "key", ["id", "prompt_condition_path", "prompt_emo_vec_path", "target_text_ids_path", "target_codes_path", "target_text_len", "target_code_len"]
)
def test_a_missing_key_of_a_pair_is_told(check, data, key):
    edit(data / "train_pairs.jsonl", 36, **{key: None})
    code, _, error = check()
    assert code == USAGE
    assert "train_pairs.jsonl, line 36: " in error
    assert key in error


@pytest.mark.parametrize("change", [{"id": 7}, {"target_code_len": 0}, {"target_text_len": "12"}])
def test_a_wrong_value_is_told(check, data, change):
    edit(data / "train_pairs.jsonl", 5, **change)
    assert f"train_pairs.jsonl, line 5: Expected `{'str' if 'id' in change else 'int'}`" in check()[2]


def test_a_line_that_is_no_json_and_an_id_twice_are_told(check, data):
    path = data / "train_pairs.jsonl"
    edit(path, 3, id=lines(path)[1]["id"])
    path.write_text(path.read_text() + "\n{no json\n")
    code, told, error = check()
    assert code == USAGE
    assert "train_pairs.jsonl, line 38: JSON is malformed" in told
    assert "is that of line 2 too" in told
    assert "2 problems, the first: " in error


ARRAYS = [
    ("target_codes_path", lambda array: array.astype(np.int64), "holds int64 ["),
    ("target_codes_path", lambda array: array[:-1], "expected int32 ["),
    ("target_codes_path", lambda array: array * 0 + 8192, "has ids 8192 to 8192, expected 0 to 8191"),
    ("target_text_ids_path", lambda array: array[None], "expected int32 ["),
    ("target_text_ids_path", lambda array: -array, "has ids -"),
    ("prompt_condition_path", lambda array: array.astype(np.float64), "holds float64 [32, 64], expected float32 [32, "),
    ("prompt_condition_path", lambda array: array[1:], "holds float32 [31, 64], expected float32 [32, "),
    ("prompt_condition_path", lambda array: array * np.nan, "holds values that are not finite"),
    ("prompt_emo_vec_path", lambda array: array[:-1], "holds float32 [63], expected float32 [64]"),
    ("prompt_emo_vec_path", lambda array: np.array(["text"], dtype=object), "cannot be read as an .npy file"),
]


@pytest.mark.parametrize(("field", "damage", "message"), ARRAYS, ids=[f"{field}-{i}" for i, (field, _, _) in enumerate(ARRAYS)])
def test_a_wrong_array_is_told_with_line_and_field(check, data, field, damage, message):
    path = data / lines(data / "train_pairs.jsonl")[6][field]
    np.save(path, damage(np.load(path)), allow_pickle=True)
    code, told, _ = check()
    assert code == USAGE
    told = next(line for line in told.splitlines() if f"train_pairs.jsonl, line 7: {field}: {path}" in line)
    assert message in told


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-4])])
def test_a_missing_empty_or_cut_file_is_told(check, data, damage):
    damage(data / lines(data / "train_manifest.jsonl")[8]["codes_path"])
    code, told, _ = check()
    assert code == USAGE
    assert "train_manifest.jsonl, line 9: codes_path: " in told
    assert "train_pairs.jsonl, line 9: target_codes_path: " in told


# The check of tokenizer and model.


def test_a_sound_tokenizer_passes(verify, data):
    code, told, _ = verify("--base-tokenizer", data / "tokenizers/base_bpe.model", "--train-pairs", data / "train_pairs.jsonl")
    assert code == 0
    assert {"✓ Vocabulary size: 600", "✓ Uses extended vocabulary (ID >= 300)"} < set(told.splitlines())
    assert told.splitlines()[-1] == "✅ All checks passed!"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-vocab-size", 600], "600 pieces, expected more than the base's 600"),
        (["--base-vocab-size", 599], "Amharic texts have no ID >= 599"),
        (["--tokenizer", __file__], "is no sentencepiece model"),
        (["--tokenizer", "base_bpe", "--base-vocab-size", 200], "Amharic texts have no ID >= 200"),
        (["--tokenizer", "base_bpe", "--base-vocab-size", 2], "Amharic texts do not come back from it"),
        (["--base-tokenizer", "extended"], "it has 600 pieces, --base-vocab-size says 300"),
        (["--train-pairs", "nowhere.jsonl"], "nowhere.jsonl: the manifest cannot be read"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth: cannot be read"),
    ],
)
def test_what_does_not_hold_is_told(verify, data, flags, message):
    named = {"base_bpe": data / "tokenizers/base_bpe.model", "extended": data / "tokenizers/amharic_extended_bpe.model"}
    code, told, error = verify(*(named.get(flag, flag) for flag in flags))
    assert code == USAGE
    assert message in error
    assert "All checks passed" not in told


def test_a_moved_piece_is_told(verify, data, tmp_path):
    assert prepare_amharic.main(["--output-dir", str(tmp_path / "other"), "--max-samples", "2", "--base-vocab-size", "299"]) == 0
    other = tmp_path / "other/tokenizers/amharic_extended_bpe.model"
    code, _, error = verify("--tokenizer", other, "--base-tokenizer", data / "tokenizers/base_bpe.model")
    assert code == USAGE
    assert "the tokenizer does not extend its base: id " in error


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 600], "expected int32 [text_len] from 2 to 599"),
        ([1, 5], "0 and 1 are the model's start and stop"),
        ([], "text ids are int32 [0], expected"),
    ],
)
def test_text_ids_of_another_tokenizer_are_told(verify, data, ids, message):
    np.save(data / lines(data / "train_pairs.jsonl")[3]["target_text_ids_path"], np.array(ids, dtype=np.int32))
    code, _, error = verify("--train-pairs", data / "train_pairs.jsonl")
    assert code == USAGE
    assert "train_pairs.jsonl, line 4: target_text_ids_path: " in error
    assert message in error


def test_pairs_without_new_pieces_are_told(verify, data):
    for path in data.glob("features/train_*_text_ids.npy"):
        np.save(path, np.load(path) % 100 + 100)
    assert "36 pairs, none with ID >= 300, 0% of the letters Ethiopic" in verify("--train-pairs", data / "train_pairs.jsonl")[2]


def test_a_checkpoint_must_have_a_row_for_each_piece_and_one_more(verify, tmp_path):
    for size in (600, 599):
        model = IndexTTS(replace(PRESETS["tiny"], text_vocab=size))
        Checkpointer(tmp_path / f"run_{size}", model).save(Progress(step=1))
        torch.save({"model": model.state_dict()}, tmp_path / f"gpt_{size}.pth")
        for what in (f"run_{size}", f"run_{size}/step_00000001", f"gpt_{size}.pth"):
            code, told, error = verify("--checkpoint", tmp_path / what)
            if size == 600:
                assert code == 0, error
                assert "✓ Checkpoint's text tables have 600 + 1 rows" in told
            else:
                assert code == USAGE
                assert "text_embedding.weight is [600, 64], expected 601 rows" in error


def test_a_model_without_text_tables_and_an_empty_folder_are_told(verify, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "text_embedding.weight is missing" in verify("--checkpoint", tmp_path / "other.pth")[2]
    assert verify("--checkpoint", tmp_path)[0] == 4


# The starter.


def smart_train(cwd: Path, child: str, *argv: object) -> subprocess.CompletedProcess[str]:
    recipe = cwd / "child.py"
    recipe.write_text(child)
    command = [sys.executable, str(RECIPES / "smart_train_amharic.py"), "--recipe", str(recipe), *map(str, argv)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # what it tells must come before the child
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=50)


SAYS = "import sys; print('child', *sys.argv[1:])\n"
FRESH = "--output-dir trained_ckpts_fixed --learning-rate 5e-6 --text-loss-weight 0.4 --mel-loss-weight 0.6 --warmup-steps 2000 --amp"
ELSEWHERE = (
    "--train-manifest preprocessed_amharic/train_pairs.jsonl --val-manifest preprocessed_amharic/val_pairs.jsonl "
    "--tokenizer tokenizers/amharic_extended_bpe.model "
)


def test_data_that_are_elsewhere_are_found(tmp_path):
    (tmp_path / "preprocessed_amharic").mkdir()
    (tmp_path / "preprocessed_amharic/train_pairs.jsonl").touch()
    assert smart_train(tmp_path, SAYS).stdout.splitlines()[-1] == f"child {ELSEWHERE}{FRESH}"


def test_without_a_checkpoint_training_starts_afresh(tmp_path):
    (tmp_path / "trained_ckpts_fixed/step_00000009").mkdir(parents=True)  # none: it has no manifest
    ended = smart_train(tmp_path, SAYS)
    assert ended.returncode == 0, ended.stderr
    command = f"Command: {sys.executable} {tmp_path}/child.py {FRESH}"
    assert ended.stdout.splitlines() == ["🆕 No checkpoint found", "🚀 Starting fresh training...", "", command, "", f"child {FRESH}"]


def test_with_a_checkpoint_training_goes_on(tmp_path):
    for step in (7, 12):
        Checkpointer(tmp_path / "run", torch.nn.Linear(1, 1)).save(Progress(step=step))
    ended = smart_train(tmp_path, SAYS, "--output-dir", "run", "--", "--batch-size", "2", "--engine", "a b")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[:2] == ["✅ Found checkpoint: run/step_00000012", "📝 Resuming training..."]
    assert ended.stdout.splitlines()[-1].endswith("--warmup-steps 2000 --amp --resume auto --batch-size 2 --engine a b")
    assert "--engine 'a b'" in ended.stdout


@pytest.mark.parametrize(
    ("child", "code"), [("raise SystemExit(6)", 6), ("1 / 0", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM)]
)
def test_it_ends_as_the_child_does(tmp_path, child, code):
    ended = smart_train(tmp_path, child)
    assert ended.returncode == code


def test_the_recipe_knows_the_flags(tmp_path):
    """The real one, which has no data here."""
    command = [sys.executable, str(RECIPES / "smart_train_amharic.py"), "--", "--preset", "tiny", "--engine", "ddp"]
    ended = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert ended.returncode == USAGE
    assert "amharic_extended_bpe.model: there is no such file" in ended.stderr


@pytest.mark.parametrize("flags", [["--epochs", "2"], ["--", "--output-dir=other"]])
def test_a_flag_on_the_wrong_side_is_told(tmp_path, flags):
    ended = smart_train(tmp_path, SAYS, *flags)
    assert ended.returncode == USAGE
    assert ended.stderr.startswith("smart_train_amharic: ")
    assert "child" not in ended.stdout
    assert "--recipe" not in smart_train(tmp_path, SAYS, "--help").stdout
