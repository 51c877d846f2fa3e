import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import UsageError
from recipes.lib.indextts import PRESETS, IndexTTS, tokens
from recipes.lib.pairs import Pairs

pytestmark = pytest.mark.timeout(30)
TINY = PRESETS["tiny"]
WORDS = ["ሰኞ", "ማክሰኞ", "ኢትዮጵያ"]


def record(word: str, folder: Path) -> dict[str, Any]:
    """Writes the word's arrays: its bytes, shifted, are text ids, and its characters give codes."""
    (folder / "arrays").mkdir(exist_ok=True)
    ids = np.frombuffer(word.encode(), dtype=np.uint8).astype(np.int32) + 300
    codes = np.array([ord(c) % 64 for c in word], dtype=np.int32)
    condition = np.outer(np.arange(32), np.arange(64)).astype(np.float32) / len(word)
    arrays = {"target_text_ids": ids, "target_codes": codes, "prompt_condition": condition, "prompt_emo_vec": condition[1]}
    for name, array in arrays.items():
        np.save(folder / "arrays" / f"{word}_{name}.npy", array)
    paths = {f"{name}_path": f"arrays/{word}_{name}.npy" for name in arrays}
    return {"id": word, **paths, "target_text_len": len(ids), "target_code_len": len(codes), "target_text": word}


def manifest_of(folder: Path, *lines: str | dict[str, Any]) -> Path:
    manifest = folder / "pairs.jsonl"
    manifest.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    return manifest


@pytest.fixture
def records(tmp_path) -> list[dict[str, Any]]:
    return [record(word, tmp_path) for word in WORDS]


def test_pairs_are_read_as_written(tmp_path, records):
    pairs = Pairs(manifest_of(tmp_path, records[0], "", *records[1:]), TINY)
    assert len(pairs) == 3
    for word, pair in zip(WORDS, [pairs[0], pairs[1], pairs[2]], strict=True):
        assert bytes(pair["text_ids"] - 300).decode() == word
        assert pair["codes"].tolist() == [ord(c) % 64 for c in word]
        assert pair["codes"].dtype == pair["text_ids"].dtype == torch.int64
        assert pair["conditions"].shape == (32, 64)
        assert torch.equal(pair["conditions"][1], pair["emo"])


def test_the_prompts_emotion_goes_before_the_targets(tmp_path, records):
    np.save(tmp_path / "other.npy", np.ones(64, np.float32))
    both = records[0] | {"target_emo_vec_path": "other.npy"}
    target = records[1] | {"target_emo_vec_path": "other.npy", "prompt_emo_vec_path": ""}
    pairs = Pairs(manifest_of(tmp_path, both, target), TINY)
    assert not torch.equal(pairs[0]["emo"], torch.ones(64))
    assert torch.equal(pairs[1]["emo"], torch.ones(64))


def test_batches_are_padded_on_the_right_and_the_model_takes_them(tmp_path, records):
    pairs = Pairs(manifest_of(tmp_path, *records), TINY)
    batch = pairs.collate([pairs[i] for i in range(3)])
    lengths = [len(word.encode()) for word in WORDS]
    assert batch["text_len"].tolist() == lengths
    assert batch["text_ids"].shape == (3, max(lengths))
    assert not batch["text_ids"][0, lengths[0] :].any()
    assert batch["codes"].shape == (3, 5)
    assert batch["conditions"].shape == (3, 32, 64)
    torch.manual_seed(0)
    network = IndexTTS(TINY)
    with torch.no_grad():
        sums = network(batch)
        torch.testing.assert_close(sum(network(pairs.collate([pair])) for pair in pairs), sums)
    assert tokens(batch).tolist() == [sum(lengths) + 3, sum(map(len, WORDS)) + 3]


