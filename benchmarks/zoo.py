"""A small transformer with every awkward shape, and one way to train it under each engine."""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.optimizers import OPTIMIZERS

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "ddp", "single")
GLOBAL_BATCH = 12  # divides by 1, 2, 3 and 4 ranks
VOCABULARY, WIDTH, LENGTH = 37, 16, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.odd, self.down = nn.Linear(WIDTH, 13), nn.Linear(13, 7), nn.Linear(7, WIDTH)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x_BTD)).split(WIDTH, -1)
        scores = (q @ k.transpose(-1, -2)) * WIDTH**-0.5
        mask = torch.full(scores.shape[-2:], float("-inf"), device=scores.device, dtype=scores.dtype).triu(1)
        x_BTD = x_BTD + self.out((scores + mask).softmax(-1) @ v)
        return x_BTD + self.down(F.gelu(self.odd(F.gelu(self.up(self.norm2(x_BTD))))))


class Zoo(nn.Module):
    """Tied embedding, LayerNorms, a 4-D convolution, a 7×13 matrix, 3-D and one-element parameters, odd biases, a frozen layer, a
    persistent and a non-persistent buffer; with ``unused`` a parameter that never gets a gradient."""

    def __init__(self, seed: int, unused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv2d(1, 3, (3, 2), padding=(1, 0))
        self.mix = nn.Parameter(torch.empty(2, 3, 5))
        self.gain = nn.Parameter(torch.empty(1))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen.weight.requires_grad_(False)
        if unused:
            self.unused = nn.Parameter(torch.empty(5, 3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # every value depends on the seed, norms and biases too
            for tensor in [*self.parameters(), self.shift]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (1.0 if tensor.ndim == 1 else 0.0))

    shift: torch.Tensor

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(ids_BT[:, :-1])
        c_BT = self.conv(x_BTD.unsqueeze(1)).mean((1, 3))
        x_BTD = x_BTD * self.gain + c_BT.unsqueeze(-1) + self.mix.sum() + self.shift.sum()
        x_BTD = x_BTD + 0.1 * self.frozen(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits = self.head(self.norm(x_BTD)).float()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), ids_BT[:, 1:].reshape(-1))


def batch(step: int, rank: int, world_size: int) -> torch.Tensor:
    ids_BT = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 + step))
    return ids_BT.chunk(world_size)[rank]


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": [p for p in trainable if p.ndim < 2], "lr": 1e-3, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Variant:
    """One way to use an engine, ``base`` of ENGINES. ``mesh`` names the dimensions of the ranks; two of them have 2 ranks in the
    first, the others in the second. ``wrap``: what is around the module, or around each of its blocks."""

    base: str
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    mesh: tuple[str, ...] = ()
    wrap: Literal["", "compiled", "compiled blocks", "recomputed blocks"] = ""
    optimizer: str = ""

    @property
    def stage(self) -> int:
        """-1 for what is not DeepSpeed's."""
        return int(self.base[4]) if self.base.startswith("zero") else -1


_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

VARIANTS = {engine: Variant(engine) for engine in ENGINES} | {
    "zero1_master": Variant("zero1", config={"data_types": {"grad_accum_dtype": "fp32"}}),  # BF16_Optimizer, under bf16
    "zero1_offload": Variant("zero1", _OFFLOAD),
    "zero2_offload": Variant("zero2", _OFFLOAD),
    "zero3_offload": Variant("zero3", _OFFLOAD),
    "zero2_cpu_adam": Variant("zero2", _OFFLOAD, optimizer="cpu_adam"),
    "zero3_cpu_adam": Variant("zero3", _OFFLOAD, optimizer="cpu_adam"),
    "zero3_hpz": Variant("zero3", {"zero_hpz_partition_size": 2}),
    "hsdp": Variant("fsdp2", mesh=("replicate", "shard")),
    "tp": Variant("single", mesh=("tp",)),
    "fsdp2_tp": Variant("fsdp2", mesh=("dp", "tp")),
    "ddp_compiled": Variant("ddp", wrap="compiled"),
    "fsdp2_compiled": Variant("fsdp2", wrap="compiled blocks"),
    "ddp_recomputed": Variant("ddp", wrap="recomputed blocks"),
    "fsdp2_recomputed": Variant("fsdp2", wrap="recomputed blocks"),
}

