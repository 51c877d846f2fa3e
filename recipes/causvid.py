"""CausVid: distil a bidirectional video diffusion model into a few-step, block-causal student.

    deepspeed recipes/causvid.py                       # a CPU-sized run; also under torchrun, or plain python
    deepspeed recipes/causvid.py --resume latest       # go on where it stopped
    bash recipes/resume_training_example.sh DIR        # the same for any run's folder

Three networks: the teacher (real score, frozen) knows the data; the critic (fake score, LoRA on a frozen base) learns
what the student makes; the student (generator) follows the difference of the two: distribution matching distillation,
arXiv 2412.07772. In a fresh run the teacher is first trained on the data itself, in place of downloaded weights.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # launchers start this file by its path

from engine import Checkpointer, ElasticSampler, Progress  # noqa: E402
from engine.errors import EngineError, UsageError  # noqa: E402
from recipes.lib import ds_config, glyphs, start  # noqa: E402
from recipes.lib.arguments import RecipeParser, not_negative, positive, read_yaml, scientific  # noqa: E402
from recipes.lib.captions import Captions, collate, embed, read_captions_alike  # noqa: E402
from recipes.lib.flow import DENOISING_STEPS, FlowSchedule  # noqa: E402
from recipes.lib.journal import Journal  # noqa: E402
from recipes.lib.lora import add_lora, freeze_all_but_lora, merged_state_dict  # noqa: E402
from recipes.lib.parallel import ENGINES, ZERO_STAGES, Trainable, checkpoint_member, trainable  # noqa: E402
from recipes.lib.start import Start  # noqa: E402
from recipes.lib.wan import PRESETS, KVCache, VideoDiT, WanConfig  # noqa: E402
from recipes.lib.world import World, launched  # noqa: E402

GUIDANCE = 3.5
BETAS = (0.9, 0.999)
MAX_NORM = 10.0
TEACHER_LR = 2e-3
TEACHER_BATCH = 16
TEACHER_LOG = 100
TEACHER_DROP_CAPTION = 0.1  # it must also predict without a caption: guidance needs both
MONITOR = "critic_loss_mean"  # what makes a checkpoint the best: the smallest mean over the steps since the one before
ARCHITECTURE = ("preset", "real_lora_rank", "fake_lora_rank")  # what a resumed run cannot change
DATA_NAME_LENGTH = 15  # of the data file's name, in an experiment's name
NOT_INHERITED = {  # by a resumed run: what belongs to one command, to the folder or to a rank
    *("config_path", "resume", "resume_from", "resume_epoch", "check_resume", "no_save"),
    *("experiment_name", "experiment_dir", "local_rank"),
}


# What is optimised. B videos, T latent frames, C channels; see recipes.lib.wan for the other letters.


def dmd_gradient(x_BTCHW: Tensor, fake_BTCHW: Tensor, real_BTCHW: Tensor) -> Tensor:
    """The direction the student's video should not take: from what the teacher makes of it to what the critic does.

    Over each video's distance from the teacher's, so that no noise level dominates.
    """
    distance = (x_BTCHW - real_BTCHW).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake_BTCHW - real_BTCHW) / distance)


def dmd_loss(x_BTCHW: Tensor, gradient_BTCHW: Tensor) -> Tensor:
    """Its gradient in ``x`` is ``gradient`` over the number of elements. In float64, for x − (x − g) cancels."""
    x = x_BTCHW.double()
    return 0.5 * F.mse_loss(x, (x - gradient_BTCHW.double()).detach())


def flow_loss(velocity_BTCHW: Tensor, x0_BTCHW: Tensor, noise_BTCHW: Tensor) -> Tensor:
    return (velocity_BTCHW - (noise_BTCHW - x0_BTCHW)).square().mean()


def generator_loss(x_BTCHW: Tensor, text_BLE: Tensor, no_text_BLE: Tensor, critic: Trainable, teacher: nn.Module, flow: FlowSchedule) -> Tensor:
    """Distribution matching: both scores look at the same noisy version of the student's video."""
    with torch.no_grad():
        t_B = flow.random_timesteps(x_BTCHW.shape[0])
        noisy = flow.noisy(x_BTCHW, torch.randn_like(x_BTCHW), t_B)
        fake = flow.clean(noisy, critic(noisy, t_B, text_BLE), t_B)
        with_text = flow.clean(noisy, teacher(noisy, t_B, text_BLE), t_B)
        without = flow.clean(noisy, teacher(noisy, t_B, no_text_BLE), t_B)
        gradient = dmd_gradient(x_BTCHW, fake, with_text + GUIDANCE * (with_text - without))
    return dmd_loss(x_BTCHW, gradient)


