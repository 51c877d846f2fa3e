"""IndexTTS in a new language: the text vocabulary of a GPT grows, its old rows stay to the bit, the new ones are trained.

    python recipes/prepare_amharic.py --output-dir data/amharic              # text, tokenizers, manifests: nothing is downloaded
    deepspeed recipes/indextts_amharic.py --data-dir data/amharic --resume auto   # also under torchrun, or plain python

The same command goes on where an earlier one stopped, in mid-epoch too, on another number of ranks, with another batch size.
docs/extended-vocabulary.md says why the usual gradient hook does not freeze, and what does.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # launchers start this file by its path

from engine import Checkpointer, ElasticSampler, Progress, catalog  # noqa: E402
from engine.catalog.settings import stored_config  # noqa: E402
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError, IncompatibleCheckpoint, UsageError  # noqa: E402
from engine.format.names import step_name  # noqa: E402
from engine.format.record import decode_record  # noqa: E402
from engine.storage import Storage  # noqa: E402
from engine_kernels import convert  # noqa: E402
from recipes.lib import ds_config, start, tokenizer  # noqa: E402
from recipes.lib.arguments import RecipeParser, not_negative, positive, read_yaml  # noqa: E402
from recipes.lib.indextts import PRESETS, IndexTTS, load_base, read_state, tokens  # noqa: E402
from recipes.lib.journal import Journal  # noqa: E402
from recipes.lib.pairs import Pairs  # noqa: E402
from recipes.lib.parallel import ENGINES, ZERO_STAGES, TorchTrainable, Trainable, checkpoint_member, trainable  # noqa: E402
from recipes.lib.start import Start  # noqa: E402
from recipes.lib.world import World, launched  # noqa: E402

BETAS = (0.9, 0.96)
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
MONITOR = "val_loss"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHITECTURE = ("preset", "text_vocab", "base_vocab_size")  # what a resumed run cannot change
NOT_INHERITED = {"config", "resume", "base_checkpoint", "output_dir", "data_dir", "check_resume", "local_rank", "text_vocab"}
REQUIRED = {"optimizer": "groups", "scheduler": "scheduler"}  # of a checkpoint that is resumed, and where its record has them


# The network, of which part of the vocabulary is frozen.


def make_network(args: argparse.Namespace, world: World, journal: Journal, *, fresh: bool) -> IndexTTS:
    """Equal on every rank, with the base rows of its text tables split off as frozen parameters."""
    torch.manual_seed(args.seed)
    network = IndexTTS(replace(PRESETS[args.preset], text_vocab=args.text_vocab))
    if fresh and args.base_checkpoint:
        left_out: list[str] = []
        act = lambda: left_out.extend(load_base(network, read_state(args.base_checkpoint), args.base_vocab_size))  # noqa: E731
        world.ranks.gather("load the base checkpoint", act)
        journal.line(f"[Info] Loaded base checkpoint {args.base_checkpoint}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))
    network.to(world.device)
    if args.text_vocab > args.base_vocab_size:
        convert(network, {"text_embedding": args.base_vocab_size, "text_head": args.base_vocab_size})
        for line in banner(network, args, fresh=fresh):
            journal.line(line)
    world.assert_equal("before training", {"network": network})
    return network


def banner(network: IndexTTS, args: argparse.Namespace, *, fresh: bool) -> list[str]:
    base, vocab = args.base_vocab_size, args.text_vocab
    frozen = sum(p.numel() for module in (network.text_embedding, network.text_head) for p in module.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    lines = [
        f"Detected extended vocabulary: {vocab} tokens",
        f"Base tokens: 0-{base - 1} (pretrained)",
        f"New tokens: {base}-{vocab - 1} ({'random init' if fresh else 'from the checkpoint'})",
        "Base rows are parameters of their own: no gradient, no moments, no decay",
        f"Freezing {frozen:,} / {total:,} parameters ({100 * frozen / total:.1f}%)",
        "Base embeddings frozen, new embeddings trainable",
    ]
    rule = "=" * 80
    return [rule, *(f"[Extended Vocab Fix] {line}" for line in lines), rule]


def put_under_engine(network: IndexTTS, args: argparse.Namespace, world: World, steps: int) -> Trainable:
    dtype = DTYPES[args.amp_dtype] if args.amp else torch.float32
    settings: dict[str, Any] = {}
    if args.engine in ZERO_STAGES:
        path = args.ds_config or ROOT / "ds_configs" / f"indextts_{args.engine}.json"
        given = {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "train_batch_size": args.batch_size * args.grad_accumulation * world.size,
            "gradient_accumulation_steps": args.grad_accumulation,
            "gradient_clipping": MAX_NORM,
            "zero_optimization.stage": ZERO_STAGES[args.engine],
            "bf16.enabled": dtype == torch.bfloat16,
            "fp16.enabled": dtype == torch.float16,
        }
        settings = world.ranks.first("read the DeepSpeed configuration", lambda: ds_config.load(path, given, {}))
    return trainable(
        network,
        lambda parameters: torch.optim.AdamW(parameters, lr=args.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY),
        engine=args.engine,
        blocks=network.blocks,
        world=world,
        max_norm=MAX_NORM,
        ds_config=settings,
        make_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: cosine(step, args.warmup_steps, steps)),
        dtype=dtype,
        accumulation=args.grad_accumulation,
    )


def cosine(step: int, warmup: int, total: int) -> float:
    """The learning rate's share at an optimizer step: linear up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class RecentCheckpoints:
    """The newest ``keep`` steps that were saved, in a checkpoint of their own."""

    def __init__(self, keep: int) -> None:
        self.keep, self.names = keep, list[str]()

    def add(self, name: str) -> None:
        self.names = [*(known for known in self.names if known != name), name][-self.keep :]

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names = list(state["names"])[-self.keep :]


