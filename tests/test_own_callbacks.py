"Callbacks that a user brings: named in a recipe or given in Python, saved, resumed, and refused where they may not be"
import sys

import pytest
import torch
from test_trackers import CE, Kill, Killed

from basd.cli import main, train
from basd.core import registry
from basd.methods.base import Callback
from basd.runs.metrics import read_metrics

MODULE = '''
from pathlib import Path
from basd.methods.base import Callback
Path("mark").touch()

class Validation(Callback):                    # the name of one of the package's own
    kept = ("seen",)
    def __init__(self): self.seen = 0
    def after_step(self, t):
        self.seen += 1
        t.meter.add({"seen": __import__("torch").tensor(float(self.seen))})
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_admitted", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path/"mine.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("mine", None)


def seen(run): return [r["seen"] for r in read_metrics(run, "step")]


def test_named_in_a_recipe(here, capsys):
    "It is saved and resumed; what reads the run needs no trust, and to train it again needs it"
    words = ["basd_cifar10", *CE, "train.callbacks=[mine:Validation]"]
    with pytest.raises(Killed): train(*words, run_dir="run", bars=False, callbacks=[lambda: Kill(7)])
    assert train(*words, run_dir="run", bars=False, resume=True)[""]
    assert seen("run") == [1., 2., 3., 4., 5., 6., 7., 8.]
    registry._admitted.clear(); sys.modules.pop("mine"); (here/"mark").unlink()
    assert main(["evaluate", "run", "--quick"]) == 0 and not (here/"mark").exists()
    (here/"run"/"result.json").unlink()
    capsys.readouterr()
    assert main(["resume", "run"]) == 2 and "'mine:Validation' would import code" in capsys.readouterr().err
    assert not (here/"mark").exists()
    assert main(["resume", "run", "--trust"]) == 0 and (here/"mark").exists()


class Count(Callback):
    kept = ("seen",)
    def __init__(self): self.seen = torch.zeros(())
    def after_loss(self, t): self.seen += 1; t.meter.add(dict(seen=self.seen))


def test_given_in_python(here):
    "An instance, or a class; with a state that a resumed run does not take it is refused"
    with pytest.raises(Killed): train("basd_cifar10", *CE, run_dir="run", bars=False, callbacks=[Count(), Kill(7)])
    with pytest.raises(ValueError, match="the callback Count, which is not given here"):
        train("basd_cifar10", *CE, run_dir="run", bars=False, resume=True)
    assert train("basd_cifar10", *CE, run_dir="run", bars=False, resume=True, callbacks=[Count])[""]
    assert seen("run") == [1., 2., 3., 4., 5., 6., 7., 8.]


@pytest.mark.parametrize("words, message", [("[mine.Validation]", "package.module:callable"), ("[nowhere:x]", "cannot be imported"),
                                         ("[mine:Path]", "gives a PosixPath"), ("[mine:absent]", "cannot be imported")])
def test_a_wrong_name(words, message, here, capsys):
    assert main(["train", "basd_cifar10", *CE, f"train.callbacks={words}", "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (here/"run").exists()
