"""Command line of moeops.

``python -m moeops info`` describes the installation, what is fast on this machine and what is not there; exit code 1
and a line per problem when something is broken. ``python -m moeops profile`` measures the machine, ``python -m moeops
plan`` predicts layers on as many ranks as one likes; exit code 2 and one line for arguments that do not fit. If
moeops cannot even be imported, Python itself prints the cause, from ``moeops._extension``, with exit code 1.
"""

from __future__ import annotations

import argparse
import sys

from moeops._info import report
from moeops.planner import plan, profile


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moeops", description="Mixture-of-Experts ops for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info",
        help="versions, libraries, GPUs, what is fast here, what is missing, ops; exit code 1 when something is broken",
    )
    for name, module in (("profile", profile), ("plan", plan)):
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args(arguments)
    if args.command == "info":
        return _info()
    return (profile if args.command == "profile" else plan).run(args)


def _info() -> int:
    """Print the report; 1 when it found problems."""
    text, problems = report()
    print(text)
    for problem in problems:
        print(f"moeops info: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
