"""What kernels become on an H100, found without one: Triton compiles for a target that is not there.

Triton's interpreter and its compiler cannot be had in one process, so ``compile_all`` compiles in one of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments. ``types``: ``*bf16``, ``i32``, ``fp32``, …; ``constants`` are compiled in (a dtype as
    ``tl.bfloat16``); ``aligned``: integers that are multiples of 16, as strides usually are. Pointers are aligned to 16 bytes unless they
    are in ``unaligned``."""

    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    aligned: Sequence[str] = ()
    unaligned: Sequence[str] = ()


@dataclass(frozen=True)
class Compiled:
    """``spilled_bytes`` of registers, that live in local memory; ``stack_bytes`` a thread; ``vector_loads`` and ``vector_stores``: 128-bit
    instructions on global memory; ``register_wgmma``: matrix instructions whose first operand comes from registers (miscompiled by some
    ptxas, fla-org/flash-linear-attention#1262); ``atomics`` of any kind."""

    kernel: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    vector_loads: int
    vector_stores: int
    register_wgmma: int
    atomics: int
    constants: Mapping[str, Any] = field(default_factory=dict)


def compile_all(cases: Sequence[Case], timeout_seconds: float = 110) -> list[Compiled]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    told = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, cwd=ROOT, input=told, capture_output=True, text=True, timeout=timeout_seconds, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def _compile(case: Case) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(case.module), case.kernel)
    constants = {name: getattr(tl, value[3:]) if str(value).startswith("tl.") else value for name, value in case.constants.items()}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else case.types[name]
        if name in case.aligned or (signature[name].startswith("*") and name not in case.unaligned):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case.num_warps})
    usage, ptx = _usage(made.asm["cubin"]), made.asm["ptx"]
    return Compiled(
        case.kernel,
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"LOCAL:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        vector_loads=len(re.findall(r"ld\.global[^;]*\.v(?:4\.b32|2\.b64|8\.)", ptx)),
        vector_stores=len(re.findall(r"st\.global[^;]*\.v(?:4\.b32|2\.b64|8\.)", ptx)),
        register_wgmma=len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx)),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
        constants=dict(case.constants),
    )


def _usage(cubin: bytes) -> str:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in what cuobjdump says: {text}"
    return int(found[1])


def main() -> None:
    cases = [Case(**case) for case in json.loads(sys.stdin.read())]
    print(json.dumps([asdict(_compile(case)) for case in cases]))


if __name__ == "__main__":
    main()
