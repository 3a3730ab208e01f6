"""Looking at what somebody else has made runs none of it: a recipe that lies in a run, a checkpoint or a download names
registered methods, losses and scores only, and fetches nothing. The modules here leave a mark when they are imported,
and lie where the import would find them."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import NO_MODEL, TINY
from forks import ENVIRONMENT, end, start

from basd.core import registry
from basd.runs.run_directory import load_checkpoint, save_checkpoint
from basd.cli import main
from basd.training.build import replay

CE = ["train", "basd_cifar10", *TINY, "data.train_size=64", "data.val_size=20", "train.epochs=1", "train.ema=null",
      "train.warmup_epochs=0", "method.name=ce"]
PAYLOAD = """open('mark', 'w').close()
import torch
from basd.methods.base import CrossEntropy
class Evil(CrossEntropy): pass
class Loss(torch.nn.Module): pass
def score(outputs): return outputs['labels'].double()
def model(num_classes=2, **kwargs): return torch.nn.Flatten()
def data(split): return []
"""
HOSTILE = {"method": dict(name="payload:Evil"), "method in a package": dict(name="runs.hostile.payload:Evil"),
           "loss": dict(name="match", losses={"payload:Loss": {}}),
           "score": dict(name="pocl", scores=["payload:score"]), "student": dict(student=dict(model="payload:model")),
           "teacher": dict(teacher=dict(model="payload:model")), "data": dict(data=dict(source="payload:data")),
           "further teacher": dict(teacher=dict(extra_teachers=[dict(model="payload:model")]))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished")/"run"
    assert main([*CE, "--run-dir", str(run)]) == 0
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory on the import path, as a notebook's is"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_admitted", set())
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("payload", "runs")]: del sys.modules[name]


def recipe_with(method, path):
    tree = yaml.safe_load(path.read_text())
    for section in set(method) & {"student", "teacher", "data"}: tree[section] |= method[section]
    if "name" in method: tree["method"] = method
    path.write_text(yaml.safe_dump(tree))


def hostile(finished, here, method):
    "A run from elsewhere, with a recipe that names code beside it"
    run = here/"runs"/"hostile"
    shutil.copytree(finished, run)
    recipe_with(method, run/"recipe.yaml")
    for at in (here, run): (at/"payload.py").write_text(PAYLOAD)
    (here/"extends.yaml").write_text("extends: runs/hostile/recipe.yaml\ntrain: {epochs: 1}")
    (here/"link.yaml").symlink_to(run/"recipe.yaml")
    return run


RUN, RECIPE = "runs/hostile", "runs/hostile/recipe.yaml"
COMMANDS = {"evaluate": ["evaluate", RUN, "--quick"], "report": ["evaluate", RUN, "--corrupted", "0"],
            "analyze": ["analyze", RUN, "--metrics", "attention", "--images", "8"],
            "train its recipe": ["train", RECIPE, "--run-dir", "new"],
            "train what extends it": ["train", "extends.yaml", "--run-dir", "new"],
            "train a link to it": ["train", "link.yaml", "--run-dir", "new"],
            "resume by name": [*CE, "--resume", "--run-dir", RUN],
            "resume": ["train", RECIPE, "--resume", "--run-dir", RUN],
            "bench": ["bench", RECIPE, "--reps", "1", "data.batch_size=4"],
            "compare": ["compare", RECIPE, "--seeds", "1", "--folder", "race"]}


@pytest.mark.parametrize("command, kind", [(c, "method") for c in COMMANDS] + [("evaluate", k) for k in HOSTILE if k != "method"])
def test_nothing_is_imported(command, kind, finished, here, capsys):
    hostile(finished, here, HOSTILE[kind])
    assert main(COMMANDS[command]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert "would import code" in err[0] and "--trust" in err[0] and "Traceback" not in "".join(err), err
    assert not (here/"mark").exists() and not (here/"new").exists()


def test_a_teacher(finished, here, capsys):
    "A teacher is loaded as weights only; its recipe is not run"
    hostile(finished, here, HOSTILE["method"])
    assert main([*CE, "method.name=distill", *NO_MODEL, f"teacher.run={RUN}", "--run-dir", "taught"]) == 0
    assert not (here/"mark").exists()


def test_a_race_with_a_hostile_run_in_its_folder(finished, here, capsys):
    hostile(finished, here, HOSTILE["method"])
    shutil.copytree(here/RUN, here/"race"/"ce-0")
    (here/"mine.yaml").write_text("method: {name: ce}")
    assert main(["compare", "mine.yaml", "--seeds", "1", "--folder", "race", "--set", *CE[2:]]) == 2
    assert not (here/"mark").exists()


def test_replay(finished, here):
    run = hostile(finished, here, HOSTILE["method"])
    state = load_checkpoint(run/"last.pt")
    save_checkpoint(dict(recipe=yaml.safe_load((run/"recipe.yaml").read_text()), step=0, classes=10, epoch=0., total_steps=1, micro=0, names=None,
              label_scale=1., task=state["task"], rng=state["rng"][0], batch={}), run/"nonfinite.pt")
    with pytest.raises(ValueError, match="would import code"): replay(run)
    assert not (here/"mark").exists()
    with pytest.raises(KeyError): replay(run, trust=True)           # the batch above is empty
    assert (here/"mark").exists()


def in_folder(folder, words):
    "The command in `folder`, which `__main__` takes off the import path"
    os.chdir(folder)
    sys.path[:] = [p for p in sys.path if p not in ("", str(folder))]
    return main(words)


def test_the_shell(finished, here):
    "`python -m basd` in the directory where the module lies; with --trust the mark is there"
    hostile(finished, here, HOSTILE["method"])
    words = ["evaluate", RUN, "--quick"]
    done = subprocess.run([sys.executable, "-m", "basd", *words], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 2 and "would import code" in done.stderr and not (here/"mark").exists(), done.stderr
    assert end(start(in_folder, here, [*words, "--trust"], out=here/"out.txt")) == [0], (here/"out.txt").read_text()
    assert (here/"mark").exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A working directory that is not on the import path, with a recipe of one's own and a module beside it"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(registry, "_admitted", set())
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"my_method.py").write_text(PAYLOAD)
    (tmp_path/"mine"/"mine.yaml").write_text("extends: basd_cifar10\nmethod: {name: 'my_method:Evil'}")
    yield tmp_path
    sys.modules.pop("my_method", None)


WORDS = [w for w in CE[2:] if not w.startswith("method")]


def forget(monkeypatch):
    "Undo the import, as in a process that has not made it"
    monkeypatch.setattr(registry, "_admitted", set())
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "mine" not in p])
    sys.modules.pop("my_method")


def test_a_module_of_ones_own(elsewhere, capsys, monkeypatch):
    "A recipe that is named finds a module beside it, or in the working directory; what it made is looked at with --trust"
    assert main(["train", "mine/mine.yaml", *WORDS, "--run-dir", "run"]) == 0
    assert (elsewhere/"mark").exists()
    for more, message in (([], "would import code"), (["--trust"], "cannot be imported")):    # not on the import path here
        forget(monkeypatch) if "my_method" in sys.modules else None
        assert main(["evaluate", "run", "--quick", *more]) == 2
        assert message in capsys.readouterr().err
    shutil.copy("mine/my_method.py", ".")
    assert main(["evaluate", "run", "--quick", "--trust"]) == 0
    forget(monkeypatch)
    assert main(["train", "basd_cifar10", *WORDS, "method.name=my_method:Evil", "--run-dir", "by_override"]) == 0


def test_images_that_the_user_names(finished, here, capsys):
    "A module that the command itself names is imported, by way of a recipe that may name none"
    hostile(finished, here, HOSTILE["student"])
    (here/"my_data.py").write_text("from basd.data.sources import open_source\ndef data(split): return open_source('digits', split)\n")
    assert main(["evaluate", RUN, "--quick", "--on", "my_data:data"]) == 2 and "student.model='payload:model' would import code" in capsys.readouterr().err
    shutil.copytree(finished, "fine")
    for more in (["--quick"], ["--corrupted", "0"]): assert main(["evaluate", "fine", "--on", "my_data:data", *more]) == 0
    assert "359 images" in capsys.readouterr().out and (here/"fine"/"report-my_data-data.json").is_file()
    assert not (here/"mark").exists()
    del sys.modules["my_data"]


@pytest.mark.slow
def test_a_race_of_ones_own(elsewhere, capsys):
    "A benchmark's processes find such a module, too"
    assert main(["compare", "mine/mine.yaml", "--seeds", "1", "--folder", "race", "--jobs", "2", "--set", *WORDS]) == 0
    rows = json.loads((elsewhere/"race"/"results.json").read_text())["rows"]
    assert {r["name"] for r in rows if r["n"] == 1} == {"ce", "mine"}, (elsewhere/"race"/"mine-0"/"failed.txt").read_text()


FETCH = {"teacher": dict(teacher=dict(model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)),
         "teacher of the hub": dict(teacher=dict(model="hf-hub:nobody/nothing", pretrained=True)),
         "teacher by address": dict(teacher=dict(model="gcvit_xxtiny.in1k", pretrained=True)),
         "data": dict(data=dict(source="hfds/nobody/nothing", download=True)),
         "stream": dict(data=dict(source="hfids/nobody/nothing", download=True)),
         "data of torchvision": dict(data=dict(source="torch/cifar10", root="nowhere", download=True))}


@pytest.mark.parametrize("kind", FETCH)
def test_nothing_is_fetched(kind, finished, here, capsys, monkeypatch):
    "Neither evaluating nor repeating a run from elsewhere opens a socket or looks up a name"
    import socket

    import huggingface_hub.constants as hub
    requests = []
    def refuse(*args, **kwargs): requests.append(args); raise OSError("no network in this test")
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"): monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(here/"hub"))
    run = here/"runs"/"hostile"
    shutil.copytree(finished, run)
    tree = yaml.safe_load((run/"recipe.yaml").read_text())
    for section, keys in FETCH[kind].items(): tree[section] |= keys
    if "teacher" in FETCH[kind]: tree["method"] = dict(name="distill"); tree["teacher"] |= dict(kwargs={}, untrained=False)
    (run/"recipe.yaml").write_text(yaml.safe_dump(tree))
    main(["evaluate", RUN, "--corrupted", "0"])
    assert main(["train", RECIPE, "--run-dir", "new"]) == 2
    assert "nothing was downloaded" in capsys.readouterr().err and not (here/"new").exists()
    assert main(["compare", RECIPE, "--seeds", "1", "--folder", "race"]) == 2
    assert not requests
    if kind in ("teacher by address", "data of torchvision"):       # not the hub's, which has an off switch of its own
        main(["train", RECIPE, "--run-dir", "new", "--trust"])
        assert requests                                                # so the test can fail
