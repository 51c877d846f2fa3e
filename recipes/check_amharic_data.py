"""Check prepared data before training: every line of the manifests and every file they name, the language, the speakers.

    python recipes/check_amharic_data.py --train-manifest DIR/train_manifest.jsonl --train-pairs DIR/train_pairs.jsonl

Language is told by script: text in Tigrinya passes for Amharic.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started by its path

from engine.errors import EngineError, UsageError  # noqa: E402
from recipes.lib.amharic import Utterance, ethiopic_share  # noqa: E402
from recipes.lib.arguments import RecipeParser  # noqa: E402
from recipes.lib.indextts import PRESETS  # noqa: E402
from recipes.lib.pairs import Pair  # noqa: E402

PRIMARILY = 0.9  # of the texts must be in Amharic: over half of their letters Ethiopic
MIN_SPEAKERS = 3
LARGEST_SHARE = 0.8  # of the utterances that one speaker may have
SHOWN = 20  # problems, and texts in other languages
FULL = PRESETS["full"]  # no model has more audio codes
Entry = TypeVar("Entry", Utterance, Pair)


class Report:
    """Collects what is wrong, to tell it all."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def add(self, manifest: Path, number: int, problem: object) -> None:
        self.problems.append(f"{manifest}, line {number}: {problem}")

    def entries(self, manifest: Path, kind: type[Entry]) -> list[tuple[int, Entry]]:
        """The sound lines with their numbers, from 1. Raises :class:`UsageError` where there is nothing to read."""
        try:
            lines = [(number, line) for number, line in enumerate(manifest.read_bytes().split(b"\n"), 1) if line.strip()]
        except OSError as e:
            raise UsageError(f"{manifest}: the manifest cannot be read: {e}") from e
        if not lines:
            raise UsageError(f"{manifest}: the manifest is empty; expected one JSON object a line")
        found: list[tuple[int, Entry]] = []
        seen: dict[str, int] = {}
        for number, line in lines:
            try:
                entry = msgspec.json.decode(line, type=kind)
            except ValueError as e:  # msgspec's, and of bytes that are no UTF-8
                self.add(manifest, number, e)
                continue
            if (first := seen.setdefault(entry.id, number)) != number:
                self.add(manifest, number, f"id: {entry.id!r} is that of line {first} too")
            found.append((number, entry))
        return found

    def array(
        self, manifest: Path, number: int, entry: Utterance | Pair, field: str, dtype: str, shape: Sequence[int | None], ids: int | None = None
    ):
        """The file that the field names, None if that has a problem; None in ``shape`` is any size. Ids are 0 to ``ids`` − 1."""
        path = manifest.parent / getattr(entry, field)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            return self.add(manifest, number, f"{field}: {path} cannot be read as an .npy file: {e}")
        fits = len(array.shape) == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
        if array.dtype != dtype or not fits or not array.size:
            expected = f"{dtype} [{', '.join('any' if size is None else str(size) for size in shape)}]"
            return self.add(manifest, number, f"{field}: {path} holds {array.dtype} {list(array.shape)}, expected {expected}")
        if ids is not None and not 0 <= array.min() <= array.max() < ids:
            return self.add(manifest, number, f"{field}: {path} has ids {array.min()} to {array.max()}, expected 0 to {ids - 1}")
        if ids is None and not np.isfinite(array).all():
            return self.add(manifest, number, f"{field}: {path} holds values that are not finite")
        return array


def check_files(manifest: Path, entries: Sequence[tuple[int, Utterance]] | Sequence[tuple[int, Pair]], report: Report) -> None:
    """All that the entries name; widths must be alike throughout."""
    prefix, width = "", None
    for number, entry in entries:
        if isinstance(entry, Pair):
            prefix, vectors = "target_", [("prompt_condition_path", (FULL.conditions,)), (entry.emo_field, ())]
            if not getattr(entry, entry.emo_field):
                report.add(manifest, number, "prompt_emo_vec_path: missing, and so is target_emo_vec_path; one of them is needed")
        else:
            vectors = [("condition_path", (FULL.conditions,)), ("emo_vec_path", ())]
        for kind, length, ids in (("text_ids", "text_len", 1 << 31), ("codes", "code_len", FULL.codes)):
            if getattr(entry, f"{prefix}{kind}_path"):
                report.array(manifest, number, entry, f"{prefix}{kind}_path", "int32", (getattr(entry, prefix + length),), ids)
        for field, rows in vectors:
            if getattr(entry, field):
                array = report.array(manifest, number, entry, field, "float32", (*rows, width))
                width = width if array is None else array.shape[-1]


