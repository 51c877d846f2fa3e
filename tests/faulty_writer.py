"""A writer process with something wrong with it: ``python -m tests.faulty_writer FAULT FD``. The fault strikes when a file of step 2 is made.

``slow``: each write takes a while. ``raise``, ``full``: the storage refuses. ``die``: killed. ``hang``: never answers.
"""

import errno
import os
import signal
import sys
import time
from typing import Any

from engine import writer
from engine.storage import local


def main(fault: str, fd: int) -> None:
    real, write = local.LocalStorage.create, local._LocalWriter.write

    def create(self: local.LocalStorage, path: str, size_bytes: int = 0) -> Any:
        if "step_00000002" in path:
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "raise":
                raise RuntimeError("the disk is on fire")
            elif fault == "full":
                with local._told("write", path):
                    raise OSError(errno.ENOSPC, "No space left on device")
            elif fault == "hang":
                time.sleep(1000)
        return real(self, path, size_bytes)

    def slowly(self: local._LocalWriter, data: memoryview) -> None:
        time.sleep(0.3)
        write(self, data)

    local.LocalStorage.create = create  # type: ignore[method-assign]
    if fault == "slow":
        local._LocalWriter.write = slowly  # type: ignore[method-assign]
    writer.main(fd)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
