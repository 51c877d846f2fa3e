"""Make the data of recipes/indextts_amharic.py out of what Python and Babel bring along: tokenizers, features and manifests.

    python recipes/prepare_amharic.py --output-dir data/amharic

The base tokenizer learns English from the topics of Python's own help, the extended one Amharic on top of it. Texts are spoken by a few
speakers in turn; a pair is an utterance with another of the same speaker as its prompt. No text is in both training and validation. The
same command gives the same bytes. Prepared data of one's own take the same form; see recipes/lib/amharic.py and recipes/lib/pairs.py.
"""

import argparse
import sys
from collections.abc import Sequence
from hashlib import shake_128
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import msgspec
import numpy as np
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started by its path

from engine.errors import EngineError, StorageError, UsageError  # noqa: E402
from recipes.lib import amharic, tokenizer  # noqa: E402
from recipes.lib.amharic import SPEAKERS, Utterance  # noqa: E402
from recipes.lib.arguments import RecipeParser, positive  # noqa: E402
from recipes.lib.indextts import PRESETS, IndexTTSConfig  # noqa: E402

SAMPLES = {"tiny": 224, "full": None}
VALIDATION_SHARE = 0.1


def english() -> list[str]:
    """The lines of the topics of Python's ``help()``."""
    return [line.strip() for topic in sorted(topics) for line in topics[topic].splitlines() if line.strip()]


def make_tokenizers(args: argparse.Namespace, config: IndexTTSConfig) -> tuple[SentencePieceProcessor | None, SentencePieceProcessor]:
    """Base and extended, given or trained; no base where only the extended one is given."""
    base = tokenizer.load(args.base_tokenizer) if args.base_tokenizer else None
    if args.tokenizer:
        extended = tokenizer.load(args.tokenizer)
        if base:
            tokenizer.check_extends(base, extended)
        return base, extended
    size = args.vocab_size or config.text_vocab
    try:
        base = base or tokenizer.train(english(), args.base_vocab_size or size // 2)
        return base, tokenizer.extend(base, amharic.texts(), size)
    except UsageError as e:
        raise UsageError(f"{e}. Choose others by --base-vocab-size and --vocab-size, or give --tokenizer, made of more text") from e


def chosen_texts(args: argparse.Namespace, config: IndexTTSConfig, model: SentencePieceProcessor) -> list[str]:
    """Those that the network has positions for, in an order that the seed alone decides, as many as are wanted."""
    texts = [
        text
        for text in amharic.texts()
        if len(model.encode(text)) <= config.text_positions - 2 and len(amharic.codes(text, config.codes)) <= config.mel_positions - 2
    ]
    texts.sort(key=lambda text: shake_128(f"{args.seed} {text}".encode()).digest(16))
    wanted = args.max_samples or SAMPLES[args.preset]
    if wanted is not None and wanted < 2:
        raise UsageError(f"--max-samples {wanted}: one text for training and one for validation are the least")
    return texts[:wanted]


def write_features(folder: Path, name: str, text: str, speaker: str, ids: list[int], config: IndexTTSConfig) -> Utterance:
    """One file each under ``folder``/features."""
    arrays = {
        "text_ids": np.array(ids, dtype=np.int32),
        "codes": amharic.codes(text, config.codes),
        "condition": amharic.condition(speaker, text, config.conditions, config.width),
        "emo_vec": amharic.emotion(text, config.width),
    }
    paths = {f"{kind}_path": f"features/{name}_{kind}.npy" for kind in arrays}
    for path, array in zip(paths.values(), arrays.values(), strict=True):
        np.save(folder / path, array, allow_pickle=False)
    return Utterance(name, text, speaker, **paths, text_len=len(arrays["text_ids"]), code_len=len(arrays["codes"]))


def pairs_of(utterances: Sequence[Utterance]) -> list[dict[str, Any]]:
    """Each utterance once, after the speaker's one before it: the first after the last, a speaker's only one after itself."""
    before = {utterance.speaker: utterance for utterance in utterances}
    pairs = []
    for target in utterances:
        prompt, before[target.speaker] = before[target.speaker], target
        pair = {
            "id": f"{prompt.id}__{target.id}",
            "prompt_condition_path": prompt.condition_path,
            "prompt_emo_vec_path": prompt.emo_vec_path,
            "target_text_ids_path": target.text_ids_path,
            "target_codes_path": target.codes_path,
            "target_text_len": target.text_len,
            "target_code_len": target.code_len,
        }
        pairs.append(pair)
    return pairs


def prepare(args: argparse.Namespace) -> None:
    config, folder = PRESETS[args.preset], args.output_dir
    base, extended = make_tokenizers(args, config)
    texts = chosen_texts(args, config, extended)
    for name in ("tokenizers", "features"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, model in (("base_bpe", base), ("amharic_extended_bpe", extended)):
        if model:
            (folder / f"tokenizers/{name}.model").write_bytes(model.serialized_model_proto())
            print(f"{folder}/tokenizers/{name}.model: {model.get_piece_size()} pieces")
    held_out = max(1, round(len(texts) * VALIDATION_SHARE))
    for split, part in (("train", texts[held_out:]), ("val", texts[:held_out])):
        utterances = [
            write_features(folder, f"{split}_{i:05d}", text, SPEAKERS[i % len(SPEAKERS)], extended.encode(text), config)
            for i, text in enumerate(part)
        ]
        for kind, entries in (("manifest", utterances), ("pairs", pairs_of(utterances))):
            path = folder / f"{split}_{kind}.jsonl"
            path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
            print(f"{path}: {len(entries)} lines")


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0])
    flag = parser.flag
    flag("--output_dir", type=Path, default=Path("data/amharic"), help="files in it of the same names are replaced")
    flag("--preset", choices=sorted(PRESETS), default="tiny", help="the network that the data are for: its vocabularies, widths and positions")
    flag("--base_vocab_size", type=positive, help="pieces of the base tokenizer; default: half of the extended one's")
    flag("--vocab_size", type=positive, help="pieces of the extended tokenizer; default: the preset's")
    flag("--base_tokenizer", type=Path, help="a sentencepiece model to extend, instead of one learned from English")
    flag("--tokenizer", type=Path, help="the extended sentencepiece model, if it exists")
    flag("--max_samples", type=positive, help=f"texts, validation included; default: {SAMPLES['tiny']} for tiny, all there are for full")
    flag("--seed", type=int, default=0, help="which texts, and which of them are for validation")
    return parser


def main(argv: Sequence[str]) -> int:
    try:
        try:
            prepare(make_parser().parse_args(argv))
        except OSError as e:
            raise StorageError(f"the data cannot be written: {e}") from e
    except EngineError as e:
        print(f"prepare_amharic: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
