"`python -m basd`, `torchrun -m basd` and the console script are the `basd` command."
import os
import sys

# `-m` puts the working directory first on the import path, as if whatever lies in it were ours to run
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    here, home = sys.path.pop(0), os.path.dirname(os.path.dirname(__file__))
    if os.path.realpath(here) == os.path.realpath(home): sys.path.append(here)      # a checkout of basd

import signal
from importlib import import_module


def start()->int: # exit status
    "The command in a process of its own"
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    def imported(name):
        "An interrupt while it is imported is an end without a word"
        if ours: signal.signal(signal.SIGINT, signal.SIG_DFL)
        module = import_module(name)
        if ours: signal.signal(signal.SIGINT, signal.default_int_handler)
        return module
    status = imported("basd.cli").main(load=lambda: imported("basd.training.build"))     # with torch
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)      # all is done; the same one again
    return status


if __name__ == "__main__": sys.exit(start())
