"""What memory an image may take."""

import mmap

import pytest

from engine.transfer.staging import _free_bytes

GB = 10**9


def machine(root, available: int, groups: str, limits: dict[str, tuple[str, str, int]]) -> str:
    """What the files of a machine say; ``limits``: limit, use and reclaimable cache of each control group's folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, (limit, used, cache) in limits.items():
        path = root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder.startswith("memory") else ("memory.max", "memory.current")
        for name, text in zip(names, (limit, used), strict=True):
            (path / name).write_text(f"{text}\n")
        (path / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return f"{root}/"


V1 = "9:name=systemd:/job\n4:cpu,memory:/job/step\n"


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, 64 * GB),
        ("0::/job/step\n", {"job/step": ("max", "1", 0)}, 64 * GB),
        ("0::/job/step\n", {"job/step": (str(8 * GB), str(5 * GB), GB)}, 4 * GB),
        ("0::/job/step\n", {"job/step": ("max", "1", 0), "job": (str(8 * GB), str(5 * GB), 0)}, 3 * GB),
        ("0::/job/step\n", {"job/step": (str(4 * GB), str(2 * GB), 0), "job": (str(8 * GB), str(7 * GB), 0)}, GB),
        ("0::/of/the/host\n", {"": (str(8 * GB), str(2 * GB), 0)}, 6 * GB),
        ("0::/../sibling\n", {"": (str(8 * GB), str(2 * GB), 0)}, 6 * GB),
        (V1, {"memory/job/step": (str(8 * GB), str(2 * GB), 0), "cpu/job/step": (str(2 * GB), "0", 0)}, 6 * GB),
        ("0::/\n", {"": (str(2 * GB), str(3 * GB), 0)}, 0),
    ],
    ids=["no limit", "max", "own", "parent's", "the tightest", "a container's", "outside the name space", "version 1", "over it"],
)
def test_free_memory_is_what_the_machine_and_every_control_group_above_leaves(tmp_path, groups, limits, expected):
    assert _free_bytes(machine(tmp_path, 64 * GB, groups, limits)) == pytest.approx(expected, abs=1024)


def test_a_machine_that_says_nothing_is_asked_for_its_free_pages(tmp_path):
    assert _free_bytes(f"{tmp_path}/") >= mmap.PAGESIZE
