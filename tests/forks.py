"""Processes, alone or as the ranks of one job, forked from a process that has imported the package already: an import
takes seconds, a fork does not. `test_nodes.py` starts a real launcher."""
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import sklearn.datasets  # noqa: F401 (imported for the children, as are the next: the digits need it)
import torch

import basd.cli  # noqa: F401
import basd.training.build  # noqa: F401
import basd.training.callbacks
from basd.core.distributed import rank, world_size
from basd.core.registry import METHODS
from basd.core.processes import process_group
from basd.runs.run_directory import checksum, load_checkpoint

METHODS.load()      # imports all methods, so that all children are of one state of the code
LIMIT = 300                 # seconds; a process that takes longer hangs, on the slowest machine too
TESTS = Path(__file__).parent
ENVIRONMENT = dict(         # of every child: this checkout first on the path, one thread
    OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]))


def no_figures(put=setattr):
    "Skip the figure at the end of a run, which takes 1.5 s; runs from the shell and the notebooks draw it"
    put(basd.training.callbacks, "plot_run", lambda run: None)


def state_of(run, file="last.pt"):
    "Digest of a run's checkpoint, but for its clock, and the length of its log, which counts the digits of times"
    state = load_checkpoint(Path(run)/file)
    return checksum(state | dict(callbacks={k: v for k, v in state["callbacks"].items() if k != "MetricsLog"}))


def fork_server(path, args, files):
    "What multiprocessing starts its fork server by, as a fork of this process in place of a Python that imports everything again"
    if pid := os.fork(): return pid
    try:
        kept = sorted([0, 1, 2, *files, os.sysconf("SC_OPEN_MAX")])
        for a, b in zip(kept, kept[1:]): os.closerange(a + 1, b)        # or the server would not see this process end
        forkserver._forkserver._lock = threading.Lock()                 # as it is, it is held
        # pytest's reader of modules would compile a test's module anew in every child
        sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_pytest.")]
        torch.set_num_threads(1)
        exec(args[-1], {})
    finally: os._exit(0)


def begin_server():
    "Start the process from which children are forked, before this one has computed anything; once"
    multiprocessing.set_forkserver_preload(["forks"])
    with mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.object(multiprocessing.util, "spawnv_passfds", fork_server):
        forkserver.ensure_running()


def process(*args):
    "A process of `child(*args)`, not yet started"
    return multiprocessing.get_context("forkserver").Process(target=child, args=args)


def child(f, args, env, out, group):
    "Main function of a child process"
    if group is not None: join(group)
    # as in a process of its own; workers would come from the fork server otherwise
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1); os.dup2(file, 2)
    os.environ.update(env)
    no_figures()
    sys.exit(f(*args))


def join(group):
    "Create a process group (0) or join one being created, and restore SIGINT, which a background job ignores"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try: return os.setpgid(0, group)
        except PermissionError: time.sleep(.01)


def start(f, *args, out, ranks=1, together=False):
    ("Start `f(*args)`, a function of a module, on each rank: `f` returns the exit status; its output goes to `out`; "
     "`together`: the ranks, and what they start, are a process group, which has the id of the first")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    group = [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
             if ranks > 1 else {} for r in range(ranks)]
    started = []
    for env in group:
        of = None if not together else started[0].pid if started else 0
        started.append(process(f, args, env, str(out), of))
        started[-1].start()
    return started


def end(started, after=None, limit=LIMIT):
    "Exit statuses of the ranks, which are killed `after` seconds if given; None of one that had to be killed after `limit` seconds"
    if after is not None:
        started[0].join(after)
        for p in started: p.kill()
    began = time.time()
    for p in started: p.join(max(1, limit - time.time() + began))
    late = [p for p in started if p.exitcode is None]
    for p in late: p.kill(); p.join()
    return [None if p in late else p.exitcode for p in started]


def on_ranks(f, *args, ranks, folder):
    "What `f(*args)` returns on rank 0 of a job, by way of `torch.save`"
    found, output = folder/f"found_{ranks}.pt", folder/f"output_{ranks}.txt"
    status = end(start(_saved, f, args, found, out=output, ranks=ranks))
    assert status == [0]*ranks, output.read_text()
    return torch.load(found)


def _saved(f, args, out):
    with process_group("cpu"):
        assert world_size() == int(os.environ.get("WORLD_SIZE", 1))
        found = f(*args)
        if rank() == 0: torch.save(found, out)
        if world_size() > 1: torch.distributed.barrier()
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(0)         # a reducer outlives the group that it was made for, and its destructor may abort
