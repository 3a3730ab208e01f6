"""Same recipe, same seed, same machine: the same weights, bit for bit; and a run directory holds all that is needed to
repeat it"""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from forks import ENVIRONMENT, state_of
from PIL import Image, ImageOps

from basd.data.sources import ImageDataset, open_source
from basd.cli import main
from basd.runs.metrics import read_metrics
from basd.runs.recipes import to_dict, load_recipe

WORDS = [*TINY, "data.train_size=128", "train.epochs=2", "train.warmup_epochs=1", "train.seed=7", "data.split_seed=3"]
METHODS = {"basd": [], "labels": ["method.name=ce"],
           "logits": ["method.name=distill",
                      "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3, num_classes: 10}"],
           "bf16": ["train.precision=bf16", "train.grad_accum_steps=2"],
           "two readers": ["data.workers=2", "data.in_memory=false"]}


def rows(run): return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in read_metrics(run)]


def results(run): return {k: v for k, v in json.loads((run/"result.json").read_text()).items() if k != "seconds"}


def same(a, b):
    return (state_of(a) == state_of(b) and rows(a) == rows(b) and results(a) == results(b)
            and (a/"student.safetensors").read_bytes() == (b/"student.safetensors").read_bytes())


def train(run, *words): assert main(["train", *map(str, words), "--run-dir", str(run)]) == 0


@pytest.mark.parametrize("name", METHODS)
def test_twice(name, tmp_path):
    "Two runs are equal, whatever random numbers were drawn before, in this process or another"
    train(tmp_path/"a", "basd_cifar10", *WORDS, *METHODS[name])
    torch.manual_seed(12345); torch.rand(1000)
    train(tmp_path/"b", "basd_cifar10", *WORDS, *METHODS[name])
    assert same(tmp_path/"a", tmp_path/"b")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")/"run"
    train(run, "basd_cifar10", *WORDS)
    return run


def test_another_seed(run, tmp_path):
    "Another seed gives other weights, so the test can fail"
    train(tmp_path/"other", "basd_cifar10", *WORDS, "train.seed=8")
    assert state_of(run) != state_of(tmp_path/"other")


STARTS = """
import multiprocessing, sys
from multiprocessing.process import BaseProcess
multiprocessing.set_start_method(sys.argv[1])
started, start = [], BaseProcess.start
BaseProcess.start = lambda process: (started.append(process), start(process))
from basd.cli import main
print(main(sys.argv[2:]), len(started), len(multiprocessing.active_children()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_readers_start_once(method, run, tmp_path):
    "Two of them for two epochs with two evaluations each, and three at the end, as they begin elsewhere; none is left"
    done = subprocess.run([sys.executable, "-c", STARTS, method, "train", "basd_cifar10", *WORDS, "data.workers=2",
                           "--run-dir", str(tmp_path/"run")], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0 2 0"], done.stdout + done.stderr
    assert same(run, tmp_path/"run")


def test_from_its_own_recipe(run, tmp_path, basd):
    "`basd train RUN_DIR/recipe.yaml` repeats the run, in a fresh process"
    basd("train", run/"recipe.yaml", "--run-dir", tmp_path/"again")
    assert same(run, tmp_path/"again")
    assert (run/"recipe.yaml").read_bytes() == (tmp_path/"again"/"recipe.yaml").read_bytes()


def test_stages_from_their_own_recipes(tmp_path):
    "A stage whose teacher is an earlier stage is repeated from its own recipe alone"
    words = ["data.train_size=128", "data.val_size=32", "data.batch_size=32", "train.epochs=1", "train.warmup_epochs=0",
             "student.depth=4", "stages.ce=null"]
    train(tmp_path/"two", "quickstart", *words)
    train(tmp_path/"again", tmp_path/"two"/"basd"/"recipe.yaml")
    assert same(tmp_path/"two"/"basd", tmp_path/"again")


def test_what_is_recorded(run):
    "Versions, hardware, git state, and the recipe with its seeds"
    about = json.loads((run/"environment.json").read_text())
    assert ({"basd", "torch", "torchvision", "timm", "numpy"} <= about["versions"].keys()
            and about["versions"]["torch"] == torch.__version__.split("+")[0])
    assert ({"python", "system", "machine", "cpus", "threads", "gpu", "ranks"} <= about.keys()
            and about["threads"] == torch.get_num_threads() and about["ranks"] == 1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert about["git"] is None or set(about["git"]) == {"commit", "clean"} and (
        commit.returncode or about["git"]["commit"] == commit.stdout.strip())
    stored = load_recipe(str(run/"recipe.yaml"))[""]
    assert ((stored.train.seed, stored.data.split_seed) == (7, 3)
            and to_dict(stored) == to_dict(load_recipe("basd_cifar10", WORDS)[""]))


def test_the_images_are_recorded(run):
    about = json.loads((run/"environment.json").read_text())
    assert about["data"] == {split: ImageDataset(open_source("digits", split)).fingerprint() for split in ("train", "test")}


def test_other_images(tmp_path, capsys):
    "A run is resumed with the same images only"
    digits, images = open_source("digits"), tmp_path/"images"
    for split, chosen in (("train", range(96)), ("test", range(96, 128))):
        for i in chosen:
            pixels, label = digits[i]
            (images/split/f"{label%2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(images/split/f"{label%2}"/f"{i}.png")
    words = ["basd_cifar10", *WORDS, f"data.source={images}", "data.train_size=null", "data.val_size=32",
             "train.epochs=1", "train.warmup_epochs=0"]
    run = tmp_path/"run"
    train(run, *words)
    (run/"result.json").unlink()                                                        # as if killed before its end
    files = lambda: {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    before = files()
    for split, name in (("train", "training"), ("test", "test")):
        changed = next((images/split).rglob("*.png"))
        whole = changed.read_bytes()
        ImageOps.invert(Image.open(changed)).save(changed)
        assert main(["train", *words, "--run-dir", str(run), "--resume"]) == 2
        assert f"holds a run of other {name} images" in capsys.readouterr().err and files() == before
        changed.write_bytes(whole)
    train(run, *words, "--resume")