def critic_loss(x_BTCHW: Tensor, text_BLE: Tensor, critic: Trainable, flow: FlowSchedule) -> Tensor:
    t_B = flow.random_timesteps(x_BTCHW.shape[0])
    noise = torch.randn_like(x_BTCHW)
    return flow_loss(critic(flow.noisy(x_BTCHW, noise, t_B), t_B, text_BLE), x_BTCHW, noise)


# The student's videos.


@torch.no_grad()
def rollout(generator: Trainable, text_BLE: Tensor, config: WanConfig, flow: FlowSchedule) -> Tensor:
    """Generate block after block with a KV cache, as after training.

    Returns the video at each of ``DENOISING_STEPS``, from pure noise to finished: ``[steps, B, T, C, H, W]``.
    """
    batch, cache = text_BLE.shape[0], KVCache.empty(config.layers)
    shape = (batch, config.frames_per_block, config.channels, config.height, config.width)
    blocks = []
    for _ in range(config.blocks):
        x = torch.randn(shape, device=text_BLE.device)
        seen = [x]
        for now, then in pairwise(DENOISING_STEPS):
            t_BT = x.new_full(shape[:2], now)
            x0 = flow.clean(x, generator(x, t_BT, text_BLE, cache=cache), t_BT)
            x = flow.noisy(x0, torch.randn_like(x0), x.new_full(shape[:2], then)) if then else x0
            seen.append(x)
        generator(x, x.new_zeros(shape[:2]), text_BLE, cache=cache, remember=True)
        blocks.append(torch.stack(seen))
    return torch.cat(blocks, dim=2)


def student_video(generator: Trainable, text_BLE: Tensor, config: WanConfig, flow: FlowSchedule) -> Tensor:
    """A video ``[B, T, C, H, W]`` with a gradient: one causal pass over a rollout, each block at a random step."""
    seen_KBTCHW = rollout(generator, text_BLE, config, flow)
    batch, device = text_BLE.shape[0], text_BLE.device
    step_BT = torch.randint(0, len(DENOISING_STEPS), (batch, config.blocks), device=device)
    step_BT = step_BT.repeat_interleave(config.frames_per_block, dim=1)
    videos, frames = torch.arange(batch, device=device)[:, None], torch.arange(config.frames, device=device)
    noisy = seen_KBTCHW[step_BT, videos, frames]
    t_BT = torch.tensor(DENOISING_STEPS, device=device)[step_BT]
    return flow.clean(noisy, generator(noisy, t_BT, text_BLE), t_BT)


# The three networks.


