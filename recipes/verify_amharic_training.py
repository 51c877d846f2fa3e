"""Check that a tokenizer, the pairs made with it and a model fit each other, before a GPU is rented.

python recipes/verify_amharic_training.py --tokenizer DIR/tokenizers/amharic_extended_bpe.model
"""

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started by its path

from engine import catalog  # noqa: E402
from engine.errors import EngineError, UsageError  # noqa: E402
from recipes.lib import amharic, tokenizer  # noqa: E402
from recipes.lib.arguments import RecipeParser, positive  # noqa: E402
from recipes.lib.indextts import TEXT_TABLES, read_state  # noqa: E402
from recipes.lib.pairs import Pair  # noqa: E402

FULL = 12_000  # the base vocabulary of IndexTTS
ENOUGH = 0.98  # of the texts must come back from the tokenizer: a rare character may be missing from one that is not made of these


def check_vocabulary(path: Path, model: SentencePieceProcessor, base: int) -> None:
    size = model.get_piece_size()
    if size <= base:
        raise UsageError(f"{path}: it has {size} pieces, expected more than the base's {base}: it is not extended; see --base-vocab-size")
    print(f"✓ Vocabulary size: {size}")


def check_base(path: Path, base_path: Path, model: SentencePieceProcessor, base: int) -> None:
    other = tokenizer.load(base_path)
    if other.get_piece_size() != base:
        raise UsageError(f"{base_path}: it has {other.get_piece_size()} pieces, --base-vocab-size says {base}")
    try:
        tokenizer.check_extends(other, model)
    except UsageError as e:
        raise UsageError(f"{path}, base {base_path}: {e}") from e
    print(f"✓ Base vocabulary unchanged (ID < {base})")


def check_amharic(path: Path, model: SentencePieceProcessor, base: int) -> None:
    """Every text uses a new piece, and nearly all come back as they were."""
    texts = amharic.texts()
    ids = [model.encode(text) for text in texts]
    old = [text for text, encoded in zip(texts, ids, strict=True) if max(encoded) < base]
    if old:
        raise UsageError(
            f"{path}: {len(old)} of {len(texts)} Amharic texts have no ID >= {base}, the first is {old[0]!r}: it has not learned Amharic"
        )
    print(f"✓ Uses extended vocabulary (ID >= {base})")
    lost = [text for text, encoded in zip(texts, ids, strict=True) if _composed(model.decode(encoded)) != _composed(text)]
    if len(lost) > (1 - ENOUGH) * len(texts):
        raise UsageError(
            f"{path}: {len(lost)} of {len(texts)} Amharic texts do not come back from it, the first is {lost[0]!r}, which becomes "
            f"{model.decode(model.encode(lost[0]))!r}: it lacks characters"
        )
    print(f"✓ Round trip: {len(texts) - len(lost)} of {len(texts)} Amharic texts")


def _composed(text: str) -> str:
    """Tokenizers may normalize what they read."""
    return unicodedata.normalize("NFKC", text)


def check_pairs(manifest: Path, model: SentencePieceProcessor, base: int) -> None:
    """Each pair's text ids are those of pieces of text, some of them new, and read as Amharic for the most part."""
    size, pairs = model.get_piece_size(), 0
    try:
        lines = manifest.read_bytes().split(b"\n")
    except OSError as e:
        raise UsageError(f"{manifest}: the manifest cannot be read: {e}") from e
    new, read = False, []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = msgspec.json.decode(line, type=Pair)
            ids = np.load(manifest.parent / pair.target_text_ids_path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise UsageError(f"{manifest}, line {number}: target_text_ids_path: {e}") from e
        if ids.dtype != np.int32 or ids.ndim != 1 or not ids.size or not tokenizer.STOP < ids.min() <= ids.max() < size:
            found = f"{ids.dtype} {list(ids.shape)}" + (f" from {ids.min()} to {ids.max()}" if ids.size else "")
            raise UsageError(
                f"{manifest}, line {number}: target_text_ids_path: text ids are {found}, expected int32 [text_len] from {tokenizer.STOP + 1} "
                f"to {size - 1}: 0 and 1 are the model's start and stop. Prepare the pairs with this tokenizer"
            )
        pairs, new = pairs + 1, new or ids.max() >= base
        read.append(model.decode(ids.tolist()))
    share = amharic.ethiopic_share("".join(read))
    if not new or share <= 0.5:
        raise UsageError(
            f"{manifest}: {pairs} pairs, {'some' if new else 'none'} with ID >= {base}, {share:.0%} of the letters Ethiopic; expected Amharic"
        )
    print(f"✓ Training pairs: {pairs}, {share:.0%} of the letters Ethiopic")


def check_checkpoint(path: Path, size: int) -> None:
    """A run's latest step, a step, or a file of weights: its text tables have a row more than there are pieces."""
    if path.is_dir():
        storage, folder = catalog.find(path, str(path))
        tensors = catalog.read_manifest(storage, folder).tensors
        shapes = {table: [t.shape for t in tensors if t.name.endswith(f".{table}")] for table in TEXT_TABLES}
    else:
        state = read_state(path)
        shapes = {table: [tuple(state[table].shape)] if table in state else [] for table in TEXT_TABLES}
    for table, found in shapes.items():
        if not found:
            raise UsageError(f"{path}: {table} is missing from the checkpoint; it has {', '.join(t for t in shapes if shapes[t]) or 'no text table'}")
        if any(shape[0] != size + 1 for shape in found):
            raise UsageError(f"{path}: {table} is {list(found[0])}, expected {size + 1} rows: one more than the tokenizer's pieces")
    print(f"✓ Checkpoint's text tables have {size} + 1 rows")


def beside(args: argparse.Namespace) -> Path | None:
    """The base tokenizer that prepare_amharic.py wrote beside the extended one, where it has learned both."""
    path = args.tokenizer.with_name("base_bpe.model")
    return path if path.exists() and path != args.tokenizer else None


def verify(args: argparse.Namespace) -> None:
    model, base = tokenizer.load(args.tokenizer), args.base_vocab_size
    if base is None:
        base_path = args.base_tokenizer or beside(args)
        base = tokenizer.load(base_path).get_piece_size() if base_path else FULL
        args.base_tokenizer = base_path
        print(f"Base vocabulary: {base} pieces" + (f", as {base_path} has" if base_path else ""))
    check_vocabulary(args.tokenizer, model, base)
    if args.base_tokenizer:
        check_base(args.tokenizer, args.base_tokenizer, model, base)
    check_amharic(args.tokenizer, model, base)
    if args.train_pairs:
        check_pairs(args.train_pairs, model, base)
    if args.checkpoint:
        check_checkpoint(args.checkpoint, model.get_piece_size())
    print("✅ All checks passed!")


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0])
    flag = parser.flag
    flag("--tokenizer", type=Path, default=Path("data/amharic/tokenizers/amharic_extended_bpe.model"), help="the extended sentencepiece model")
    flag("--base_vocab_size", type=positive, help=f"pieces of the tokenizer that it extends; default: those of base_bpe.model beside it, else {FULL}")
    flag("--base_tokenizer", type=Path, help="that tokenizer: its pieces must be unchanged in the extended one")
    flag("--train_pairs", type=Path, help="pairs, one a line: their text ids must be this tokenizer's")
    flag("--checkpoint", type=Path, help="folder of a run or step, or a .pth or .safetensors file: its text tables must fit")
    return parser


def main(argv: Sequence[str]) -> int:
    try:
        verify(make_parser().parse_args(argv))
    except EngineError as e:
        print(f"verify_amharic_training: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
