"""The `qed` command from its first moment to its last: python3 -m qedcore, and what installed programs call."""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False  # as in typing, which would have to be loaded for it
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, and end."""
    gc.disable()  # while modules are loaded: they are no garbage
    try:
        import signal  # here, because loading it takes a moment, too

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Nothing is open yet, or any more: Ctrl-C ends the program at once.  In between the command sees to it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        os._exit(130)
    from .cli.output import Output, errors, fill_descriptors

    fill_descriptors()
    sys.stdout, sys.stderr = Output(sys.stdout), errors()
    from .cli.main import main as run

    code = run()
    sys.stderr.flush()
    os._exit(code)  # all is closed and written: the interpreter need not be taken apart


if __name__ == "__main__":
    main()
