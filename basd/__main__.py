"`python -m basd`, `torchrun -m basd` and the console script are the `basd` command."
import signal
import sys


def start()->int: # exit status
    "The command in a process of its own"
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours: signal.signal(signal.SIGINT, signal.SIG_DFL)          # an end without a word while torch is imported
    from basd.training.cli import main
    if ours: signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)      # all is done; the same one again
    return status


if __name__ == "__main__": sys.exit(start())
