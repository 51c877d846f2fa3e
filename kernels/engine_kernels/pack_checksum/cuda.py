"""The library that ``make kernels`` builds of pack_checksum.cu, where it is built."""

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine_kernels.pack_checksum.tables import PIECE_BYTES, tables

PATH = Path(__file__).with_name("libpack_checksum.so")
ABI = 1
logger = logging.getLogger("engine_kernels")


@functools.cache
def library(device: torch.device) -> ctypes.CDLL | None:
    """None where it cannot be used: it is not built, does not load, or is for other GPUs than ``device``. Says so, once a device."""
    try:
        if torch.cuda.get_device_capability(device)[0] != 9:
            raise OSError(f"{PATH} is built for GPUs of compute capability 9.x")
        found = load(PATH)
    except OSError as error:
        logger.info("pack_checksum on %s: Triton, since %s", device, error)
        return None
    logger.info("pack_checksum on %s: %s", device, PATH)
    return found


def load(path: Path) -> ctypes.CDLL:
    """Raises OSError where it is not there, does not load or is of another version."""
    found = ctypes.CDLL(str(path))
    if (version := found.lockstep_abi()) != ABI:
        raise OSError(f"{path} is of version {version}, not {ABI}: run `make kernels` again")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    found.lockstep_pack_checksum.argtypes = [pointer, pointer, integer, integer, pointer, pointer]
    found.lockstep_pack_checksum_host.argtypes = [pointer, pointer, integer, integer, pointer]
    found.lockstep_pack_checksum_host.restype = None
    return found


def pack_checksum(library: ctypes.CDLL, sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor | None) -> Tensor:
    """As :func:`naive.pack_checksum`; of tensors on the CPU too. Raises RuntimeError where CUDA does not launch it."""
    device = sources[0].device
    rows, owners = tables(sources, offsets, image, device)
    sums = torch.zeros(len(sources), dtype=torch.int64, device=device)
    arguments = rows.data_ptr(), owners.data_ptr(), owners.numel(), PIECE_BYTES, sums.data_ptr()
    if device.type == "cpu":
        library.lockstep_pack_checksum_host(*arguments)
    elif error := library.lockstep_pack_checksum(*arguments, torch.cuda.current_stream(device).cuda_stream):
        raise RuntimeError(f"pack_checksum was not launched on {device}: CUDA error {error}")
    return sums