def pretrain(teacher: VideoDiT, steps: int, device: torch.device, journal: Journal) -> None:
    """Flow matching on the glyph videos. Every rank does the same, so that none waits."""
    config, flow = teacher.config, FlowSchedule(device=device)
    characters = glyphs.characters()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=TEACHER_LR, betas=BETAS)
    for step in range(1, steps + 1):
        chosen = [characters[i] for i in torch.randint(len(characters), (TEACHER_BATCH,)).tolist()]
        kept = (torch.rand(TEACHER_BATCH) >= TEACHER_DROP_CAPTION).tolist()
        texts = [glyphs.caption(c) if keep else "" for c, keep in zip(chosen, kept, strict=True)]
        text_BLE = torch.stack([embed(t, config.text_tokens, config.text_dim) for t in texts]).to(device)
        sizes = (config.frames, config.channels, config.height, config.width)
        x0 = torch.stack([glyphs.latent_video(c, *sizes) for c in chosen]).to(device)
        t_B, noise = flow.random_timesteps(TEACHER_BATCH), torch.randn_like(x0)
        loss = flow_loss(teacher(flow.noisy(x0, noise, t_B), t_B, text_BLE), x0, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % TEACHER_LOG == 0 or step == steps:
            journal.line(f"teacher step {step} loss {loss.item():.9g}")


def make_networks(args: argparse.Namespace, config: WanConfig, world: World, journal: Journal, *, fresh: bool) -> dict[str, VideoDiT]:
    """Student, critic and teacher, equal on every rank; their weights mean something only in a fresh run."""
    torch.manual_seed(args.seed)
    student, critic, teacher = (VideoDiT(config, causal=causal).to(world.device) for causal in (True, False, False))
    add_lora(teacher, args.real_lora_rank)
    if fresh:
        pretrain(teacher, args.teacher_steps, world.device, journal)
        world.share_first(teacher)  # of the same seed, but a GPU's sums need not come out the same twice
        known = merged_state_dict(teacher)
        student.load_state_dict(known)
        critic.load_state_dict(known)
    add_lora(critic, args.fake_lora_rank)
    freeze_all_but_lora(critic)
    teacher.requires_grad_(False).eval()
    if world.device.type == "cuda":
        teacher.to(torch.bfloat16)
    networks = {"generator": student, "critic": critic, "teacher": teacher}
    world.assert_equal("before training", networks)
    return networks


def put_under_engine(network: VideoDiT, args: argparse.Namespace, world: World) -> Trainable:
    settings: dict[str, Any] = {}
    if args.engine in ZERO_STAGES:
        path = args.ds_config or ROOT / "ds_configs" / f"causvid_{args.engine}.json"
        given = {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "train_batch_size": args.batch_size * world.size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": MAX_NORM,
            "zero_optimization.stage": ZERO_STAGES[args.engine],
        }
        defaults = {"bf16.enabled": world.device.type == "cuda"}
        settings = world.ranks.first("read the DeepSpeed configuration", lambda: ds_config.load(path, given, defaults))
    return trainable(
        network,
        lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, betas=BETAS),
        engine=args.engine,
        blocks=network.blocks,
        world=world,
        max_norm=MAX_NORM,
        ds_config=settings,
    )


# The run.


