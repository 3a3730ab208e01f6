"""Runs that are killed at a chosen moment, and what must be equal at their end; for test_kill.py and
experiments/kill.py.

A child process changes the function in question so that it ends itself there with SIGKILL: nothing in the package depends
on it.

    # rank 0, at the first start
    torchrun --nproc_per_node=2 --max-restarts=1 tests/kills.py '[["checkpoint: half written", 1, 0]]' train …
"""
import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import timm.utils
import torch

import basd.data.cache
import basd.models.students
import basd.runs.inference
import basd.training.build as build
import basd.training.callbacks as callbacks
import basd.training.trainer as trainer
from basd.cli import main
from basd.runs.run_directory import load_checkpoint
from basd.runs.metrics import MetricsLogger, read_metrics
from basd.training.trainer import Trainer
from forks import ENVIRONMENT, LIMIT, begin_server, end, no_figures, start, state_of    # noqa: F401 (some for those who import this)


def die(number=signal.SIGKILL):
    "End this process, or send another signal to its whole group"
    if number == signal.SIGKILL: os.kill(os.getpid(), number)
    else: os.killpg(0, number)


def before(owner, name, last=None):
    "Kill this process before a call of `owner.name`; `last`: only where the file name in its last argument begins so"
    return lambda now: _change(owner, name, last, lambda call, *args, **kw: (now(), call(*args, **kw))[1])


def after(owner, name, last=None):
    "Kill this process after such a call"
    return lambda now: _change(owner, name, last, lambda call, *args, **kw: (call(*args, **kw), now())[0])


def _change(owner, name, last, act):
    call = getattr(owner, name)
    @functools.wraps(call)
    def changed(*args, **kw):
        return act(call, *args, **kw) if last is None or Path(args[-1]).name.startswith(last) else call(*args, **kw)
    setattr(owner, name, changed)


