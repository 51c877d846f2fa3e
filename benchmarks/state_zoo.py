"""No piece of training state is lost silently: every optimizer, scheduler, scaler, sampler, average, metric and stateful module of PyTorch and
the packages around it (``pip install -e .[zoo]``) is saved, and resumed in a fresh process.

Each subject trains three steps, is saved, and trains three more. A different process builds it again from a different seed, resumes, and
must have the same state, type by type and bit by bit, and the same next three losses. The references are written with ``torch.save``, so
that they do not depend on the engine. Outcomes:

- ``exact``: so it is.
- ``refused_at_attach``: the Checkpointer, the first step under it or the first save raises.
- ``refused_later``: the resume raises.
- ``reported``: all that the object lists is back, but it does not list all that it trains with, so that its own ``state_dict``
  does not resume it either; the save reported what it left out.
- ``wrong``: the resume returns, but state or losses differ.
- ``untrainable``: it does not train here without the engine either. It is not counted as tried.

``own_state_dict_wrong``: its own ``state_dict`` and ``load_state_dict`` do not resume it exactly either. ``lost_attributes``: attributes that
its steps change and a resume does not restore; these are told, and count only where they change a loss.

The environment variable STATE_ZOO_ONLY, a regular expression of ``family/subject``, limits the run to those.
"""

import collections
import contextlib
import enum
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Result, Row, main
from benchmarks.state_subjects import ABSENT, BATCH, SUBJECTS, Rig
from engine import Checkpointer, Progress
from engine.errors import EngineError

STEPS = 3
LIMIT_SECONDS = 60.0
AT_ONCE = 2
_TOO_LONG = "it takes too long"
OUTCOMES = ("exact", "refused_at_attach", "refused_later", "reported", "wrong")

# ------------------------------------------------------------------------------------------------------------------- state as plain values

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray, np.generic)
_NO_STATE = {"optimizer", "optimizers", "base_optimizer", "param_groups", "state", "defaults", "_zero_grad_profile_name", "_modules", "_parameters"}
_BOOKKEEPING = re.compile(r"hook|_warned|_opt_called|_step_profile|^step$|_buffers|^_compile")


