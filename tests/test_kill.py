"A run that is killed at any moment and resumed ends exactly where an undisturbed one ends"
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY

from basd.training.checkpoints import digest, load
from basd.training.metrics import read_log

TRAIN = ["train", "basd_cifar10", *TINY, "train.save_every=3", "train.precision=float32", "train.accumulate=2", "data.workers=1"]
MOMENTS = 3


def state(run):
    "What must be equal at the end: everything in the checkpoint but the clock"
    return digest({k: v for k, v in load(run/"last.pt").items() if k not in ("elapsed", "offset")})


def rows(run):
    "The log without its times"
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_log(run)]


def spawn(environment, *words):
    return subprocess.Popen([sys.executable, "-m", "basd", *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_training(process, run, timeout=120):
    "Wait until the run has written to its log, or has ended"
    log, began = run/"metrics.jsonl", time.time()
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and time.time() - began < timeout and not (log.exists() and log.stat().st_size != size): time.sleep(.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")/"run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "basd", *TRAIN, "--run-dir", str(run)], env=environment, check=True, capture_output=True)
    return state(run), rows(run)


def test_sigkill(tmp_path, environment, undisturbed):
    chance, run, killed = random.Random(0), tmp_path/"run", 0
    for attempt in range(MOMENTS):
        process = spawn(environment, *TRAIN, "--run-dir", run, *(["--resume"] if run.exists() else []))
        wait_for_training(process, run)
        time.sleep(chance.uniform(0, .8))
        if process.poll() is None: killed += 1
        process.kill(); process.wait()
    done = spawn(environment, *TRAIN, "--run-dir", run, "--resume")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert killed >= 2, "the moments were too late to test anything"
    assert state(run) == undisturbed[0]
    assert rows(run) == undisturbed[1]


def test_sigterm(tmp_path, environment, undisturbed):
    run = tmp_path/"run"
    process = spawn(environment, *TRAIN, "--run-dir", run)
    wait_for_training(process, run)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped on request" in out, out + err
    done = spawn(environment, *TRAIN, "--run-dir", run, "--resume")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert state(run) == undisturbed[0] and rows(run) == undisturbed[1]
