"Tests that need processes: ranks, kills, signals, the shell. Everything else is tested in the notebooks."
import os
import subprocess
import sys

import pytest
import torch
from forks import ENVIRONMENT, begin_server, no_figures

TINY = ["data.source=digits", "data.batch_size=32", "data.workers=0", "data.train_size=256", "data.val_size=50",
        "views.flip=0", "student.img_size=16", "student.patch_size=4", "student.depth=2", "student.width=32",
        "student.heads=2", "student.drop_path=0.1", "teacher.model=vit_tiny_patch16_224", "teacher.pretrained=false",
        "teacher.untrained=true", "teacher.img_size=32",
        "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3}",
        "method.student_layers=[0, 1]", "method.selector.name=nearest", "method.selector.dim=24", "method.selector.rank=4", "train.epochs=3",
        "train.warmup_epochs=1", "train.log_every=4", "train.ema=0.9", "train.precision=float32"]
NO_MODEL = ["teacher.model=null", "teacher.untrained=false", "teacher.img_size=null", "teacher.kwargs=null"] # of TINY's


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    begin_server()
    config.addinivalue_line("markers", "figures: runs in this test draw their figure")
    config.addinivalue_line("markers", "slow: takes long for what it adds; runs with --slow, in a weekly job")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    if "figures" not in request.keywords: no_figures(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def seeded():
    "Torch's generator starts anywhere, in each process; a test that forgets its seed would fail once in a thousand times"
    torch.manual_seed(0)


@pytest.fixture
def basd():
    "Run the `basd` command to its end, on `ranks` processes"
    def run(*words, ranks=1, check=True):
        launcher = [sys.executable, "-m"] + (
            ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else [])
        done = subprocess.run([*launcher, "basd", *map(str, words)], env={**os.environ, **ENVIRONMENT},
                              capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return run
