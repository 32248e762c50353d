"""`python -m compress` and the script `autoglm-compress`: the command line, imported where Ctrl-C is caught."""

from __future__ import annotations

import signal
import threading

from compress.errors import INTERRUPTED, leave


def main() -> int:
    """Run the command line and return the exit code; 130 for a Ctrl-C while it is still being imported."""
    caught = threading.current_thread() is threading.main_thread()
    caught = caught and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if caught:
        signal.signal(signal.SIGINT, _leave)
    from compress.cli import main as command_line

    if caught:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command_line()


def _leave(number: int, frame: object) -> None:
    # an exception would be taken for a package that is missing, or end the process by the signal; nothing is open yet
    del number, frame
    leave("interrupted", INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
