"""Loads a step with stock PyTorch alone, in a process that never imports the package. Run with a step folder as argument.

With RANK and WORLD_SIZE set it fills DTensors sharded over the ranks, else plain tensors, and a stock AdamW.
"""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

warnings.simplefilter("ignore")
sys.modules["engine"] = None  # importing it is an error from here on


def main(step: str, expected_path: str) -> None:
    expected = torch.load(expected_path, weights_only=True)
    if "WORLD_SIZE" in os.environ:
        _dtensors(step, expected["tensors"])
    else:
        _plain(step, expected["tensors"])
        _optimizer(step, expected["losses"])


def _plain(step: str, tensors: dict[str, torch.Tensor]) -> None:
    state = {name: torch.full_like(value, -1) for name, value in tensors.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(step))
    for name, value in tensors.items():
        assert torch.equal(state[name], value), name


def _dtensors(step: str, tensors: dict[str, torch.Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: distribute_tensor(torch.full_like(value, -1), mesh, [Shard(0)]) for name, value in tensors.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(step))
    for name, value in tensors.items():
        found = state[name]
        assert isinstance(found, DTensor)
        assert torch.equal(found.full_tensor(), value), name


def _optimizer(step: str, losses: list[float]) -> None:
    """A stock model and AdamW filled by torch's own flattened names train on with the same losses."""
    from benchmarks.zoo import GLOBAL_BATCH, Zoo, batch, param_groups

    assert GLOBAL_BATCH == 12
    model = Zoo(seed=5)
    optimizer = torch.optim.AdamW(param_groups(model), betas=(0.9, 0.95))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model(batch(0, 0, 1)).backward()  # makes the optimizer state that is to be filled
    optimizer.step()
    optimizer.zero_grad()
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    buffers = {f"buffers.{name}": b for name, b in model.state_dict().items() if name == "shift"}
    states = {f"optim.{key}": value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    loaded = {**weights, **buffers, **states}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(step))
    flat.update({key.removeprefix("optim."): loaded[key] for key in states})
    set_optimizer_state_dict(model, optimizer, flat, options=options)
    for i, reference in enumerate(losses):
        for group, lr in zip(optimizer.param_groups, (3e-3, 1e-3), strict=True):
            group["lr"] = lr * min(1.0, (2 + i + 1) / 4)  # the schedule is not part of what stock torch loads
        loss = model(batch(2 + i, 0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - reference) <= 1e-6 * abs(reference), (loss.item(), reference)


if __name__ == "__main__":
    main(*sys.argv[1:])
