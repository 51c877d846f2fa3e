"""The ranks a recipe runs on, however it was started: ``deepspeed``, ``torchrun`` or plain ``python``."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import EngineError, PeerError
from engine.sync import Ranks, current_ranks

TIMEOUT = timedelta(minutes=30)  # generous: rank 0 may build DeepSpeed's C++ op while the others wait
LEAVE_SECONDS = 10.0


@dataclass(frozen=True)
class World:
    """Made on every rank alike; ``ranks`` keeps them in step where one may fail, or see what others do not."""

    rank: int
    size: int
    device: torch.device
    ranks: Ranks = field(default_factory=current_ranks)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Each scalar's mean over the ranks, summed in float64. Every rank calls this, with the same keys."""
        totals = torch.stack([v.detach().double().to(self.device) for v in values.values()])
        dist.all_reduce(totals)
        return dict(zip(values, (totals / self.size).tolist(), strict=True))

    def share_first(self, module: nn.Module) -> None:
        """Overwrite every rank's weights with rank 0's. Every rank calls this."""
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)

    def assert_equal(self, what: str, modules: Mapping[str, nn.Module]) -> None:
        """Compare the modules' bytes across ranks; a difference is every rank's error. Every rank calls this."""
        self.ranks.agree(what, lambda: {f"have another {name}": _digest(module) for name, module in modules.items()})


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def launched() -> Iterator[World]:
    """Join the process group the launcher prepared, or form one of a single rank; left at the end."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # As torchrun does. Small models lose by more, on a busy machine twentyfold, and sums would vary with the cores.
        torch.set_num_threads(1)
    with nullcontext() if "RANK" in os.environ else _alone():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        try:
            yield World(dist.get_rank(), dist.get_world_size(), device)
            _leave_together()
        except EngineError:
            _leave_together()
            raise
        finally:
            dist.destroy_process_group()


def _leave_together() -> None:
    """Rank 0 may host the store in which the others still read how a save or a resume ended: it does not leave before them."""
    with suppress(PeerError):  # some rank is gone: nobody is waited for longer
        current_ranks(LEAVE_SECONDS).gather("leave", lambda: None)


@contextmanager
def _alone() -> Iterator[None]:
    """The environment that a launcher would give a single rank."""
    # Port 0: the system picks a free one, and several runs can share a machine.
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    # The store already listens on the port: the process group joins it as a client, as under torchrun.
    given |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]
