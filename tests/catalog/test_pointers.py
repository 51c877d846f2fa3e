"""``latest`` and ``best`` as files."""

import pytest

from engine.catalog import point_best
from engine.catalog.pointers import read_pointer
from engine.errors import StorageError
from engine.storage import LocalStorage
from tests.kill import dying, refuse

LEASE = ".lease_00000001"


def test_best_is_pointed_to_by_one_line(tmp_path):
    (tmp_path / LEASE).mkdir()
    for name in ("step_00000010", "step_00000020"):
        point_best(LocalStorage(tmp_path), name, LEASE)
        assert (tmp_path / "best").read_text() == f"{name}\n"
        assert read_pointer(LocalStorage(tmp_path), "best") == name


def test_a_pointer_that_names_the_step_already_is_not_written(tmp_path):
    (tmp_path / LEASE).mkdir()
    point_best(LocalStorage(tmp_path), "step_00000010", LEASE)
    with dying(None) as death:
        point_best(LocalStorage(tmp_path), "step_00000010", LEASE)
    assert not death.calls


def test_a_pointer_that_cannot_be_moved_stays(tmp_path, monkeypatch):
    (tmp_path / LEASE).mkdir()
    point_best(LocalStorage(tmp_path), "step_00000010", LEASE)
    refuse(monkeypatch, "replace")
    with pytest.raises(StorageError, match=r"cannot write .*best: Permission denied"):
        point_best(LocalStorage(tmp_path), "step_00000020", LEASE)
    assert list((tmp_path / LEASE).iterdir()) == []
    assert read_pointer(LocalStorage(tmp_path), "best") == "step_00000010"


@pytest.mark.parametrize("content", [None, b"", b"x" * 10_000])
def test_a_pointer_that_is_lost_names_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "best").write_bytes(content)
    assert read_pointer(LocalStorage(tmp_path), "best") == ""