def train(args: argparse.Namespace, begin: Start, world: World, journal: Journal) -> None:
    config, flow = PRESETS[args.preset], FlowSchedule(device=world.device)
    lines = read_captions_alike(args.data_path, world.ranks)[: args.max_captions]
    captions = Captions(lines, config.text_tokens, config.text_dim, args.dataset_repeat)
    global_batch = args.batch_size * world.size
    # With whole epochs, so that a batch size or a number of ranks that changes on resume does not change their length.
    sampler = ElasticSampler(captions, global_batch_size=global_batch, seed=args.seed, drop_last=False, empty="repeat")

    networks = make_networks(args, config, world, journal, fresh=begin.step is None)
    generator, critic = (put_under_engine(networks[name], args, world) for name in ("generator", "critic"))
    teacher = networks["teacher"]
    torch.manual_seed(args.seed + 1 + world.rank)  # from here on each rank draws its own noise

    ckpt = Checkpointer(
        begin.run_dir,
        generator=checkpoint_member(generator),
        critic=checkpoint_member(critic),
        teacher=teacher,
        data=sampler,
        config=settings(args),
        keep_last=args.keep_last,
        keep_best=args.keep_best,
        monitor=MONITOR,
    )
    progress = Progress()
    sampler.follow(progress)
    if begin.step:
        with start.telling_what_is_there(begin.step.parent, journal.line):
            progress = ckpt.resume(str(begin.step), corrupt="error", override=("lr",))  # the command line's wins
        if args.check_resume:
            journal.line(f"largest difference of any restored tensor: {ckpt.max_difference()}")
    world.ranks.first("open the run's folder", lambda: open_run(args, begin, progress, -(-len(captions) // global_batch), journal))

    no_text_BLE = captions.embed("").expand(args.batch_size, -1, -1).to(world.device)
    losses = {name: torch.tensor(progress.metrics.get(name, 0.0), dtype=torch.float64) for name in ("generator_loss", "critic_loss")}
    critic_total, saved_at = torch.zeros((), dtype=torch.float64, device=world.device), progress.step
    loader = DataLoader(captions, batch_sampler=sampler, collate_fn=collate)
    while progress.epoch < args.num_epochs:
        for batch_BLE in loader:
            share = sampler.weight  # 1, but for the last and shorter batch of an epoch
            text_BLE = batch_BLE.to(world.device)

            if progress.step % args.dfake_gen_update_ratio == 0:
                x_gen = student_video(generator, text_BLE, config, flow)
                loss = share * generator_loss(x_gen, text_BLE, no_text_BLE[: len(text_BLE)], critic, teacher, flow)
                generator.backward(loss)
                generator.step()
                losses["generator_loss"] = loss.detach()

            with torch.no_grad():
                x_gen = student_video(generator, text_BLE, config, flow)
            loss = share * critic_loss(x_gen, text_BLE, critic, flow)
            critic.backward(loss)
            critic.step()
            losses["critic_loss"] = loss.detach()
            critic_total += loss.detach()

            progress.advance()
            progress.epoch, offset = sampler.locate(progress.samples)
            journal.at(progress.step)
            if (progress.step - 1) % args.log_iters == 0:
                epoch = -(-progress.samples // len(captions))
                journal.losses(epoch=epoch, step=progress.step, **world.mean(losses))
            if save_is_due(args, progress, ends_epoch=offset == 0):
                ckpt.save(progress, metrics=world.mean({**losses, MONITOR: critic_total / (progress.step - saved_at)}))
                critic_total, saved_at = torch.zeros_like(critic_total), progress.step
    ckpt.close()


def open_run(args: argparse.Namespace, begin: Start, progress: Progress, epoch_steps: int, journal: Journal) -> None:
    """On rank 0, once it is known where training goes on."""
    if args.config_path:
        start.keep_config(args.config_path, begin.run_dir, progress.step)
    journal.open(begin.run_dir, step=progress.step, total_steps=args.num_epochs * epoch_steps)
    journal.line(f"{progress.epoch} of {args.num_epochs} epochs done, {progress.step} steps; saving to {begin.run_dir}")
    if progress.epoch >= args.num_epochs:
        journal.line("nothing is left to do; --num_epochs is the total, raise it to train on")


def save_is_due(args: argparse.Namespace, progress: Progress, *, ends_epoch: bool) -> bool:
    if args.no_save:
        return False
    if args.save_interval and progress.step % args.save_interval == 0:
        return True
    return ends_epoch and (progress.epoch % args.epoch_save_interval == 0 or progress.epoch == args.num_epochs)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run takes over unless told otherwise, as plain values; paths hold from any folder."""
    kept = {name: value for name, value in vars(args).items() if name not in NOT_INHERITED}
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in kept.items()}


def experiment_name(args: argparse.Namespace) -> str:
    """``{exp}_realLora32-fakeLora32_lr1e-5_ep100_bs1_ratio5_<data>[_repeatN][_slurmID]``."""
    data = args.data_path.stem[:DATA_NAME_LENGTH] if args.data_path else "glyphs"
    parts = [
        args.experiment_name,
        f"realLora{args.real_lora_rank}-fakeLora{args.fake_lora_rank}",
        f"lr{scientific(args.lr)}",
        f"ep{args.num_epochs}",
        f"bs{args.batch_size}",
        f"ratio{args.dfake_gen_update_ratio}",
        data,
    ]
    if args.dataset_repeat > 1:
        parts.append(f"repeat{args.dataset_repeat}")
    if job := os.environ.get("SLURM_JOB_ID"):
        parts.append(f"slurm{job}")
    return "_".join(parts)


def run_folder(args: argparse.Namespace) -> Path:
    if args.experiment_name:
        return (args.experiment_dir or Path("runs")) / experiment_name(args)
    return args.experiment_dir or Path("runs/causvid")


def make_parser() -> RecipeParser:
    parser = RecipeParser(description=(__doc__ or "").partition("\n\n")[0])
    flag = parser.flag
    flag("--preset", choices=sorted(PRESETS), default="tiny", help="sizes of the networks and videos")
    flag("--engine", choices=ENGINES, default="zero2", help="what holds and shards the trained networks")
    flag("--ds_config", type=Path, help="DeepSpeed JSON; default ds_configs/causvid_ENGINE.json")
    flag("--config_path", type=Path, help="YAML mapping of these flags' names to values; the command line wins")
    flag("--data_path", type=Path, help="captions, one a line; default: the names of the built-in glyphs")
    flag("--max_captions", type=positive, help="use only the first so many captions")
    flag("--dataset_repeat", type=positive, default=1, help="passes over the captions that make an epoch")
    flag("--batch_size", type=positive, default=8, help="captions a rank and step")
    flag("--lr", type=float, default=1e-4, help="of generator and critic")
    flag("--num_epochs", type=positive, default=2, help="in total, those before a resume included")
    flag("--dfake_gen_update_ratio", type=positive, default=5, help="critic steps for each generator step")
    flag("--real_lora_rank", type=not_negative, default=32, help="adapters of the teacher; 0: none")
    flag("--fake_lora_rank", type=positive, default=32, help="adapters of the critic")
    flag("--teacher_steps", type=positive, default=200, help="of pre-training in a fresh run")
    flag("--seed", type=int, default=0)
    flag("--log_iters", type=positive, default=5, help="steps between two log lines")
    flag("--experiment_name", help="start of the run folder's name; the settings are appended")
    flag("--experiment_dir", type=Path, help="the run folder, or with --experiment_name its parent")
    flag("--no_save", action="store_true", help="write no checkpoints")
    flag("--save_interval", type=positive, help="optimizer steps between checkpoints, besides those at an epoch's end")
    flag("--epoch_save_interval", type=positive, default=1, help="epochs between checkpoints")
    flag("--keep_last", type=positive, metavar="N", help="delete checkpoints but for the newest N and the best; default: keep all")
    flag("--keep_best", type=positive, metavar="N", help="with --keep_last, keep the best N as well")
    flag("--resume", metavar="SPEC", help=start.SPECS)
    flag("--resume_from", type=Path, metavar="DIR", help="resume from this run's folder: from its latest checkpoint, if nothing else is said")
    flag("--resume_epoch", type=positive, metavar="N", help="resume from the last checkpoint of N completed epochs")
    flag("--check_resume", action="store_true", help="compare what was restored with what is stored")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def read_arguments(argv: Sequence[str], journal: Journal) -> tuple[list[str], Start]:
    """The command line over ``--config_path`` over the settings of the checkpoint that is resumed, if one is; and where to begin.

    A resumed run goes on in its own folder, or in the one that the command line names if the checkpoint is elsewhere.
    Raises :class:`~engine.errors.CheckpointNotFound` saying what there is instead.
    """
    parser = make_parser()
    given = list(argv)
    if path := parser.parse_args(given).config_path:
        from_file, unknown = parser.as_tokens(read_yaml(path))
        given = [*from_file, *given]
        for name in unknown:
            journal.line(f"{path}: {name} is no setting of this recipe and has no effect")
    args = parser.parse_args(given)
    run_dir, what = start.what_to_resume(args, run_folder(args))
    found = start.find_step(run_dir, what, journal.line) if what else None
    begin = Start(run_folder(args).absolute())
    if found:
        step, before = found
        journal.line(f"resuming {step}")
        given = [*parser.as_tokens(before)[0], *given]
        args = parser.parse_args(given)
        start.refuse_other_networks(ARCHITECTURE, settings(args), before)
        named = run_folder(args).absolute() if args.experiment_name or args.experiment_dir else step.parent
        begin = Start(named, step)
    if args.keep_best and not args.keep_last:
        raise UsageError("--keep_best has no effect without --keep_last: all checkpoints are kept")
    if not args.no_save and not (begin.step and begin.run_dir.resolve() == begin.step.parent.resolve()):
        start.refuse_to_overwrite(begin.run_dir)
    return given, begin


def run(argv: Sequence[str], world: World) -> None:
    """Rank 0 reads and looks up; all go by what it found: files may differ between machines, or change meanwhile."""
    journal = Journal(speaks=world.rank == 0)

    def read() -> list[Any]:
        tokens, begin = read_arguments(argv, journal)
        return [tokens, str(begin.run_dir), str(begin.step) if begin.step else ""]

    try:
        tokens, run_dir, step = world.ranks.first("read the settings and find the checkpoint", read)
        train(make_parser().parse_args(tokens), Start(Path(run_dir), Path(step) if step else None), world, journal)
    finally:
        journal.close()


def main(argv: Sequence[str]) -> int:
    try:
        make_parser().parse_args(argv)  # says what is wrong with it at once, before any rank waits for another
        with launched() as world:
            run(argv, world)
    except EngineError as e:
        print(f"causvid: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