# One step: the micro-batches of a rank, weighed by the tokens that all ranks have.


def micro_batches(pairs: Pairs, samples: list[Any], args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """As many as accumulate; at an epoch's end some may be empty."""
    size = args.batch_size
    return [pairs.collate(samples[i * size : (i + 1) * size]) for i in range(args.grad_accumulation)]


def summed(values: Tensor, world: World) -> Tensor:
    """Over all ranks, in float64. Every rank calls this."""
    total = values.detach().to(world.device, torch.float64)
    torch.distributed.all_reduce(total)
    return total


def weights(args: argparse.Namespace, world: World) -> Tensor:
    return torch.tensor([args.text_loss_weight, args.mel_loss_weight], device=world.device)


def train_step(model: Trainable, batches: list[dict[str, Tensor]], args: argparse.Namespace, world: World) -> Tensor:
    """One optimizer step; returns this rank's part of the mean text and mel losses ``[2]`` over the step's tokens on all ranks."""
    counts = summed(torch.stack([tokens(batch) for batch in batches]).sum(0), world).clamp(min=1).float()
    losses = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        parts = model({name: tensor.to(world.device) for name, tensor in batch.items()}) / counts
        # engines take the mean over ranks and micro-batches; these are parts of a sum
        model.backward((weights(args, world) * parts).sum() * (world.size * len(batches)))
        model.step()
        losses += parts.detach().cpu().double()
    return losses


@torch.no_grad()
def validate(model: Trainable, pairs: Pairs, args: argparse.Namespace, world: World) -> dict[str, float]:
    """Mean losses over the validation pairs. Every rank does as many forwards, on its share."""
    total, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for i in range(-(-len(pairs) // (args.batch_size * world.size))):
        first = (i * world.size + world.rank) * args.batch_size
        batch = pairs.collate([pairs[j] for j in range(first, min(first + args.batch_size, len(pairs)))])
        total += model({name: tensor.to(world.device) for name, tensor in batch.items()}).cpu().double()
        counts += tokens(batch)
    means = summed(total, world) / summed(counts, world).clamp(min=1)
    text, mel = means.tolist()
    return {"val_text_loss": text, "val_mel_loss": mel, MONITOR: float((weights(args, world) * means).sum())}


# The run.


def train(args: argparse.Namespace, begin: Start, what: str, world: World, journal: Journal) -> None:
    config = replace(PRESETS[args.preset], text_vocab=args.text_vocab)
    read: list[Pairs] = []
    world.ranks.gather("read the manifests", lambda: read.extend(Pairs(path, config) for path in (args.train_manifest, args.val_manifest)))
    pairs, held_out = read
    global_batch = args.batch_size * args.grad_accumulation * world.size
    sampler = ElasticSampler(pairs, global_batch_size=global_batch, seed=args.seed, drop_last=False, empty="yield")
    network = make_network(args, world, journal, fresh=begin.step is None)
    model = put_under_engine(network, args, world, steps=args.epochs * -(-len(pairs) // global_batch))
    recent = RecentCheckpoints(args.keep_checkpoints)
    members: dict[str, Any] = {"data": sampler, "recent": recent}
    if isinstance(model, TorchTrainable) and model.scaler.is_enabled():
        members["scaler"] = model.scaler
    ckpt = Checkpointer(
        args.output_dir,
        checkpoint_member(model),
        config=settings(args),
        keep_last=args.keep_checkpoints,
        monitor=MONITOR,
        **members,
    )
    progress = resume(ckpt, begin, what, journal) if begin.step else Progress()
    sampler.follow(progress)
    if begin.step:
        epoch, offset = sampler.locate(progress.samples)
        journal.line(f"[Info] ✅ Successfully resumed from {begin.step}")
        journal.line(f"[Info]    Epoch: {epoch + 1}, Step: {progress.step}, Batch: {offset // global_batch}, Sample: {offset}")
        journal.line(f"[Info]    Recent checkpoints: {len(recent.names)}")
        if args.check_resume:
            journal.line(f"largest difference of any restored tensor: {ckpt.max_difference()}")
    world.ranks.first("open the run's folder", lambda: open_run(args, progress, len(pairs), global_batch, journal))
    loader = DataLoader(pairs, batch_sampler=sampler, collate_fn=list)
    while progress.epoch < args.epochs:
        for samples in loader:
            losses = train_step(model, micro_batches(pairs, samples, args), args, world)
            progress.advance()
            progress.epoch, offset = sampler.locate(progress.samples)
            ends = offset == 0
            journal.at(progress.step)
            if progress.step % args.log_interval == 0 or ends:
                text, mel = summed(losses, world).tolist()
                journal.losses(epoch=progress.epoch + (not ends), step=progress.step, text_loss=text, mel_loss=mel)
            saves = progress.step % args.save_interval == 0 or ends
            if progress.step % args.val_interval == 0 or saves:
                metrics = validate(model, held_out, args, world)
                journal.losses(epoch=progress.epoch + (not ends), step=progress.step, **metrics)
                if saves:
                    recent.add(step_name(progress.step))
                    ckpt.save(progress, metrics=metrics)
    ckpt.close()


def resume(ckpt: Checkpointer, begin: Start, what: str, journal: Journal) -> Progress:
    """``latest`` goes back past a damaged step, which is told; any other is the one that was named."""
    assert begin.step is not None
    for part in ("model", "optimizer", "scheduler"):
        journal.line(f"[Info] Restoring {part} state...")
    with start.telling_what_is_there(begin.step.parent, journal.line):
        return ckpt.resume("latest" if what == "latest" else str(begin.step), override=("lr",))


def open_run(args: argparse.Namespace, progress: Progress, samples: int, global_batch: int, journal: Journal) -> None:
    """On rank 0, once it is known where training goes on."""
    if args.config:
        start.keep_config(args.config, args.output_dir, progress.step)
    left = divmod(max(0, args.epochs * samples - progress.samples), samples)  # whole epochs and the rest of this one, each with a short last batch
    steps = progress.step + sum(-(-count // global_batch) * times for times, count in ((left[0], samples), (1, left[1])))
    journal.open(args.output_dir, step=progress.step, total_steps=steps, logs=f"run_{time.strftime('%Y%m%d_%H%M%S')}")
    journal.line(f"{progress.epoch} of {args.epochs} epochs done, {progress.step} of {steps} steps; saving to {args.output_dir}")
    if progress.epoch >= args.epochs:
        journal.line("nothing is left to do; --epochs is the total, raise it to train on")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run takes over unless told otherwise, as plain values; paths hold from any folder."""
    kept = {name: value for name, value in vars(args).items() if name not in NOT_INHERITED or name == "text_vocab"}
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in kept.items()}


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0])
    flag = parser.flag
    flag("--preset", choices=sorted(PRESETS), default="tiny", help="sizes of the network")
    flag("--engine", choices=ENGINES, default="zero2", help="what holds and shards it")
    flag("--ds_config", type=Path, help="DeepSpeed JSON; default ds_configs/indextts_ENGINE.json")
    flag("--config", type=Path, help="YAML mapping of these flags' names to values; the command line wins")
    flag("--data_dir", type=Path, default=Path("data/amharic"), help="what prepare_amharic.py wrote: where manifests and tokenizer are by default")
    flag("--train_manifest", type=Path, help="pairs, one a line; default DATA_DIR/train_pairs.jsonl")
    flag("--val_manifest", type=Path, help="default DATA_DIR/val_pairs.jsonl")
    flag("--tokenizer", type=Path, help="the extended sentencepiece model; default DATA_DIR/tokenizers/amharic_extended_bpe.model")
    flag(
        "--base_tokenizer",
        type=Path,
        help="the one that was extended: its ids must be unchanged; default DATA_DIR/tokenizers/base_bpe.model, if there",
    )
    flag("--base_checkpoint", type=Path, help="a fresh run begins with these weights (.pth or .safetensors)")
    flag("--base_vocab_size", type=positive, help="pieces whose rows stay frozen; default: those of the base checkpoint or tokenizer")
    flag("--output_dir", type=Path, default=Path("runs/indextts_amharic"), help="the run's folder")
    flag("--resume", metavar="SPEC", help=start.SPECS)
    flag("--check_resume", action="store_true", help="compare what was restored with what is stored")
    flag("--epochs", type=positive, default=2, help="in total, those before a resume included")
    flag("--batch_size", type=positive, default=4, help="pairs a rank and micro-batch")
    flag("--grad_accumulation", type=positive, default=1, help="micro-batches an optimizer step")
    flag("--learning_rate", type=float, default=5e-4)
    flag("--text_loss_weight", type=float, default=0.4)
    flag("--mel_loss_weight", type=float, default=0.6)
    flag("--warmup_steps", type=not_negative, default=10)
    flag("--log_interval", type=positive, default=5, help="steps between two log lines")
    flag("--val_interval", type=positive, default=50, help="steps between two validations, besides those at each checkpoint")
    flag("--save_interval", type=positive, default=50, help="steps between two checkpoints, besides those at an epoch's end")
    flag("--keep_checkpoints", type=positive, default=3, metavar="N", help="the newest N are kept")
    flag("--amp", action="store_true", help="compute in a lower precision")
    flag("--amp_dtype", choices=sorted(DTYPES), default="bfloat16", help="which; float16 scales its losses")
    flag("--seed", type=int, default=0)
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def read_arguments(argv: Sequence[str], journal: Journal) -> tuple[list[str], Start, str]:
    """The command line over ``--config`` over the settings of the checkpoint that is resumed, if one is; where to begin, and whether
    ``latest`` was meant. Raises :class:`CheckpointNotFound`, and :class:`UsageError` for a run that would overwrite another."""
    parser = make_parser()
    given = list(argv)
    if path := parser.parse_args(given).config:
        from_file, unknown = parser.as_tokens(read_yaml(path))
        given = [*from_file, *given]
        for name in unknown:
            journal.line(f"{path}: {name} is no setting of this recipe and has no effect")
    args = parser.parse_args(given)
    spec = args.resume or ""
    what = "latest" if spec in (start.AUTO, "latest") else spec
    found = find(args.output_dir, spec, journal) if spec else None
    if found is None:
        start.refuse_to_overwrite(args.output_dir)
        return given, Start(args.output_dir), ""
    storage, folder, before = found
    refuse_incomplete(storage, folder)
    journal.line(f"[Info] {'Auto-resume: found' if spec == start.AUTO else 'Loading'} checkpoint at {storage.root}/{folder}")
    given = [*parser.as_tokens({name: value for name, value in before.items() if name != "text_vocab"})[0], *given]
    args = resolved(parser.parse_args(given))
    start.refuse_other_networks(ARCHITECTURE, settings(args), before)
    told = {name: value for name, value in settings(args).items() if name in before and before[name] != value}
    for name, value in told.items():
        journal.line(f"[Info] --{name} is {value}, was {before[name]}: the command line's counts")
    return given, Start(args.output_dir, Path(storage.root, folder)), what


def find(run_dir: Path, spec: str, journal: Journal) -> tuple[Storage, str, dict[str, Any]] | None:
    """The step that ``--resume`` names and its settings; None for ``auto`` where there is none. Of ``auto`` and ``latest`` a step whose
    manifest is damaged is passed over, loudly."""
    with start.telling_what_is_there(run_dir, journal.line):
        try:
            storage, folder = catalog.find(run_dir, "latest" if spec == start.AUTO else spec)
        except CheckpointNotFound as e:
            if spec != start.AUTO:
                raise
            journal.line(f"[Info] No checkpoint found: starting fresh. {e}")
            return None
        while True:
            try:
                return storage, folder, stored_config(storage, folder)
            except CheckpointCorrupt as e:
                earlier = catalog.previous(storage, folder) if spec in (start.AUTO, "latest") else None
                if earlier is None:
                    raise
                journal.line(f"[Warning] {folder} IS DAMAGED and is passed over; going back to {earlier}. {e}")
                folder = earlier


def refuse_incomplete(storage: Storage, folder: str) -> None:
    """A step of weights alone cannot be resumed. Raises :class:`IncompatibleCheckpoint`."""
    record: Any = decode_record(catalog.read_manifest(storage, folder).record)
    models = record.get("models", {}).values() if isinstance(record, dict) else ()
    missing = [name for name, key in REQUIRED.items() if not all(model.get(key) for model in models)]
    if missing:
        raise IncompatibleCheckpoint(
            f"{storage.root}/{folder}: Checkpoint missing required keys: {missing}. Resume from another step, or start afresh"
        )


def base_pieces(path: Path) -> int:
    """Of a base checkpoint, whose table has a row more. Raises :class:`UsageError`."""
    tables = [tensor for name, tensor in read_state(path).items() if name.replace(".base_layer.", ".") == "text_embedding.weight"]
    if not tables:
        raise UsageError(f"--base_checkpoint {path}: Checkpoint missing required keys: ['text_embedding.weight']. It is no model of this kind")
    return len(tables[0]) - 1


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """With what follows from the data: paths, and the sizes of the vocabularies. Raises :class:`UsageError`."""
    args.train_manifest = args.train_manifest or args.data_dir / "train_pairs.jsonl"
    args.val_manifest = args.val_manifest or args.data_dir / "val_pairs.jsonl"
    args.tokenizer = args.tokenizer or args.data_dir / "tokenizers" / "amharic_extended_bpe.model"
    args.text_vocab = tokenizer.vocab_size(args.tokenizer)
    made = args.data_dir / "tokenizers" / "base_bpe.model"
    args.base_tokenizer = args.base_tokenizer or (made if made.exists() else None)
    if args.base_vocab_size is None and args.base_checkpoint:
        args.base_vocab_size = base_pieces(args.base_checkpoint)
    elif args.base_vocab_size is None and args.base_tokenizer:
        args.base_vocab_size = tokenizer.vocab_size(args.base_tokenizer)
    elif args.base_vocab_size is None:
        raise UsageError("how many pieces the base has is not known: give --base_checkpoint, --base_tokenizer or --base_vocab_size")
    if args.base_vocab_size > args.text_vocab:
        raise UsageError(
            f"{args.tokenizer} has {args.text_vocab} pieces, fewer than the {args.base_vocab_size} of the base: it does not extend the base's "
            "tokenizer. Extend that with prepare_amharic.py"
        )
    if args.base_tokenizer and args.base_vocab_size < args.text_vocab:
        tokenizer.check_extends(tokenizer.load(args.base_tokenizer), tokenizer.load(args.tokenizer))
    return args


def check_tokenizer(args: argparse.Namespace, text_vocab: int, world: World) -> None:
    if args.text_vocab != text_vocab:
        raise UsageError(f"{args.tokenizer} has {args.text_vocab} pieces on rank {world.rank}, {text_vocab} on rank 0: it must be the same file")


def run(argv: Sequence[str], world: World) -> None:
    """Rank 0 reads and looks up; all go by what it found: files may differ between machines, or change meanwhile."""
    journal = Journal(speaks=world.rank == 0)

    def read() -> list[Any]:
        tokens, begin, what = read_arguments(argv, journal)
        args = resolved(make_parser().parse_args(tokens))
        return [tokens, args.text_vocab, args.base_vocab_size, str(begin.step) if begin.step else "", what]

    try:
        tokens, text_vocab, base, step, what = world.ranks.first("read the settings and find the checkpoint", read)
        args = make_parser().parse_args([*tokens, f"--base_vocab_size={base}"])
        world.ranks.gather("read the tokenizer", lambda: check_tokenizer(resolved(args), text_vocab, world))
        train(args, Start(args.output_dir, Path(step) if step else None), what, world, journal)
    finally:
        journal.close()


def main(argv: Sequence[str]) -> int:
    try:
        make_parser().parse_args(argv)  # says what is wrong with it at once, before any rank waits for another
        with launched() as world:
            run(argv, world)
    except EngineError as e:
        print(f"indextts_amharic: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