_LOW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trained:
    """A model under an engine: ``member`` and ``members`` are what a Checkpointer takes."""

    member: Any
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    step: Callable[[int], torch.Tensor]  # (step number) -> this rank's loss
    ids: Callable[[int], torch.Tensor]  # (step number) -> this rank's part of the batch
    members: dict[str, Any] = field(default_factory=dict)

    def global_loss(self, number: int) -> float:
        loss = self.step(number).detach().double()
        dist.all_reduce(loss)
        return (loss / dist.get_world_size()).item()

    def whole_parameters(self) -> dict[str, torch.Tensor]:
        """Gathered by the engine's own means, to check the checkpoint against. Every rank calls this."""
        found = {}
        for prefix, module in [("", self.module), *((f"{name}.", getattr(m, "module", m)) for name, m in self.members.items())]:
            named: Any = module.named_parameters()
            for name, p in named:
                with _gathered(p):
                    plain = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
                    found[prefix + plain] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        return found

    def numbers(self) -> dict[str, Any]:
        """What is no tensor and must come back exactly, read where the engine keeps it."""
        found: dict[str, Any] = {"scheduler.last_epoch": self.scheduler.last_epoch}
        for i, group in enumerate(self.optimizer.param_groups):
            found |= {f"group{i}.{k}": v for k, v in group.items() if k not in ("params", "foreach", "fused")}
        if hasattr(self.member, "zero_optimization_stage"):
            found |= {name: getattr(self.member, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")}
            wrapper = self.member.optimizer
            scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
            if getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False):
                found |= {f"scaler.{k}": v for k, v in vars(scaler).items() if type(v) in (bool, int, float)}
        return found

    def close(self) -> None:
        for member in (self.member, *self.members.values()):
            if hasattr(member, "destroy"):
                member.destroy()


def _gathered(parameter: Any, *, change: bool = False) -> contextlib.AbstractContextManager:
    if not hasattr(parameter, "ds_tensor"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0 if change else None)


def build(
    engine: str,
    seed: int,
    *,
    dtype: str = "fp32",
    unused: bool = False,
    optimizer: str = "adamw",
    ema: bool = False,
    accumulation: int = 1,
    zero: Mapping[str, Any] | None = None,
) -> Trained:
    """``engine`` is one of VARIANTS, ``optimizer`` one of OPTIMIZERS. All ranks of the default group call this.

    bf16, fp16: mixed precision with fp32 masters everywhere; DeepSpeed keeps frozen parameters and buffers in the low precision.
    ``ema``: an exponential moving average of the parameters, updated after each step, is a member beside the model.
    """
    variant = VARIANTS[engine]
    model = Zoo(seed, unused)
    average = copy.deepcopy(model).requires_grad_(False) if ema else None  # before an engine cuts the model
    make = OPTIMIZERS[variant.optimizer or optimizer]
    if variant.stage >= 0:
        trained = _deepspeed(model, variant, dtype, make, accumulation, zero or {})
    else:
        trained = _plain(model, variant, dtype, unused, make, accumulation)
    return _with_average(trained, average, variant) if average else trained


def _plain(model: Zoo, variant: Variant, dtype: str, unused: bool, make: Callable[..., torch.optim.Optimizer], accumulation: int) -> Trained:
    rank, size = _spread(model, variant, dtype)
    forward: Any = model
    if variant.base == "ddp":
        forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    if variant.wrap == "compiled":
        forward = _compile(forward)
    optimizer = make(param_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up)
    autocast = torch.autocast("cpu", _LOW[dtype], enabled=dtype != "fp32" and variant.base != "fsdp2")

    def ids(number: int) -> torch.Tensor:
        return batch(number, rank, size)

    def step(number: int) -> torch.Tensor:
        total = torch.zeros(())
        for part in ids(number).chunk(accumulation):
            with autocast:
                loss = forward(part) / accumulation
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    return Trained((forward, optimizer, scheduler), model, optimizer, scheduler, step, ids)


def _spread(model: Zoo, variant: Variant, dtype: str) -> tuple[int, int]:
    """Cut the model and wrap its blocks, in place. Returns which part of the batch is this rank's, and of how many."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    names, world_size = variant.mesh or ("dp",), dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world_size // 2) if len(names) == 2 else (world_size,), mesh_dim_names=names)
    for i, block in enumerate(model.blocks):
        if "tp" in names:
            _parallelize(block, mesh["tp"])
        if variant.wrap == "compiled blocks":
            model.blocks[i] = _compile(block)
        elif variant.wrap == "recomputed blocks":
            from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

            model.blocks[i] = checkpoint_wrapper(block)
    if variant.base == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=_LOW[dtype], reduce_dtype=torch.float32) if dtype != "fp32" else MixedPrecisionPolicy()
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh["dp"] if "tp" in names else mesh, mp_policy=policy)
    if "tp" not in names:
        return dist.get_rank(), world_size
    return (mesh.get_local_rank("dp"), mesh["dp"].size()) if "dp" in names else (0, 1)


def _parallelize(block: nn.Module, mesh: Any) -> None:
    """Every cut that a linear layer can have: rows of the weight with its bias, columns with a whole bias, both uneven."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rows, columns = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    parallelize_module(block, mesh, {"qkv": rows, "out": columns, "up": rows, "odd": columns, "down": rows})


def _compile(module: nn.Module) -> Any:
    torch._dynamo.reset()  # else it stops to compile after eight models of these classes, and runs them as they are
    return torch.compile(module, backend="eager")


def _deepspeed(
    model: Zoo, variant: Variant, dtype: str, make: Callable[..., torch.optim.Optimizer], accumulation: int, zero: Mapping[str, Any]
) -> Trained:
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {**_zero_options(variant), **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        **variant.config,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    weight = 1.0
    if dtype == "fp16":  # the first steps overflow: one uses up the hysteresis, the next halves the scale
        config["fp16"] = {"enabled": True, "initial_scale_power": 18, "hysteresis": 2, "loss_scale_window": 4}
        weight = 0.7  # the largest gradient is then 1.26 times fp16's maximum at 2**18, and 1.57 times below it at 2**17
    optimizer = make(param_groups(model))
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_up)
    with _on_any_cpu(dtype):
        wrapped = _initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)

    def ids(number: int) -> torch.Tensor:
        return batch(number, dist.get_rank(), dist.get_world_size())

    def step(number: int) -> torch.Tensor:
        total = torch.zeros(())
        for part in ids(number).chunk(accumulation):
            with _on_any_cpu(dtype):
                loss = wrapped(part)
                wrapped.backward(loss * weight)
                wrapped.step()
            total += loss.detach() / accumulation
        return total

    return Trained(wrapped, model, optimizer, scheduler, step, ids)