def plain(value: Any, depth: int = 8) -> Any:
    """A copy that can be pickled and compared: no parameters, functions or modules are in it, tensors are cloned."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        return ("sparse", plain(tensor.coalesce().indices()), plain(tensor.coalesce().values())) if tensor.is_sparse else tensor.clone()
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
        return value
    if depth == 0:
        return f"<{type(value).__qualname__}>"
    if isinstance(value, dict):
        return {_key(key, i): plain(inner, depth - 1) for i, (key, inner) in enumerate(value.items())}
    if isinstance(value, list | tuple):
        copied = [plain(inner, depth - 1) for inner in value]
        return copied if isinstance(value, list) else tuple(copied)
    if isinstance(value, collections.deque):
        return {"deque": [plain(inner, depth - 1) for inner in value], "maxlen": value.maxlen}
    if isinstance(value, set | frozenset):
        return {"set": sorted(map(repr, value))}
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.nn.Module):
        return plain(value.state_dict(), depth - 1)
    if isinstance(value, enum.Enum | torch.dtype | torch.device | torch.layout):
        return repr(value)
    if callable(value) or isinstance(value, torch.optim.Optimizer) or not hasattr(value, "__dict__"):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return {"class": type(value).__qualname__, **{k: plain(v, depth - 1) for k, v in vars(value).items() if not isinstance(v, torch.optim.Optimizer)}}


def _key(key: Any, number: int) -> Any:
    return key if isinstance(key, str | int | float | bool | tuple | None) else f"<{type(key).__name__} {number}>"


def differences(saved: Any, found: Any, path: str = "") -> Iterator[str]:
    """What differs, as ``path: how``."""
    subclasses = any(isinstance(saved, kind) and isinstance(found, kind) for kind in (torch.Tensor, dict))
    if type(saved) is not type(found) and not subclasses:
        yield f"{path}: {_short(saved)} became {_short(found)}"
    elif isinstance(saved, dict):
        for key in [*saved, *(key for key in found if key not in saved)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield f"{inner}: missing ({_short(saved[key])})"
            elif key not in saved:
                yield f"{inner}: added ({_short(found[key])})"
            else:
                yield from differences(saved[key], found[key], inner)
    elif isinstance(saved, list | tuple):
        if len(saved) != len(found):
            yield f"{path}: {len(saved)} entries became {len(found)}"
        for i, (a, b) in enumerate(zip(saved, found, strict=False)):
            yield from differences(a, b, f"{path}.{i}")
    elif isinstance(saved, torch.Tensor | np.ndarray):
        if _short(saved) != _short(found):
            yield f"{path}: {_short(saved)} became {_short(found)}"
        elif not _same_bits(torch.as_tensor(saved), torch.as_tensor(found)):
            yield f"{path}: other values"
    elif repr(saved) != repr(found):  # of a float all its bits
        yield f"{path}: {_short(saved)} became {_short(found)}"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)) if a.numel() else True


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, bool | int | float | np.generic):
        return f"{type(value).__name__} {value!r}"
    return repr(value)[:60] if isinstance(value, str | None) else type(value).__name__


def state_of(part: Any) -> Any:
    if hasattr(part, "consolidate_state_dict"):  # a ZeroRedundancyOptimizer has none before
        part.consolidate_state_dict()
    return part.state_dict()


def states(rig: Rig) -> dict[str, Any]:
    """Everything that must come back."""
    found = {name: plain(state_of(part)) for name, part in rig.parts().items() if name not in rig.lazy}
    groups = getattr(rig.optimizer, "param_groups", [])
    return {**found, "rates": [plain(group.get("lr")) for group in groups]}


def attributes(rig: Rig) -> dict[str, Any]:
    """What the subject keeps in attributes that its state dict does not list."""
    found: dict[str, Any] = {}
    for path, module in rig.module.named_modules():
        found |= {f"module.{path}.{key}": plain(value, 3) for key, value in vars(module).items() if not key.startswith("_")}
    for name, part in rig.parts().items():
        if name == "module" or name in rig.lazy:
            continue
        listed = set(state_of(part))
        for key, value in vars(part).items():
            if key not in _NO_STATE and key not in listed and not _BOOKKEEPING.search(key):
                found[f"{name}.{key}"] = plain(value, 3)
    return found


# ---------------------------------------------------------------------------------------------------------------------- what a process does


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _rng() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _build(name: str, number: int) -> Rig:
    seed(number)
    return SUBJECTS[name]()


def _train(rig: Rig, first: int) -> list[Any]:
    return [plain(rig.train(step)) for step in range(first, first + STEPS)]


def alone(name: str, folder: str) -> Row:
    """Without the engine: whether it trains, how its state is made, and the reference for its own ``state_dict``."""
    rig = _build(name, 1)
    before, groups = attributes(rig), _groups(rig)
    _train(rig, 0)
    rig.pause()
    anatomy = _anatomy(rig, before, groups)
    reference = states(rig)
    try:
        torch.save({key: state_of(part) for key, part in rig.parts().items()}, f"{folder}/own.pt")
        own = ""
    except Exception as e:  # noqa: BLE001
        own = f"its state_dict cannot be pickled: {e!r}"
    rng = _rng()
    return {"anatomy": anatomy, "own": own, "reference": reference, "rng": rng, "losses": _train(rig, STEPS), "final": states(rig)}


def save(name: str, folder: str) -> Row:
    """Under the engine, up to and past a save."""
    stage = "attach"
    rig = _build(name, 1)
    log = logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)
    logging.getLogger("engine").addHandler(log)
    try:
        checkpointer = Checkpointer(f"{folder}/run", rig.model, max_in_flight=0, **rig.members)
        stage = "train"
        _train(rig, 0)
        rig.pause()
        reference, kept = states(rig), attributes(rig)
        stage = "save"
        checkpointer.save(Progress(step=STEPS, samples=STEPS * BATCH))
    except Exception as e:  # noqa: BLE001
        return {"failed": stage, "error": _told(e), "worded": isinstance(e, EngineError)}
    torch.save(reference, f"{folder}/oracle.pt")
    with open(f"{folder}/attributes.pkl", "wb") as file:
        pickle.dump(kept, file)
    left_out = [one.getMessage() for one in log.buffer if one.getMessage().startswith("not saved, since")]
    return {"reference": reference, "losses": _train(rig, STEPS), "final": states(rig), "left_out": left_out}


def resume(name: str, folder: str) -> Row:
    """In a fresh process, from a different seed."""
    rig = _build(name, 2)
    try:
        Checkpointer(f"{folder}/run", rig.model, max_in_flight=0, **rig.members).resume()
    except Exception as e:  # noqa: BLE001
        return {"failed": "resume", "error": _told(e), "worded": isinstance(e, EngineError)}
    with open(f"{folder}/attributes.pkl", "rb") as file:
        lost = sorted(differences(pickle.load(file), attributes(rig)))
    return {"lost": lost, **_go_on(rig, torch.load(f"{folder}/oracle.pt", weights_only=False))}


def own(name: str, folder: str) -> Row:
    """As :func:`resume`, with the subject's own ``load_state_dict``."""
    rig = _build(name, 2)
    stored = torch.load(f"{folder}/own.pt", weights_only=False)
    try:
        for key, part in rig.parts().items():
            part.load_state_dict(stored[key])
            if hasattr(part, "seek"):
                part.seek(STEPS * BATCH)
    except Exception as e:  # noqa: BLE001
        return {"failed": "load_state_dict", "error": _told(e)}
    with open(f"{folder}/alone", "rb") as file:
        reference = pickle.load(file)
    python, numpy, generator = reference["rng"]
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(generator)
    return _go_on(rig, reference["reference"])


