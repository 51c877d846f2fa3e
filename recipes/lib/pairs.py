"""Pairs of text and audio codes with the prompt's condition and emotion: one JSON object a line, arrays in ``.npy`` files beside it."""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from engine.errors import UsageError
from recipes.lib.indextts import IndexTTSConfig

Name = Annotated[str, Meta(min_length=1)]
Length = Annotated[int, Meta(ge=1)]


class Pair(Struct, frozen=True):
    """A manifest's line; keys besides these are left alone. Paths are relative to the manifest's folder."""

    id: Name
    prompt_condition_path: Name
    target_text_ids_path: Name
    target_codes_path: Name
    target_text_len: Length
    target_code_len: Length
    prompt_emo_vec_path: str | None = None
    target_emo_vec_path: str | None = None

    @property
    def emo_field(self) -> str:
        """The prompt's emotion goes before the target's."""
        return "prompt_emo_vec_path" if self.prompt_emo_vec_path else "target_emo_vec_path"


class Pairs(Dataset[dict[str, Tensor]]):
    """A manifest's pairs: ``text_ids [text_len]`` and ``codes [code_len]`` int64, ``conditions [C, D]`` and ``emo [D]`` float32.

    All lines and the headers of all files are checked here, ids too: raises :class:`~engine.errors.UsageError` naming manifest, line and
    field.
    """

    def __init__(self, manifest: Path, config: IndexTTSConfig) -> None:
        self.manifest, self.config = manifest, config
        self.pairs: list[Pair] = []
        try:
            lines = manifest.read_bytes().split(b"\n")
        except OSError as e:
            raise UsageError(f"{manifest}: the manifest cannot be read: {e}") from e
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self.pairs.append(self._checked(line))
            except ValueError as e:  # msgspec's are, and numpy's
                raise UsageError(f"{manifest}, line {number}: {e}") from e
        if not self.pairs:
            raise UsageError(f"{manifest}: no pairs in it (one JSON object a line, empty lines do not count)")

    def _checked(self, line: bytes) -> Pair:
        """Raises ValueError."""
        pair, config = msgspec.json.decode(line, type=Pair), self.config
        if not getattr(pair, pair.emo_field):
            raise ValueError("prompt_emo_vec_path or target_emo_vec_path must name the file of an emotion vector")
        for field, positions in (("target_text_len", config.text_positions), ("target_code_len", config.mel_positions)):
            if getattr(pair, field) > positions - 2:  # start and stop have positions too
                raise ValueError(f"{field} is {getattr(pair, field)}; the model has positions for {positions - 2}: shorten or drop the pair")
        self._check_file(pair, "prompt_condition_path", np.float32, (config.conditions, config.width))
        self._check_file(pair, pair.emo_field, np.float32, (config.width,))
        self._check_file(pair, "target_text_ids_path", np.int32, (pair.target_text_len,), ids=config.text_vocab)
        self._check_file(pair, "target_codes_path", np.int32, (pair.target_code_len,), ids=config.codes)
        return pair

    def _check_file(self, pair: Pair, field: str, dtype: type, shape: tuple[int, ...], ids: int | None = None) -> None:
        path = self._path(pair, field)
        try:
            array = np.lib.format.open_memmap(path, mode="r")  # the header alone is read; a file shorter than it says is a ValueError
        except (OSError, ValueError) as e:
            raise ValueError(f"{field}: {path} cannot be read as an .npy file: {e}") from e
        if (array.dtype, array.shape) != (np.dtype(dtype), shape):
            expected = f"{np.dtype(dtype)} {list(shape)}"
            raise ValueError(f"{field}: {path} holds {array.dtype} {list(array.shape)}; by the manifest and the model it must be {expected}")
        if ids is not None and (array.min() < 0 or array.max() >= ids):
            raise ValueError(f"{field}: {path} has ids {array.min()} to {array.max()}; the model knows 0 to {ids - 1}")

    def _path(self, pair: Pair, field: str) -> Path:
        return self.manifest.parent / getattr(pair, field)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]

        def load(field: str) -> Tensor:
            return torch.from_numpy(np.load(self._path(pair, field), allow_pickle=False))

        return {
            "text_ids": load("target_text_ids_path").long(),
            "codes": load("target_codes_path").long(),
            "conditions": load("prompt_condition_path"),
            "emo": load(pair.emo_field),
        }

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch as :meth:`recipes.lib.indextts.IndexTTS.forward` takes it, padded on the right with zeros.

        Without samples (a rank's share of an epoch's last batch) a blank pair of length −1: no tokens, a loss of 0 and gradients of 0,
        as every rank must take part in every step.
        """
        if not samples:
            ids, length = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([-1])
            conditions = torch.zeros(1, self.config.conditions, self.config.width)
            return {"text_ids": ids, "text_len": length, "codes": ids, "code_len": length, "conditions": conditions, "emo": conditions[:, 0]}
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("conditions", "emo")}
        for name, length in (("text_ids", "text_len"), ("codes", "code_len")):
            ids = [sample[name] for sample in samples]
            batch |= {name: pad_sequence(ids, batch_first=True), length: torch.tensor([len(one) for one in ids])}
        return batch
