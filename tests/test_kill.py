"""A run that is killed at any moment and resumed ends exactly where an undisturbed one ends; `experiments/kill.py` is
the long form"""
import os
import random
import signal
import subprocess
import sys
import time

import kills
import pytest
from conftest import TINY
from test_selectors import arguments

from basd.core.registry import SELECTORS

TRAIN = ["train", "basd_cifar10", *TINY, "data.train_size=128", "data.val_size=32", "train.epochs=2",
         "train.checkpoint_every=3"]
ALONE, HELPED = TRAIN, [*TRAIN, "train.grad_accum_steps=2", "data.workers=1"]
CACHED = [*TRAIN, "data.train_size=1100", "data.batch_size=256", "views.crop=center", "views.flip=0",
          "train.epochs=1"]  # three shards


@pytest.fixture
def run(tmp_path): (tmp_path/"run").mkdir(); return tmp_path/"run"


def go(words, run, kill=None, **rest):
    "Start or resume `run`; returns exit statuses and output"
    out = run.parent/"out.txt"
    out.write_text("")
    return kills.end(kills.launch([*words, "--run-dir", run, "--resume"], out, kill, **rest)), out.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "What undisturbed runs with the given arguments leave"
    results = {}
    def of(words, ranks=1):
        key = (*words, ranks)
        if key not in results:
            run = tmp_path_factory.mktemp("whole")/"run"; run.mkdir()
            status, output = go(words, run, ranks=ranks)
            assert status == [0]*ranks, output
            results[key] = kills.left(run)
        return results[key]
    return of


def ends_equal(words, run, whole, ranks=1, but=()):
    status, output = go(words, run, ranks=ranks)
    assert status == [0]*ranks, output
    assert [k for k in kills.different(run, whole) if k not in but] == []


SAVED = ("previous.pt",)    # after a signal at any time it may be what that saved, where an undisturbed run saves nothing


DANGEROUS = [("start: environment written, no recipe", 1), ("checkpoint: half written", 1),
             ("step: weights new, average old", 4), ("step: half a row", 1), ("evaluation: inside", 1),
             ("epoch: best new, last old", 1), ("checkpoint: previous linked", 1),
             ("checkpoint: previous renamed, last not", 2), ("epoch: between two", 1),
             ("end: student written, no result", 1)]


def test_sigkill_at_dangerous_moments(run, undisturbed):
    for kill in DANGEROUS:
        status, output = go(HELPED, run, kill)
        assert status == [-signal.SIGKILL], f"{kill} never came: {output}"
    ends_equal(HELPED, run, undisturbed(HELPED))


def test_sigkill_at_any_time(run, undisturbed):
    chance = random.Random(0)
    for _ in range(2):
        processes = kills.launch([*HELPED, "--run-dir", run, "--resume"], run.parent/"out.txt")
        kills.wait_for_training(processes, run)
        kills.end(processes, after=chance.uniform(0, .4))
    ends_equal(HELPED, run, undisturbed(HELPED))


# test_selectors.py stops a run with each selector at each push; one is killed as well, so that the slow ones cannot stop being reached unseen
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow]*(n != "progressive")) for n in SELECTORS])
def test_sigkill_with_each_selector(name, run, undisturbed):
    words = ["train", "basd_cifar10", *arguments(name), "train.checkpoint_every=3", "train.ema=0.9", "data.val_size=50"]
    for kill in (("step: weights new, average old", 5), ("checkpoint: half written", 2), ("step: between gradients and optimizer", 4)):
        status, output = go(words, run, kill)
        assert status == [-signal.SIGKILL], f"{kill} never came: {output}"
    ends_equal(words, run, undisturbed(words))


