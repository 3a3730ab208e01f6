"""No command writes through a link that lies in a run directory: what it leads to stays as it was"""
import os
import shutil
from importlib.util import find_spec

import pytest
from conftest import TINY

from basd.cli import main

CE = ["train", "basd_cifar10", *TINY, "data.train_size=64", "data.val_size=20", "train.epochs=1", "train.ema=null",
      "train.warmup_epochs=0", "method.name=ce"]
BOARD = ["train.log=tensorboard"]*bool(find_spec("tensorboard"))

PLAIN = [w for w in CE[2:] if not w.startswith("method.")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished")/"run"
    assert main([*CE, *BOARD, "--run-dir", str(run)]) == 0
    assert main(["evaluate", str(run), "--corrupted", "0"]) == 0
    return run


@pytest.fixture
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path); return tmp_path


def outside(here, run, hard=False):
    "Replace every file that a run writes by a link to a file outside; returns names → files outside"
    names = [str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()]
    for i, name in enumerate(names):
        treasure = here/"outside"/str(i)
        treasure.parent.mkdir(exist_ok=True)
        shutil.copy(run/name, treasure)
        (run/name).unlink()
        os.link(treasure, run/name) if hard else (run/name).symlink_to(treasure)
    return {p.name: p.read_bytes() for p in (here/"outside").iterdir()}


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("words", [["resume", "run"], ["evaluate", "run", "--corrupted", "0"]], ids=lambda w: w[0])
def test_files(words, hard, finished, here, capsys):
    shutil.copytree(finished, here/"run")
    (here/"run"/"result.json").unlink()
    before = outside(here, here/"run", hard)
    status = main(words)
    assert {p.name: p.read_bytes() for p in (here/"outside").iterdir()} == before
    assert status == 0 or "link" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "figures", "tensorboard"])
def test_each(name, finished, here, capsys):
    "Each link to a file or folder that would be written is named; a pipe, too, which would block forever"
    shutil.copytree(finished, here/"run")
    (here/"run"/"result.json").unlink()
    at, there = here/"run"/name, here/"outside"
    if name == "tensorboard": pytest.importorskip("tensorboard")
    if at.is_dir(): at.rename(there)
    else: there.write_bytes(at.read_bytes())
    at.unlink(missing_ok=True) if not at.is_dir() else None
    at.symlink_to(there)
    kept = sorted(p.name for p in there.iterdir()) if there.is_dir() else there.read_bytes()
    assert main(["resume", "run"]) == 2 and f"{name} is a link" in capsys.readouterr().err
    assert kept == (sorted(p.name for p in there.iterdir()) if there.is_dir() else there.read_bytes())
    if name == ".lock":
        at.unlink(); os.mkfifo(at)
        assert main(["resume", "run"]) == 2 and "no regular file" in capsys.readouterr().err


def test_folders(here, capsys):
    "A stage's folder, or that of a run in a benchmark, that leads elsewhere is named before anything is written there"
    (here/"two.yaml").write_text("extends: basd_cifar10\nmethod: {name: ce}\nstages: {a: {}, b: {}}")
    assert main(["train", "two.yaml", *PLAIN, "--run-dir", "two"]) == 0
    elsewhere = here/"elsewhere"
    (here/"two"/"b").rename(elsewhere)
    (elsewhere/"result.json").unlink()
    (here/"two"/"b").symlink_to(elsewhere)
    (here/"race").mkdir(); (here/"race"/"ce-0").symlink_to(elsewhere)
    (here/"ce.yaml").write_text("method: {name: ce}")
    kept = {p.name: p.read_bytes() for p in elsewhere.iterdir() if p.is_file()}
    for words, link in ((["resume", "two"], "two/b"),
                        (["compare", "ce.yaml", "--seeds", "1", "--folder", "race", "--set", *PLAIN], "race/ce-0")):
        capsys.readouterr()
        assert main(words) == 2 and f"{link} is a symbolic link" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in elsewhere.iterdir() if p.is_file()} == kept
