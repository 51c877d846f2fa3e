"""Text from a checkpoint steers no terminal, wherever it is shown: in the command's output, in
errors, in the log."""

import logging
import pickle

import pytest

from engine import Progress
from engine.cli import main
from engine.errors import CheckpointCorrupt, EngineError
from engine.printable import indented, printable
from tests import tiny
from tests.now import Checkpointer

EVIL = "\x1b]0;title\x07\r\u202e\u2028\u200b\x9b\x7f"
FORGED = "x\n2026-01-01 INFO resumed"


def is_harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text) and "\n2026" not in text


def test_all_that_steers_is_escaped_and_nothing_else():
    assert printable(EVIL + "\ud800\n").isprintable()
    assert printable("grün 重み\\ ~") == indented("grün 重み\\ ~") == "grün 重み\\ ~"
    assert indented(f"a:\n  b{EVIL}") == f"a:\n  b{printable(EVIL)}"
    assert indented("a\nb\n  c") == "a\n  b\n  c" == indented(indented("a\nb\n  c"))


@pytest.mark.parametrize("kind", EngineError.__subclasses__())
def test_errors_quote_harmlessly(kind):
    error = kind(f"{EVIL} and {FORGED}")
    assert is_harmless(str(error))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_log_quotes_harmlessly(caplog):
    logger = logging.getLogger("engine")
    logger.warning("%s of %d:\n%s", EVIL, 3, ValueError(FORGED))
    assert is_harmless(caplog.messages[-1])
    assert caplog.messages[-1].startswith(printable(EVIL) + " of 3:\n")


@pytest.fixture
def run(tmp_path):
    """Two steps of a run all of whose texts are hostile; ``best`` is lost."""
    checkpointer = Checkpointer(tmp_path / "run", tiny.make(), config={EVIL: FORGED, "experiment_name": EVIL}, monitor=EVIL)
    for step in (1, 2):
        checkpointer.save(Progress(step=step), metrics={EVIL: 0.5, FORGED: step})
    (tmp_path / "run/best").write_text(EVIL)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "command",
    [
        ["ls", "RUN"],
        ["ls", "BASE"],
        ["show", "RUN"],
        ["show", "RUN@best"],
        ["show", "--json", "RUN"],
        ["diff", "RUN@1", "RUN@2"],
    ],
)
def test_no_command_prints_more_than_it_should(run, capsys, caplog, command):
    main([part.replace("RUN", str(run)).replace("BASE", str(run.parent)) for part in command])
    shown = capsys.readouterr()
    assert is_harmless(shown.out + shown.err)
    assert shown.out
    assert is_harmless("".join(caplog.messages))


def test_a_resume_logs_a_stored_config_harmlessly(run, caplog):
    with caplog.at_level(logging.INFO, "engine"):
        Checkpointer(run, tiny.make(1), config={}).resume()
    assert is_harmless("\n".join(caplog.messages))
    assert any(message.startswith(f"config: {printable(EVIL)} is not set") for message in caplog.messages)


def test_a_refused_resume_quotes_harmlessly(run):
    def rename(manifest):
        manifest["tensors"][0][0] = f"model.{EVIL}{FORGED}"

    tiny.forge(run / "step_00000002", manifest=rename)
    with pytest.raises(EngineError) as error:
        Checkpointer(run, tiny.make(1)).resume("step:2")
    assert is_harmless(str(error.value))
    assert printable(EVIL) in str(error.value)
    assert not isinstance(error.value, CheckpointCorrupt)