def half_saved(now):
    "Kill this process when half of a checkpoint is in its temporary file"
    def act(call, x, file, **kw):
        if not isinstance(x, dict): return call(x, file, **kw)      # what ranks exchange is saved, too
        call(x, whole := io.BytesIO())
        file.write(whole.getvalue()[:len(whole.getvalue())//2]); file.flush()
        now()
        file.seek(0); file.truncate(); call(x, file)
    _change(torch, "save", None, act)


def half_a_row(now):
    "Kill this process when half of a row is in the log"
    def act(call, log, row):
        size, line = log.offset, json.dumps(row)
        with open(log.path, "a") as f: f.write(line[:len(line)//2])
        now()
        os.truncate(log.path, size); call(log, row)
    _change(MetricsLogger, "write", None, act)


MOMENTS = {
    "start: environment written, no recipe": after(os, "replace", "environment.json"),
    "start: recipe not renamed": before(os, "replace", "recipe.yaml"),
    "cache: note not renamed": before(os, "replace", "cache.json"),
    "cache: shard half written": before(basd.data.cache.RecordLayout, "pack"),
    "cache: shard not renamed": before(os, "replace", "shard-"),
    "cache: shard renamed": after(os, "replace", "shard-"),
    "step: before the forward pass": before(Trainer, "forward"),
    "step: between gradients and optimizer": before(trainer, "clip_grad_norms"),
    "step: weights new, average old": before(timm.utils.ModelEmaV3, "update"),
    "step: half a row": half_a_row,
    "step: row written": after(MetricsLogger, "write"),
    "checkpoint: half written": half_saved,
    "checkpoint: previous not linked": before(os, "link"),
    "checkpoint: previous linked": after(os, "link"),
    "checkpoint: previous renamed, last not": after(os, "replace", "previous.pt"),
    "checkpoint: last not renamed": before(os, "replace", "last.pt"),
    "checkpoint: last renamed": after(os, "replace", "last.pt"),
    "epoch: row written, nothing saved": after(callbacks, "_print_row"),
    "epoch: best not renamed": before(os, "replace", "best.pt"),
    "epoch: best new, last old": after(os, "replace", "best.pt"),
    "epoch: between two": after(callbacks.Checkpoint, "after_epoch"),
    "evaluation: inside": before(basd.runs.inference, "autocast"),
    "evaluation: at its end": after(build, "validate"),
    "end: before the test split": before(callbacks.Test, "after_fit"),
    "end: student written, no result": after(callbacks, "save_student"),
    "end: test row written": before(callbacks, "plot_run"),
    "end: result not renamed": before(os, "replace", "result.json"),
}


def arm(moment, n, number=signal.SIGKILL):
    "Kill this process at the `n`-th such moment, or send it another signal"
    left = iter(range(n - 1))
    MOMENTS[moment](lambda: next(left, None) is None and die(number))


def command(words, kill, dies, room):
    "The `basd` command, in which rank `dies` dies at `kill`"
    if room is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if kill and int(os.environ.get("RANK", 0)) == dies: arm(*kill)
    return main(words)


def launch(words, out, kill=None, ranks=1, dies=0, room=None, together=False):
    "Start a run; rank `dies` is killed at `kill`, a moment and a count (and a signal); no file may grow beyond `room` bytes"
    return start(command, [str(w) for w in words], kill, dies, room, out=out, ranks=ranks, together=together)


def stop_all(processes, number, after):
    ("Signal all ranks and their workers, as a scheduler or Ctrl-C does, so many seconds after all have begun; "
     "the exit statuses, once nobody is left")
    group, began = processes[0].pid, time.time()
    while not all(p.exitcode is not None or handles_signals(p.pid) for p in processes) and time.time() - began < LIMIT: time.sleep(.02)
    processes[0].join(after)
    with suppress(ProcessLookupError): os.killpg(group, number)
    status, began = end(processes), time.time()
    while alive(group):
        if time.time() - began > 60: raise TimeoutError("reader processes outlive their trainer")
        time.sleep(.05)
    return status


def handles_signals(pid):
    "Whether a process catches SIGTERM, as the command does from its start (Linux only)"
    try: status = Path(f"/proc/{pid}/status").read_text()
    except OSError: return True
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> signal.SIGTERM - 1 & 1)


def alive(group):
    "Whether a process group still has members"
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def rows(run): return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_metrics(run)]


def left(run):
    "All that must be equal at the end: checkpoints but for the clock, the log without its times, what is taken away"
    run = Path(run)
    result = json.loads((run/"result.json").read_text())
    return dict({n: state_of(run, n) for n in ("last.pt", "previous.pt", "best.pt")},
                rows=rows(run), student=(run/"student.safetensors").read_bytes(),
                result={k: v for k, v in result.items() if k != "seconds"}, files=sorted(p.name for p in run.iterdir()))


def torchrun(words, plan, out, ranks=2):
    "The exit status of a job that is started again after each kill of `plan`: rows of moment, count and rank"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max-restarts={len(plan)}"]
    with open(out, "a") as file:
        return subprocess.run([*launcher, __file__, json.dumps(plan), *map(str, words)],
                              stdout=file, stderr=file, timeout=2*LIMIT,
                              env={**os.environ, **ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}).returncode


def wait_for_training(processes, run):
    "Wait until the run has written to its log, or has ended"
    log = Path(run)/"metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    while processes[0].exitcode is None and not (log.exists() and log.stat().st_size != size): time.sleep(.02)


def different(run, whole):
    "Names of entries of `left` that differ from `whole`"
    found = left(run)
    return [k for k in whole if found[k] != whole[k]]


def step(run):
    "The step from which `run` would resume, or None"
    try: return load_checkpoint(Path(run)/"last.pt")["step"]
    except FileNotFoundError: return None


if __name__ == "__main__":
    no_figures()
    plan, start = json.loads(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(plan) and int(os.environ["RANK"]) == plan[start][2]: arm(*plan[start][:2])
    sys.exit(main(sys.argv[2:]))
