"""Seeds of a loader's workers, drawn without moving the random state of training."""

import threading

import numpy as np
import torch


class LoaderSeeds:
    """A ``DataLoader`` draws the seed of its workers from PyTorch's generator as it makes an iterator, right after it has asked its
    sampler for one. That would move the random state of training, and a resume in mid-epoch makes one iterator more.

    So the generator's state is set aside until a first batch is asked for. What is drawn in between depends on the sampler's seed, the
    rank and the position: workers draw differently in each epoch, and alike after a resume at its start.
    """

    def __init__(self) -> None:
        self._aside: tuple[torch.Tensor, int] | None = None  # the state, and the seed that is in force meanwhile

    def begin(self, *words: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # training may draw at the same moment
        state = self._aside[0] if self._aside is not None and self._is_in_force() else torch.default_generator.get_state()
        seed = int(np.random.SeedSequence([word % 2**64 for word in words]).generate_state(1, dtype=np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        self._aside = (state, seed)

    def end(self) -> None:
        if self._aside is not None and self._is_in_force():
            torch.default_generator.set_state(self._aside[0])
        self._aside = None

    def _is_in_force(self) -> bool:
        """Unless the caller has seeded the generator meanwhile."""
        return self._aside is not None and torch.default_generator.initial_seed() == self._aside[1]


loader_seeds = LoaderSeeds()
"""Of the process, as the generator is."""
