"""`python -m compress` and the script `autoglm-compress`: the command line, imported where Ctrl-C is caught."""

from __future__ import annotations

import sys

from compress.errors import INTERRUPTED, interrupted


def main() -> int:
    """Run the command line and return the exit code; 130 for a Ctrl-C while it is still being imported."""
    try:
        from compress.cli import main as command_line
    except BaseException as error:
        if not interrupted(error):
            raise
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    return command_line()


if __name__ == "__main__":
    raise SystemExit(main())