def test_a_batch_without_pairs_has_no_tokens(tmp_path, records):
    pairs = Pairs(manifest_of(tmp_path, *records), TINY)
    empty = pairs.collate([])
    assert empty.keys() == pairs.collate([pairs[0]]).keys()
    assert tokens(empty).tolist() == [0, 0]
    assert IndexTTS(TINY)(empty).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": None}, r"Expected `str`, got `null` - at `\$\.id`"),
        ({"target_codes_path": ""}, r"length >= 1 - at `\$\.target_codes_path`"),
        ({"target_text_len": "6"}, r"Expected `int`, got `str` - at `\$\.target_text_len`"),
        ({"target_text_len": True}, r"Expected `int`, got `bool`"),
        ({"target_code_len": 0}, r">= 1 - at `\$\.target_code_len`"),
        ({"target_text_len": 65}, "target_text_len is 65; the model has positions for 64"),
        ({"target_code_len": 129}, "target_code_len is 129; the model has positions for 128"),
        ({"target_text_len": 5}, r"target_text_ids_path: .*_ids\.npy holds int32 \[6\]; .* must be int32 \[5\]"),
        ({"prompt_emo_vec_path": None}, "prompt_emo_vec_path or target_emo_vec_path must name"),
        ({"prompt_emo_vec_path": None, "target_emo_vec_path": "absent.npy"}, r"target_emo_vec_path: .*absent\.npy cannot be read"),
        ({"prompt_condition_path": "pairs.jsonl"}, r"prompt_condition_path: .*pairs\.jsonl cannot be read as an \.npy file"),
        ({"prompt_condition_path": "."}, "prompt_condition_path: .* cannot be read as an"),
    ],
)
def test_a_wrong_line_is_refused_by_number_and_field(tmp_path, records, changes, said):
    manifest = manifest_of(tmp_path, records[1], "", records[0] | changes, records[2])
    with pytest.raises(UsageError, match=rf"pairs\.jsonl, line 3: .*{said}"):
        Pairs(manifest, TINY)


@pytest.mark.parametrize("line", ["{", "[]", '"text"', '{"id": "a"}', "\x00", '{"id": "\\ud800"}'])
def test_a_line_that_is_no_pair_is_refused(tmp_path, records, line):
    with pytest.raises(UsageError, match=r"pairs\.jsonl, line 2: "):
        Pairs(manifest_of(tmp_path, records[0], line), TINY)


@pytest.mark.parametrize(
    "missing", ["id", "target_text_ids_path", "target_codes_path", "prompt_condition_path", "target_text_len", "target_code_len"]
)
def test_a_missing_key_is_named(tmp_path, records, missing):
    del records[2][missing]
    with pytest.raises(UsageError, match=rf"line 3: .*missing required field `{missing}`"):
        Pairs(manifest_of(tmp_path, *records), TINY)


@pytest.mark.parametrize(
    ("field", "array", "said"),
    [
        ("prompt_condition_path", np.zeros((32, 63), np.float32), r"float32 \[32, 63\]; .* must be float32 \[32, 64\]"),
        ("prompt_condition_path", np.zeros((32, 64)), r"float64 \[32, 64\]"),
        ("prompt_emo_vec_path", np.zeros((1, 64), np.float32), r"float32 \[1, 64\]; .* must be float32 \[64\]"),
        ("target_text_ids_path", np.zeros(6, np.int64), r"int64 \[6\]; .* must be int32 \[6\]"),
        ("target_text_ids_path", np.array([0, 1, 2, 3, 4, 600], np.int32), "ids 0 to 600; the model knows 0 to 599"),
        ("target_text_ids_path", np.array([0, 1, 2, 3, 4, -1], np.int32), "ids -1 to 4"),
        ("target_codes_path", np.array([3, 64], np.int32), "ids 3 to 64; the model knows 0 to 63"),
        ("target_codes_path", np.array(["a", {}], dtype=object), "cannot be read"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path, records, field, array, said):
    np.save(tmp_path / records[0][field], array)
    with pytest.raises(UsageError, match=rf"line 1: {field}: .*{said}"):
        Pairs(manifest_of(tmp_path, *records), TINY)


def test_a_file_cut_short_is_refused(tmp_path, records):
    path = tmp_path / records[0]["prompt_condition_path"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"line 1: prompt_condition_path: .* cannot be read"):
        Pairs(manifest_of(tmp_path, *records), TINY)


@pytest.mark.parametrize("lines", [(), ("", " ")])
def test_a_manifest_without_pairs_is_refused(tmp_path, lines):
    with pytest.raises(UsageError, match=r"pairs\.jsonl: no pairs in it"):
        Pairs(manifest_of(tmp_path, *lines), TINY)


def test_an_absent_manifest_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.jsonl: the manifest cannot be read"):
        Pairs(tmp_path / "absent.jsonl", TINY)
