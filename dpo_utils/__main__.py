"""`python -m dpo_utils COMMAND --help`: every command of the workbook; `make` only wraps them."""

import importlib
import sys

from dpo_utils import commands


def main(argv=None) -> None:
    """Read a command's arguments, then import what it runs. Foreseen problems end in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # no run fails for a letter that a console lacks
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in commands.RUN:
        lines = [f"  {name:9s} {about}" for name, (*_, about) in commands.RUN.items()]
        print("usage: python -m dpo_utils COMMAND [--help]", *lines, sep="\n")
        raise SystemExit(0 if name in ("-h", "--help") else f"there is no command {name!r}")
    with commands.one_line():
        given = getattr(commands, name)(rest)
        module, function, _ = commands.RUN[name]
        getattr(importlib.import_module(f"dpo_utils.{module}"), function)(*given)


if __name__ == "__main__":
    main()