def _go_on(rig: Rig, reference: dict[str, Any]) -> Row:
    """The state now, and the next losses and the state after them, as far as it trains."""
    row: Row = {"state": list(differences(reference, states(rig)))}
    try:
        row |= {"losses": _train(rig, STEPS), "final": states(rig)}
    except Exception as e:  # noqa: BLE001
        row |= {"failed": "train", "error": _told(e)}
    return row


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def _groups(rig: Rig) -> list[dict[str, Any]]:
    return [{k: plain(v) for k, v in group.items() if k != "params"} for group in getattr(rig.optimizer, "param_groups", [])]


def _anatomy(rig: Rig, before: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Where an optimizer keeps what its steps change."""
    optimizer = rig.optimizer
    after, added, changed = _groups(rig), dict[str, str](), dict[str, str]()
    for old, new in zip(groups, after, strict=True):
        added |= {key: _short(value) for key, value in new.items() if key not in old}
        changed |= {key: _short(value) for key, value in new.items() if key in old and any(differences(old[key], value))}
    kinds: dict[str, set[str]] = {}
    foreign: dict[str, str] = {}
    parameters = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    state = getattr(optimizer, "state", {})
    for key, value in state.items() if isinstance(state, dict) else ():
        if id(key) not in parameters:
            foreign[str(_key(key, 0))] = _short(value)
        elif isinstance(value, dict):
            for inner, held in value.items():
                kinds.setdefault(str(inner), set()).add(_kind(held))
    dicts = {
        name: sorted(set(map(str, state_of(part))) - {"state", "param_groups"}) if name == "optimizer" else [] for name, part in rig.parts().items()
    }
    hidden = {key: _short(value) for key, value in attributes(rig).items() if key not in before or any(differences(before[key], value))}
    return {
        "group_keys_added": added,
        "group_keys_changed": changed,
        "state_kinds": {key: sorted(found) for key, found in kinds.items()},
        "state_of_no_parameter": foreign,
        "state_dict_further_keys": dicts["optimizer"],
        "state_dict_overridden": type(optimizer).state_dict is not torch.optim.Optimizer.state_dict,
        "load_state_dict_overridden": type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict,
        "attributes_changed": hidden,
    }


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{value.ndim}d" if value.ndim else "tensor0d"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {'/'.join(sorted({_kind(inner) for inner in value})) or 'nothing'}"
    if isinstance(value, dict):
        return f"dict of {'/'.join(sorted({_kind(inner) for inner in value.values()})) or 'nothing'}"
    return type(value).__name__


PHASES: dict[str, Callable[[str, str], Row]] = {"alone": alone, "save": save, "resume": resume, "own": own}


def _work(phase: str, name: str, folder: str) -> None:
    """One process's whole life. What packages print goes nowhere."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        row = PHASES[phase](name, folder)
    except Exception as e:  # noqa: BLE001
        row = {"failed": "build or train", "error": _told(e)}
    with open(f"{folder}/{phase}.part", "wb") as file:
        pickle.dump(row, file)
    os.rename(f"{folder}/{phase}.part", f"{folder}/{phase}")


# ---------------------------------------------------------------------------------------------------------------------------- the verdicts


class _Processes:
    """Fresh ones, forked from a server that has imported everything and computed nothing."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.state_zoo"])

    def run(self, phase: str, name: str, folder: str, until: float) -> Row:
        process = self._context.Process(target=_work, args=(phase, name, folder))
        process.start()
        process.join(max(1.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            return {"failed": "time", "error": _TOO_LONG}
        if not os.path.exists(f"{folder}/{phase}"):
            return {"failed": "process", "error": f"its process ended with exit code {process.exitcode}"}
        with open(f"{folder}/{phase}", "rb") as file:
            return pickle.load(file)


def judge(processes: _Processes, name: str) -> Row:
    """On a machine that is busy with other things a subject may need longer: it is given three times the limit once."""
    began = time.monotonic()
    for limit_seconds in (LIMIT_SECONDS, 3 * LIMIT_SECONDS):
        folder = tempfile.mkdtemp(prefix="state_zoo_")
        row = _judge(processes, name, folder, time.monotonic() + limit_seconds)
        shutil.rmtree(folder, ignore_errors=True)
        if _TOO_LONG not in row["reason"]:
            break
    return {**row, "seconds": round(time.monotonic() - began, 2)}


def _judge(processes: _Processes, name: str, folder: str, until: float) -> Row:
    family, _, subject = name.partition("/")
    row: Row = {"family": family, "subject": subject, "outcome": "", "reason": "", "own_state_dict_wrong": "", "lost_attributes": ""}
    first = processes.run("alone", name, folder, until)
    if "failed" in first:
        return {**row, "outcome": "untrainable", "reason": first["error"]}
    row["anatomy"] = first["anatomy"]
    row["own_state_dict_wrong"] = first["own"] or "; ".join(_wrong(processes.run("own", name, folder, until), first)[:3])
    saved = processes.run("save", name, folder, until)
    if "failed" in saved:
        return {**row, "outcome": "refused_at_attach", "reason": f"{saved['failed']}: {saved['error']}", "worded": saved.get("worded", False)}
    if disturbed := list(differences([first["reference"], first["losses"]], [saved["reference"], saved["losses"]])):
        return {**row, "outcome": "wrong", "reason": f"under the engine it trains otherwise: {disturbed[0]}", "differences": disturbed[:20]}
    resumed = processes.run("resume", name, folder, until)
    if resumed.get("failed") in ("resume", "process", "time"):
        return {**row, "outcome": "refused_later", "reason": resumed["error"], "worded": resumed.get("worded", False)}
    row["lost_attributes"] = "; ".join(line for line in resumed.get("lost", []) if _is_counted(line, first["anatomy"]))
    wrong = _wrong(resumed, saved)
    is_reported = bool(saved["left_out"]) and bool(row["own_state_dict_wrong"]) and not resumed.get("state")
    return {
        **row,
        "outcome": "exact" if not wrong else "reported" if is_reported else "wrong",
        "reason": "" if not wrong else saved["left_out"][0] if is_reported else wrong[0],
        "differences": wrong[:40],
        "causes": _causes(wrong),
    }


def _is_counted(line: str, anatomy: dict[str, Any]) -> bool:
    return any(line.startswith(name) for name in anatomy["attributes_changed"])


def _wrong(resumed: Row, saved: Row) -> list[str]:
    """Everything that is not as in the run that went on."""
    found = list(resumed.get("state", []))
    if "failed" in resumed:
        return [*found, f"{resumed['failed']}: {resumed['error']}"]
    found += (f"losses{line}" for line in differences(saved["losses"], resumed["losses"]))
    found += (f"three steps later {line}" for line in differences(saved["final"], resumed["final"]))
    return found


def _causes(lines: list[str]) -> list[str]:
    """The differences right after the resume without numbers, each once; the losses where there is none."""
    first = [line for line in lines if not line.startswith(("losses", "three steps"))] or lines[:1]
    return list(dict.fromkeys(re.sub(r"(?<=[.\[ ])-?\d+(\.\d+)?(e-?\d+)?\b", "*", line) for line in first))[:12]


def _sample(names: list[str], quick: bool) -> list[str]:
    """Every tenth of a family, and the first."""
    if not quick:
        return names
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.partition("/")[0], []).append(name)
    return [name for found in families.values() for name in found[::10]]


def _build_operators() -> None:
    """DeepSpeed compiles its CPU operators at first use, for longer than a subject may take."""
    with contextlib.suppress(Exception):
        from deepspeed.accelerator import get_accelerator

        accelerator: Any = get_accelerator()
        for builder in ("CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder", "FusedAdamBuilder", "ShareMemCommBuilder"):
            with contextlib.suppress(Exception):
                accelerator.create_op_builder(builder).load(verbose=False)


def measure(quick: bool) -> Result:
    only = os.environ.get("STATE_ZOO_ONLY", "")
    names = _sample([name for name in SUBJECTS if re.search(only, name)], quick)
    if any(name.startswith("deepspeed/") for name in names):
        _build_operators()
    processes = _Processes()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = []
        for i, row in enumerate(pool.map(lambda name: judge(processes, name), names)):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{i + 1} of {len(names)}", end="", file=sys.stderr)
    counts = collections.Counter(row["outcome"] for row in rows)
    tried = sum(counts[outcome] for outcome in OUTCOMES)
    for family, why in ABSENT.items():
        print(f"NOT TRIED: {family}: {why}")
    figures = {"tried": tried, **{outcome: counts[outcome] for outcome in OUTCOMES}, "untrainable": counts["untrainable"]}
    figures |= {"families_not_tried": len(ABSENT), "exact_share": counts["exact"] / max(tried, 1)}
    figures["lost_attributes"] = sum(bool(row["lost_attributes"]) for row in rows)
    figures["own_state_dict_wrong"] = sum(bool(row["own_state_dict_wrong"]) for row in rows)
    return rows, figures


if __name__ == "__main__":
    main(measure, __doc__, ("family", "subject", "outcome", "reason"))
