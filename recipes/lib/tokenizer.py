"""Sentencepiece BPE tokenizers, and their extension by pieces of another language that leaves the ids of the first as they are.

Ids 0 and 1 are the control pieces ``<s>`` and ``</s>``, where the model has its start and stop of text, and 2 is ``<unk>``: no piece of
text has an id that means something else to the model. There is no byte fallback: its 256 pieces would leave a vocabulary of 300 without
words, and every character of the text that is learned from is a piece anyway. Text is not normalized, so that it comes back as it was.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from engine.errors import UsageError

START, STOP, UNKNOWN = 0, 1, 2
NO_LIMIT = 1 << 20  # more pieces than any text here has
pb: Any = sentencepiece_model_pb2  # its classes are made at import: type checkers do not see them


def load(path: Path) -> SentencePieceProcessor:
    """Raises :class:`~engine.errors.UsageError` for a file that is no sentencepiece model."""
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        raise UsageError(f"tokenizer {path}: {'is no sentencepiece model' if path.is_file() else 'there is no such file'}: {e}") from e


def vocab_size(path: Path) -> int:
    """How many pieces the file's model has. Raises as :func:`load`."""
    return load(path).get_piece_size()


def train(lines: Iterable[str], size: int) -> SentencePieceProcessor:
    """A BPE model of ``size`` pieces. The same lines give the same bytes: one thread, and ties are broken by the piece.

    Raises :class:`~engine.errors.UsageError` naming the largest or smallest possible size, where the lines cannot give ``size`` pieces.
    """
    lines = list(lines)
    smallest = UNKNOWN + 1 + len(characters(lines))
    if size < smallest:
        raise UsageError(f"a tokenizer of {size} pieces: the text has more characters; the smallest possible size is {smallest}")
    model = _train(lines, size)
    if model.get_piece_size() < size:
        raise UsageError(f"a tokenizer of {size} pieces: the text is too short for that; the largest possible size is {model.get_piece_size()}")
    return model


def extend(base: SentencePieceProcessor, lines: Iterable[str], size: int) -> SentencePieceProcessor:
    """``base`` with pieces learned from ``lines`` after its own, ``size`` in all.

    New are only pieces with a character that ``base`` does not have: text that it knows keeps its ids. First all such characters, then
    what BPE makes of them, in its order, with scores below those of ``base``.

    Raises :class:`~engine.errors.UsageError` for a base that is not BPE, and as :func:`train`.
    """
    proto, lines = pb.ModelProto.FromString(base.serialized_model_proto()), list(lines)
    if proto.trainer_spec.model_type != pb.TrainerSpec.BPE:
        raise UsageError("the base tokenizer is no BPE model: scores mean something else in it, and it cannot be extended by BPE's pieces")
    known = set().union(*(piece.piece for piece in proto.pieces))
    learned = _train(lines, NO_LIMIT)
    pieces = [piece for piece in map(learned.id_to_piece, range(UNKNOWN + 1, learned.get_piece_size())) if not known.issuperset(piece)]
    pieces.sort(key=lambda piece: len(piece) > 1)
    smallest, largest = (len(proto.pieces) + count for count in (len(characters(lines) - known), len(pieces)))
    if not smallest <= size <= largest:
        bound = f"largest possible size is {largest}" if size > largest else f"smallest possible size is {smallest}"
        raise UsageError(f"an extension of {len(proto.pieces)} to {size} pieces: by the pieces that the new text has, the {bound}")
    lowest = min(piece.score for piece in proto.pieces)
    for rank, piece in enumerate(pieces[: size - len(proto.pieces)], 1):
        proto.pieces.add(piece=piece, score=lowest - rank)
    proto.trainer_spec.vocab_size = size
    return SentencePieceProcessor(model_proto=proto.SerializeToString(deterministic=True))


def check_extends(base: SentencePieceProcessor, extended: SentencePieceProcessor) -> None:
    """Ids 0 to ``base``'s last must be the same pieces with the same scores in both, and there must be more.

    Raises :class:`~engine.errors.UsageError` naming the first id that differs.
    """
    sizes = base.get_piece_size(), extended.get_piece_size()
    for i in range(min(sizes)):
        was, now = ((model.id_to_piece(i), model.get_score(i)) for model in (base, extended))
        if was != now:
            raise UsageError(
                f"the tokenizer does not extend its base: id {i} is {now[0]!r} with score {now[1]:g}, in the base {was[0]!r} with score {was[1]:g}. "
                "The rows of a model's text tables would mean other pieces; extend the base anew"
            )
    if sizes[1] <= sizes[0]:
        raise UsageError(f"the tokenizer does not extend its base: it has {sizes[1]} pieces, the base {sizes[0]}")


def characters(lines: Iterable[str]) -> set[str]:
    """Those that must be pieces; sentencepiece writes a space as ``▁``, and begins each line with one."""
    return set().union("▁", *(line.replace(" ", "▁") for line in lines))


def _train(lines: list[str], size: int) -> SentencePieceProcessor:
    """At most ``size`` pieces, fewer where the lines have no more."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=START,
        eos_id=STOP,
        unk_id=UNKNOWN,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=written.getvalue())