def tell_lengths(what: str, lengths: Sequence[int]) -> None:
    if lengths:
        print(f"{what}: {min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.1f}")


def check_language(manifest: Path, utterances: Sequence[tuple[int, Utterance]], report: Report) -> None:
    shares = [ethiopic_share(utterance.text) for _, utterance in utterances]
    others = [(number, share) for (number, _), share in zip(utterances, shares, strict=True) if share <= 0.5]
    amharic = len(shares) - len(others)
    print(f"Ethiopic script: {sum(shares) / len(shares):.1%} of a text's letters in the mean; {amharic} of {len(shares)} texts are mostly in it")
    if amharic >= PRIMARILY * len(shares):
        print("✅ Dataset is primarily Amharic")
        return
    for number, share in others[:SHOWN]:
        print(f"{manifest}, line {number}: text: {share:.0%} of its letters are Ethiopic")
    report.problems.append(
        f"{manifest}: mixed languages: field text is mostly Ethiopic in {amharic} of {len(shares)} lines, expected {PRIMARILY:.0%}; "
        f"the first in another script is line {others[0][0]}"
    )


def check_speakers(manifest: Path, utterances: Sequence[tuple[int, Utterance]], report: Report) -> None:
    counts = Counter(utterance.speaker for _, utterance in utterances).most_common()
    shown = ", ".join(f"{speaker} {count}" for speaker, count in counts[:SHOWN])
    print(f"speakers: {len(counts)}: {shown}{', …' if len(counts) > SHOWN else ''}")
    name, most = counts[0]
    if len(counts) < MIN_SPEAKERS:
        report.problems.append(f"{manifest}: too few speakers: field speaker has {len(counts)} values, expected at least {MIN_SPEAKERS}")
    elif most > LARGEST_SHARE * len(utterances):
        report.problems.append(f"{manifest}: speaker {name} has {most} of {len(utterances)} lines, expected at most {LARGEST_SHARE:.0%}")
    else:
        print("✅ Good speaker diversity")


def check(train_manifest: Path, train_pairs: Path) -> None:
    """Raises :class:`UsageError` after all problems have been told."""
    report = Report()
    utterances, pairs = report.entries(train_manifest, Utterance), report.entries(train_pairs, Pair)
    print(f"{train_manifest}: {len(utterances)} utterances")
    tell_lengths("characters", [len(utterance.text) for _, utterance in utterances])
    print(f"{train_pairs}: {len(pairs)} pairs")
    tell_lengths("text ids", [pair.target_text_len for _, pair in pairs])
    tell_lengths("audio codes", [pair.target_code_len for _, pair in pairs])
    check_files(train_manifest, utterances, report)
    check_files(train_pairs, pairs, report)
    if utterances:
        check_language(train_manifest, utterances, report)
        check_speakers(train_manifest, utterances, report)
    for problem in report.problems[:SHOWN]:
        print(problem)
    if report.problems:
        more = f" (the first {SHOWN} are told)" if len(report.problems) > SHOWN else ""
        raise UsageError(f"{len(report.problems)} problems{more}, the first: {report.problems[0]}")


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0])
    default = Path("data/amharic")
    parser.flag("--train_manifest", type=Path, default=default / "train_manifest.jsonl", help="utterances, one a line")
    parser.flag("--train_pairs", type=Path, default=default / "train_pairs.jsonl", help="what the recipe is trained on")
    return parser


def main(argv: Sequence[str]) -> int:
    try:
        args: argparse.Namespace = make_parser().parse_args(argv)
        check(args.train_manifest, args.train_pairs)
    except EngineError as e:
        print(f"check_amharic_data: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
