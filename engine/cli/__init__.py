"""The ``engine`` command: looks at checkpoints. Each command imports what it needs, so that listing is instant; none imports torch, but for an
export to a file that torch writes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from engine.cli.text import say
from engine.errors import EngineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0, for ``diff`` also 1, 2 and more as in :mod:`engine.errors`."""
    args = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names may be more than a terminal can show
    run: Callable[[argparse.Namespace], int] = args.run_command
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except EngineError as e:
        say(f"engine {args.command}: {e}", error=True)
        return e.exit_code
    except BrokenPipeError:  # `engine ls | head`; the interpreter would complain once more on closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from engine.cli.target import HELP

    codes = "exit codes: 0 fine, 1 diff has found differences, 2 usage, 4 not found, 5 damaged, 7 the storage refused"
    parser = argparse.ArgumentParser(prog="engine", description="Look at lockstep checkpoints.", epilog=codes, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("ls", help="the committed steps of a run, or the runs below a folder")
    listing.add_argument("path", help="a run's folder, or one that holds run_001, run_002, …")
    listing.set_defaults(run_command=_ls)

    show = commands.add_parser("show", help="what a step holds: progress, hyper-parameters, tensors, files")
    show.add_argument("target", help=HELP)
    show.add_argument("--tensors", metavar="PATTERN", default="*", help="only tensors whose name matches, such as '*.weight'")
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(run_command=_show)

    verify = commands.add_parser("verify", help="read every byte and check it; all problems are named")
    verify.add_argument("target", help=HELP)
    verify.add_argument("--all", action="store_true", help="every step of the run")
    verify.set_defaults(run_command=_verify)

    diff = commands.add_parser("diff", help="how two steps differ, however each is sharded; exits 0 if they are equal, else 1")
    diff.add_argument("a", help=HELP)
    diff.add_argument("b", help="as A")
    diff.add_argument("--read", action="store_true", help="also read and verify what equal checksums say is equal")
    diff.set_defaults(run_command=_diff)

    export = commands.add_parser("export", help="write a model of a step as an ordinary .safetensors or .pt file, every byte verified")
    export.add_argument("target", help=HELP)
    export.add_argument("file", help="ends in .safetensors (streamed), or in .pt, .pth or .bin (a dict of tensors, as torch.save writes it)")
    export.add_argument("--member", metavar="NAME", help="which model, where the run has several")
    export.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    export.set_defaults(run_command=_export)
    return parser


def _ls(args: argparse.Namespace) -> int:
    from engine.cli.ls import list_steps_or_runs

    say(*list_steps_or_runs(args.path))
    return 0


def _show(args: argparse.Namespace) -> int:
    from engine.cli.show import show

    show(args.target, args.tensors, args.json)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from engine.cli.verify import verify_steps

    return verify_steps(args.target, args.all)


def _diff(args: argparse.Namespace) -> int:
    from engine.cli.diff import diff

    return diff(args.a, args.b, args.read)


def _export(args: argparse.Namespace) -> int:
    from engine.cli.export import export

    say(export(args.target, args.file, args.member, args.overwrite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