def _zero_options(variant: Variant) -> dict[str, Any]:
    options: dict[str, Any] = {"stage": variant.stage, **variant.zero}
    if variant.stage == 3:
        options |= {
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 700,
            "stage3_prefetch_bucket_size": 200,
            "stage3_max_live_parameters": 1000,
        }
        options["memory_efficient_linear"] = False  # it replaces F.linear for the whole process
    return options


def _initialize(**given: Any) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        warnings.simplefilter("ignore")
        return deepspeed.initialize(**given, dist_init_required=False)[0]


@contextlib.contextmanager
def _on_any_cpu(dtype: str) -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU without instructions for it, though PyTorch computes it on any, slowly. Only around what the
    zoo trains in fp16 is it told otherwise."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if dtype == "fp16":
        accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        vars(accelerator).pop("is_fp16_supported", None)


def _with_average(trained: Trained, average: Zoo, variant: Variant) -> Trained:
    """The average is cut as the model is, but whole where ZeRO cuts the optimizer's state only. Its loss counts for half."""
    from torch.distributed.fsdp import FSDPModule

    member: Any = average
    if variant.stage == 3:
        member = _initialize(model=average, config={"train_batch_size": GLOBAL_BATCH, "zero_optimization": _zero_options(variant)})
    elif variant.stage < 0:
        _spread(average, variant, "fp32")

    @torch.no_grad()
    def step(number: int) -> torch.Tensor:
        with torch.enable_grad():
            loss = trained.step(number)
        for module in (*average.modules(), *trained.module.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without gradient leaves the root gathered, and an update of that would be lost
        for mean, p in zip(average.parameters(), trained.module.parameters(), strict=True):
            with _gathered(p), _gathered(mean, change=True):
                mean.lerp_(p, 0.1)
        return (loss + member(trained.ids(number))) / 2

    return Trained(trained.member, trained.module, trained.optimizer, trained.scheduler, step, trained.ids, {"ema": member})


def _warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)
