"""The command line: python -m jax_trirun COMMAND.

A command is a module of jax_trirun.commands with HELP, add_arguments(parser) and run(arguments). Adding
one is writing the module and naming it here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import bench, convert, evaluate, generate, info, quantize

COMMANDS = {
    "info": info,
    "quantize": quantize,
    "convert": convert,
    "generate": generate,
    "eval": evaluate,
    "bench": bench,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_trirun", description="2-bit weights for JAX")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error was raised")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status. A user's mistake is one line on stderr and status 2."""
    parsed = make_parser().parse_args(arguments)
    try:
        COMMANDS[parsed.command].run(parsed)
    except (ValueError, OSError, ImportError) as error:
        if parsed.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
