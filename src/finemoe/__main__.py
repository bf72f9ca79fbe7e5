"""The `finemoe` command, which `python -m finemoe` is too: Ctrl-C is quiet from the first line on.

The imports of the command take a third of a second, and a verb's own a second or more. A Ctrl-C that came meanwhile
would end in a traceback, or in whatever a library that was being imported made of it.
"""

from __future__ import annotations

import _signal  # what `signal` is made of, which itself imports for milliseconds
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_INTERRUPTED = 130


def main() -> None:
    """The console script; ends the process with its status."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # else it is ignored, as `nohup` asks for
        _signal.signal(_signal.SIGINT, _interrupt)
    from finemoe.cli.main import main as command

    command()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt while a verb works; else, and while it imports, there is nothing to put in order."""
    working = False
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            break
        working = working or frame.f_code.co_qualname == "Verbs.invoke"
        frame = frame.f_back
    if frame is None and working:
        raise KeyboardInterrupt
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
