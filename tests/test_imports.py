"""What may be imported where: promises that hold for every module of engine/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).parent.parent / "engine"
MODULES = sorted(ENGINE.rglob("*.py"))
_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("module", ["catalog", "errors", "writer"])
def test_listing_runs_and_the_writer_process_start_without_torch(module):
    code = f"import engine.{module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ENGINE)))
def test_nothing_in_the_engine_can_unpickle(path):
    """Loading never executes code from the checkpoint: there is no pickle, no torch.load, no eval to be reached. An export may write with
    torch.save; nothing here reads what it wrote."""
    forbidden = {"torch.load", "torch.save", "torch.jit.load", "eval", "exec", "__import__", "np.load", "numpy.load"}
    if path == ENGINE / "export.py":
        forbidden -= {"torch.save"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & _PICKLES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in _PICKLES, ast.unparse(node)
            assert node.module != "torch" or not {alias.name for alias in node.names} & {"load", "save"}, ast.unparse(node)
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in forbidden, ast.unparse(node)


def test_every_error_is_one_of_the_tree_with_an_exit_code_of_its_own():
    from engine import errors

    kinds = errors.EngineError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert not {0, 1} & set(codes)
    assert all(errors.error_class(kind.__name__) is kind for kind in kinds)
    assert errors.error_class("ValueError") is errors.PeerError
