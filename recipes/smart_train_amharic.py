"""Start recipes/indextts_amharic.py: where its last run stopped, or afresh.

    python recipes/smart_train_amharic.py [--output-dir DIR] [-- flags of the recipe, which win]

The recipe takes this process's place: it gets the signals, and its exit code is the one that counts.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # started by its path

from engine.catalog import steps  # noqa: E402
from engine.errors import EngineError, UsageError  # noqa: E402
from engine.storage import LocalStorage  # noqa: E402
from recipes.lib.arguments import RecipeParser  # noqa: E402

ELSEWHERE = {
    "--train-manifest": "preprocessed_amharic/train_pairs.jsonl",
    "--val-manifest": "preprocessed_amharic/val_pairs.jsonl",
    "--tokenizer": "tokenizers/amharic_extended_bpe.model",
}
"""Data that did not come from prepare_amharic.py, whose place the recipe knows; these are used where the first is there."""
HYPER_PARAMETERS = (
    *("--learning-rate", "5e-6"),
    *("--text-loss-weight", "0.4"),
    *("--mel-loss-weight", "0.6"),
    *("--warmup-steps", "2000"),
    "--amp",
)


def command(recipe: Path, output_dir: Path, further: Sequence[str]) -> list[str]:
    """What to run, and on the way the news of what was found."""
    found = steps(LocalStorage(output_dir))
    if found:
        print(f"✅ Found checkpoint: {output_dir / found[-1].name}")
        print("📝 Resuming training...")
    else:
        print("🆕 No checkpoint found")
        print("🚀 Starting fresh training...")
    resume = ("--resume", "auto") if found else ()
    data = [part for flag in ELSEWHERE.items() for part in flag] if Path(ELSEWHERE["--train-manifest"]).exists() else []
    return [sys.executable, str(recipe), *data, "--output-dir", str(output_dir), *HYPER_PARAMETERS, *resume, *further]


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0], epilog="flags after -- go to the recipe, and win")
    parser.flag("--output_dir", type=Path, default=Path("trained_ckpts_fixed"), help="the run's folder")
    parser.flag("--recipe", type=Path, default=ROOT / "recipes/indextts_amharic.py", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> int:
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    further = list(argv[len(own) + 1 :])
    try:
        args = make_parser().parse_args(own)
        if any(flag.partition("=")[0] in ("--output-dir", "--output_dir") for flag in further):
            raise UsageError("--output-dir belongs before the --: its checkpoints are looked for here")
        line = command(args.recipe, args.output_dir, further)
    except EngineError as e:
        print(f"smart_train_amharic: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    print(f"\nCommand: {shlex.join(line)}\n", flush=True)
    os.execv(line[0], line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
