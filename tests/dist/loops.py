"""Loops over the data as README has them, under dropout, for test_loops.py."""

import gc
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from engine import ElasticSampler, Progress
from tests.now import Checkpointer

LENGTH, BATCH, EPOCHS, SAVE_AT = 44, 8, 2, 3


class Rows(Dataset):
    """[8] float32 a row. ``noisy``: with what a worker draws, as an augmentation would."""

    def __init__(self, noisy: bool = False):
        self.rows = torch.randn(LENGTH, 8, generator=torch.Generator().manual_seed(5))
        self.noisy = noisy

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.random() if self.noisy else 0.0
        return (self.rows[index] + noise).float()


def _make(engine, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    if engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(seed + 1 + dist.get_rank())  # each rank has dropout of its own
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def _batches(loader, *, bounded):
    if not bounded:
        yield from loader
        return
    iterator = iter(loader)
    for _ in range(len(loader)):
        yield next(iterator)


def train(run, engine, *, bounded, workers, resumes, save_at=SAVE_AT, noisy=False):
    """Return the losses of each step after ``save_at``, of this rank."""
    member = _make(engine, seed=77 if resumes else 0)
    model, optimizer = member
    data = Rows(noisy)
    sampler = ElasticSampler(data, global_batch_size=BATCH, seed=0, drop_last=False)
    ckpt = Checkpointer(run, member, data=sampler)
    progress = ckpt.resume("latest", missing="error" if resumes else "fresh")
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, multiprocessing_context="fork" if workers else None)
    losses = {}
    while progress.epoch < EPOCHS:
        for batch in _batches(loader, bounded=bounded):
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.advance()
            if progress.step > save_at:
                losses[progress.step] = loss.item()
            if progress.step == save_at and not resumes:
                ckpt.save(progress)
        progress.epoch += 1
    ckpt.close()
    return losses


def workers_collect_what_they_inherit(run):
    """Save after forked processes have collected checkpointers that the rank has left behind. Returns the steps that are there."""
    gc.collect()
    gc.disable()
    torch.manual_seed(0)
    try:
        for number in range(4):
            left = Checkpointer(f"{run}/left_{number}", nn.Linear(2, 2), timeout_seconds=20)
            left.itself = left
        del left
        for _ in range(6):
            if not (child := os.fork()):
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
    finally:
        gc.enable()
    Checkpointer(f"{run}/run", nn.Linear(2, 2), timeout_seconds=20).save(Progress(step=1))
    return os.listdir(f"{run}/run")