def test_sigkill_inside_a_cache_build(run, tmp_path):
    words = lambda name: [*CACHED, f"teacher.cache={tmp_path/name}"]
    whole = tmp_path/"whole"/"run"; whole.mkdir(parents=True)
    assert go(words("calm"), whole)[0] == [0]
    for kill in (("cache: note not renamed", 1), ("cache: shard half written", 3), ("cache: shard not renamed", 1),
                 ("cache: shard renamed", 1)):
        assert go(words("killed"), run, kill)[0] == [-signal.SIGKILL], kill
    ends_equal(words("killed"), run, kills.left(whole))
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path/name).glob("shard-*")}
    assert len(files("calm")) == 3 and files("calm") == files("killed") and not list((tmp_path/"killed").glob(".*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_the_group(run, undisturbed, ranks):
    "All ranks and their workers get the signal: at the start, inside a step and an evaluation, at any time"
    words, out = [*TRAIN, "data.workers=2"], run.parent/"out.txt"
    for moment, number, at in (("start: recipe not renamed", signal.SIGINT, None),
                               ("step: between gradients and optimizer", signal.SIGTERM, 1),
                               ("evaluation: inside", signal.SIGINT, 4)):
        status, output = go(words, run, (moment, 1, number), ranks=ranks, together=True)
        assert status == [0]*ranks and "stopped on request" in output and "Traceback" not in output, output
        assert kills.step(run) == at and not [r for r in kills.rows(run) if r["kind"] == "epoch"] if at else True
    out.write_text("")
    processes = kills.launch([*words, "--run-dir", run, "--resume"], out, ranks=ranks, together=True)
    kills.wait_for_training(processes, run)
    status = kills.stop_all(processes, signal.SIGTERM, after=random.Random(ranks).uniform(0, .3))
    assert status == [0]*ranks and "Traceback" not in out.read_text(), out.read_text()
    ends_equal(words, run, undisturbed(TRAIN, ranks=ranks), ranks=ranks, but=SAVED)          # workers change nothing


def test_a_rank_that_dies(run, undisturbed):
    "The other rank ends within the limit and names the last checkpoint"
    status, output = go(TRAIN, run, ("step: between gradients and optimizer", 6), ranks=2, dies=1)
    assert status == [2, -signal.SIGKILL]
    assert "has lost another rank" in output and "last.pt holds step 4" in output and "Traceback" not in output
    ends_equal(TRAIN, run, undisturbed(TRAIN, ranks=2), ranks=2)


@pytest.mark.parametrize("stop", [False, True])
def test_a_rank_that_is_stopped(run, stop):
    "Its connections stay open. The other rank names the rank it waits for, and ends at the limit or on a signal"
    words = [*TRAIN, "train.epochs=100", f"train.rank_timeout={30 if stop else 6}"]
    out = run.parent/"out.txt"
    ranks = kills.launch([*words, "--run-dir", run, "--resume"], out, ranks=2)
    kills.wait_for_training(ranks, run)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    if stop:
        while "waits for rank 1, not heard of for" not in out.read_text() and ranks[0].exitcode is None: time.sleep(.1)
        os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(kills.LIMIT)
    ranks[1].kill(); ranks[1].join()
    output = out.read_text()
    assert ranks[0].exitcode == 2 and "Traceback" not in output, output
    assert "waits for rank 1, not heard of for" in output
    assert ("stopped on request while it waits for rank 1" if stop else "has lost another rank") in output


@pytest.mark.slow           # tests/test_nodes.py starts torchrun at each push
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on(number, run, undisturbed):
    "torchrun's status is that of a stopped launcher; each rank ends with status 0, and nothing is lost"
    out = run.parent/"out.txt"
    with open(out, "w") as file:
        job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                                "basd", *TRAIN, "data.workers=2", "--run-dir", str(run), "--resume"], stdout=file,
                               stderr=file, env={**os.environ, **kills.ENVIRONMENT}, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    kills.wait_for_training([Started(job)], run)
    os.killpg(job.pid, number)
    job.wait(kills.LIMIT)
    output = out.read_text()
    assert "stopped on request and saved" in output and "exitcode" not in output and "DataLoader" not in output, output
    ends_equal([*TRAIN, "data.workers=2"], run, undisturbed(TRAIN, ranks=2), ranks=2, but=SAVED)


class Started:
    "A process of `subprocess`, as `kills` looks at those of `multiprocessing`"
    def __init__(self, process): self.process = process

    @property
    def exitcode(self): return self.process.poll()


@pytest.mark.slow
def test_torchrun_starts_it_again(run, undisturbed):
    "The same line serves for the first start and for the restart, which goes on from last.pt"
    out = run.parent/"out.txt"
    assert kills.torchrun([*TRAIN, "--run-dir", run, "--resume"], [("checkpoint: half written", 3, 0)],
                          out) == 0, out.read_text()
    assert kills.different(run, undisturbed(TRAIN, ranks=2)) == []


def test_two_processes_in_one_run(run):
    first = kills.launch([*TRAIN, "train.epochs=100", "--run-dir", run], run.parent/"first.txt")
    kills.wait_for_training(first, run)
    status, output = go([*TRAIN, "train.epochs=100"], run)
    alive = first[0].exitcode is None
    kills.end(first, after=0)
    assert alive and status == [2] and "another process is training" in output


def check_message(run, status, output, words):
    "Check for one error sentence and no temporary files"
    last = output.strip().splitlines()[-1]
    assert (status == [2] and last.startswith("basd: ") and all(w in last for w in words)
            and "Traceback" not in output), output
    assert not [p.name for p in run.iterdir() if p.name[0] == "." and p.name != ".lock"]


def test_no_room(run, undisturbed):
    "No file may grow beyond 500 kB, which stands for a full disk where none can be mounted"
    go(ALONE, run, ("epoch: between two", 1))
    status, output = go(ALONE, run, room=500_000)
    check_message(run, status, output, ["file too large", "last.pt holds step 4", "make room"])
    ends_equal(ALONE, run, undisturbed(ALONE))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk; test_no_room stands for this one")
def test_full_disk(run, undisturbed):
    mount = lambda *options: subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(run)],
                                            capture_output=True, text=True)
    made = mount("-o", "size=2m")
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here ({made.stderr.strip()}); test_no_room stands for this one")
    try:
        status, output = go(ALONE, run)
        check_message(run, status, output, ["no space left", "last.pt holds step 3", "make room"])
        assert not mount("-o", "remount,size=16m").returncode
        ends_equal(ALONE, run, undisturbed(ALONE))
    finally: subprocess.run(["umount", str(run)], check=True)


def test_damaged_checkpoint(run, undisturbed):
    ("One bit turned over, at several places, or half of the file gone: nothing is touched, "
     "and the checkpoint before is offered")
    go(ALONE, run, ("end: before the test split", 1))
    whole, good, chance = (run/"last.pt").read_bytes(), kills.state_of(run), random.Random(0)
    at = whole.index(b"data/0")                                                      # from here on, tensors
    flips = [chance.randrange(8*at, 8*len(whole)) for _ in range(40)]
    refused = 0
    for flip in [None, *flips]:
        content = bytearray(whole)
        if flip is None: del content[len(content)//2:]
        else: content[flip//8] ^= 1 << flip % 8
        (run/"last.pt").write_bytes(content)
        try: assert kills.state_of(run) == good                              # or it hit unused bytes
        except ValueError: refused += 1
    assert refused > 30
    (run/"last.pt").write_bytes(whole[:len(whole)//2])
    files = lambda: {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name[0] != "."}
    before = files()
    status, output = go(ALONE, run)
    check_message(run, status, output, ["last.pt", "rename previous.pt to last.pt", "go on from step 6"])
    assert files() == before
    (run/"previous.pt").rename(run/"last.pt")
    ends_equal(ALONE, run, undisturbed(ALONE))
