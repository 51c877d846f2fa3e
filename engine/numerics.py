"""What decides the last bits of a computation beside its operands: recorded with each checkpoint, and compared on resume."""

import functools
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def environment() -> dict[str, Any]:
    """Return this process's numerical environment, as plain values by name."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        **_fixed(),
        "threads": torch.get_num_threads(),
        "torch.nn.functional.linear": _place(torch.nn.functional.linear),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "flush_denormal": bool(torch.tensor([1e-310], dtype=torch.float64, device="cpu").mul(1.0).item() == 0.0),
        "cuda.matmul.allow_bf16_reduced_precision_reduction": bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "cuda.matmul.allow_fp16_reduced_precision_reduction": bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
        "cudnn.enabled": bool(cudnn.enabled),
        "cudnn.benchmark": bool(cudnn.benchmark),
        "cudnn.deterministic": bool(cudnn.deterministic),
        **{f"${name}": value for name in _VARIABLES if (value := os.environ.get(name))},
    }


_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO")


@functools.cache
def _fixed() -> dict[str, Any]:
    """What does not change while a process lives."""
    found = {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _place(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return what differs, worded, by name."""
    names = sorted(name for name in stored.keys() | present.keys() if stored.get(name) != present.get(name))
    return [f"{name} {stored.get(name, 'not set')} → {present.get(name, 'not set')}" for name in names]
