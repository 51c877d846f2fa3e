"""Two gloo ranks with different data: one step must be the step of one process that has both ranks' data."""

import os
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes import causvid
from recipes.lib.flow import FlowSchedule
from recipes.lib.lora import LoRALinear, add_lora, freeze_all_but_lora
from recipes.lib.parallel import trainable
from recipes.lib.wan import PRESETS, VideoDiT
from recipes.lib.world import World

pytestmark = pytest.mark.timeout(300)  # DeepSpeed may have to build its C++ op first
TINY = PRESETS["tiny"]
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
WORLD_SIZE = 2
sgd = partial(torch.optim.SGD, lr=1.0)  # whose step is the gradient itself


def make_networks() -> tuple[VideoDiT, VideoDiT, VideoDiT]:
    torch.manual_seed(0)
    student, critic, teacher = (VideoDiT(TINY, causal=causal) for causal in (True, False, False))
    add_lora(critic, 4)
    freeze_all_but_lora(critic)
    teacher.requires_grad_(False)
    for network in (student, critic, teacher):
        nn.init.normal_(network.head.head.weight, std=0.1)
        for module in network.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_B, std=0.1)
    return student, critic, teacher


def text_of(rank: int) -> Tensor:
    return torch.randn(2, TINY.text_tokens, TINY.text_dim, generator=torch.Generator().manual_seed(rank))


def student_loss(rank: int, student, critic, teacher) -> Tensor:
    torch.manual_seed(100 + rank)
    text, flow = text_of(rank), FlowSchedule()
    x = causvid.student_video(student, text, TINY, flow)
    return causvid.generator_loss(x, text, torch.zeros_like(text), critic, teacher, flow)


def critic_loss(rank: int, student, critic) -> Tensor:
    torch.manual_seed(200 + rank)
    text, flow = text_of(rank), FlowSchedule()
    with torch.no_grad():
        x = causvid.student_video(student, text, TINY, flow)
    return causvid.critic_loss(x, text, critic, flow)


def reference() -> dict[str, Tensor]:
    """Both networks' parameters after a step on both ranks' data."""
    student, critic, teacher = make_networks()
    after: dict[str, Tensor] = {}
    losses = {
        "student": [student_loss(r, student, critic, teacher) for r in range(WORLD_SIZE)],
        "critic": [critic_loss(r, student, critic) for r in range(WORLD_SIZE)],
    }
    for name, network in (("student", student), ("critic", critic)):
        changed = deepcopy(network)
        grads = torch.autograd.grad(sum(losses[name]) / WORLD_SIZE, [p for p in network.parameters() if p.requires_grad])
        with torch.no_grad():
            for parameter, grad in zip((p for p in changed.parameters() if p.requires_grad), grads, strict=True):
                parameter -= grad
        after |= {f"{name}.{k}": v.detach() for k, v in changed.named_parameters()}
    return after


def parameters_of(engine: str, name: str, module: nn.Module) -> dict[str, Tensor]:
    if engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            found = {k: v.detach().clone() for k, v in module.named_parameters()}
    else:
        found = {k: v.full_tensor() if isinstance(v, DTensor) else v.detach() for k, v in module.named_parameters()}
    return {f"{name}.{k.removeprefix('module.')}": v for k, v in found.items()}


def work(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    world = World(rank, WORLD_SIZE, torch.device("cpu"))
    for engine in ENGINES:
        student, critic, teacher = make_networks()
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1e9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(engine[-1]) if engine.startswith("zero") else 0},
        }
        wrap = partial(trainable, make_optimizer=sgd, engine=engine, world=world, max_norm=1e9, ds_config=settings)
        generator = wrap(student, blocks=student.blocks)
        fake = wrap(critic, blocks=critic.blocks)
        # Both losses before either step, as in the reference; each network's own backward and step.
        for network, loss in (
            (generator, student_loss(rank, generator, fake, teacher)),
            (fake, critic_loss(rank, generator, fake)),
        ):
            network.backward(loss)
        generator.step()
        fake.step()
        after = parameters_of(engine, "student", generator.module) | parameters_of(engine, "critic", fake.module)
        torch.save(after, f"{folder}/{engine}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stepped(tmp_path_factory) -> Path:
    """A folder with every engine's parameters after the step, as each rank has them."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD_SIZE)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return reference()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_on_two_ranks_is_the_step_on_all_their_data(stepped, expected, engine):
    initial = dict(zip(("student", "critic"), make_networks()[:2], strict=True))
    ranks = [torch.load(stepped / f"{engine}_{rank}.pt") for rank in range(WORLD_SIZE)]
    for name, wanted in expected.items():
        network, _, fqn = name.partition(".")
        start = initial[network].get_parameter(fqn).detach()
        assert torch.equal(ranks[0][name], ranks[1][name]), f"{name} differs between the ranks"
        torch.testing.assert_close(ranks[0][name] - start, wanted - start, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert set(ranks[0]) == set(expected)


def test_the_ranks_data_do_matter(expected):
    """Guards the test above: one rank's gradient alone is another step."""
    student, critic, teacher = make_networks()
    student_loss(0, student, critic, teacher).backward()
    name = "blocks.0.self_attn.v.weight"
    moved = expected[f"student.{name}"] - student.get_parameter(name).detach()
    alone = student.get_parameter(name).grad
    assert alone is not None
    assert (moved + alone).norm() > 0.1 * moved.norm()
