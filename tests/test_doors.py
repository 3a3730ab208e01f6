"""Models and data sets of one's own by package.module:callable: trained, stopped, resumed, evaluated, used as a teacher;
what fails in them is a sentence."""
import sys

import pytest
import yaml
from basd.cli import main
from basd.core import registry
from basd.core.registry import trusting
from basd.models.students import load_student, save_student, create_student

MODULE = '''
import torch
from torch import nn

def cnn(num_classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def big(width=16): return cnn(3, width)

def words(num_classes, **kwargs): return 'no module'

def count(split): return 3

def broken(num_classes, **kwargs): raise RuntimeError('out of order')

class Images:
    classes = ['red', 'green', 'blue']
    def __init__(self, split): self.n = dict(train=48, test=12)[split]
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        x = torch.randint(0, 99, (3, 16, 16), generator=torch.Generator().manual_seed(i + self.n), dtype=torch.uint8)
        x[i%3] += 100
        return x, i%3
'''
RECIPE = dict(data=dict(source="own_doors:Images", batch_size=12, val_size=12, workers=0),
              views=dict(color="none", mixup=0, cutmix=0, random_erasing=0),
              student=dict(model="own_doors:cnn", img_size=16, width=12),
              teacher=dict(model="own_doors:big", img_size=16, mean=[0, 0, 0], std=[1, 1, 1]),
              method=dict(name="distill"), train=dict(epochs=2, warmup_epochs=0, lr=.01, log_every=1))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(registry, "_admitted", set())
    (tmp_path/"own_doors.py").write_text(MODULE)
    (tmp_path/"mine.yaml").write_text(yaml.safe_dump(RECIPE))
    yield tmp_path
    sys.modules.pop("own_doors", None)


def forget(monkeypatch):
    monkeypatch.setattr(registry, "_admitted", set())
    sys.modules.pop("own_doors", None)


def test_trained_resumed_evaluated_and_a_teacher(here, capsys, monkeypatch):
    assert main(["train", "mine.yaml", "--run-dir", "run"]) == 0
    assert main(["train", "mine.yaml", "--run-dir", "run", "--resume"]) == 0
    forget(monkeypatch)
    assert main(["evaluate", "run", "--quick"]) == 2 and "would import code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="would import code"): load_student(here/"run")
    assert "own_doors" not in sys.modules
    assert main(["evaluate", "run", "--quick", "--trust"]) == 0
    forget(monkeypatch)
    with trusting(["own_doors:cnn"]): student = load_student(here/"run")
    assert student.label_names == ["red", "green", "blue"] and student.model[0].out_channels == 12
    plain = ["teacher.model=null", "teacher.mean=null", "teacher.std=null", "teacher.img_size=null", "teacher.run=run"]
    forget(monkeypatch)
    train_words = ["train", "mine.yaml", *plain, "student.model=own_doors:cnn", "--run-dir", "taught"]
    assert main(train_words) == 0


def test_a_foreign_teacher_run(here, capsys, monkeypatch):
    "A run whose student.json names code teaches only where it is trusted"
    assert main(["train", "mine.yaml", "--run-dir", "run"]) == 0
    forget(monkeypatch)
    words = ["train", "quickstart", "data.train_size=64", "data.val_size=20", "train.epochs=1", "data.batch_size=16"]
    again = [*words, "method.name=distill", "teacher.model=null", "teacher.kwargs=null", "teacher.untrained=false", "teacher.run=run",
             "--run-dir", "new"]
    assert main(again) == 2
    assert "would import code" in capsys.readouterr().err and "own_doors" not in sys.modules
    main([*again, "--trust"])                              # a teacher of other classes: refused after its import
    assert "would import code" not in capsys.readouterr().err and "own_doors" in sys.modules


@pytest.mark.parametrize("change, message", [("student.model=own_doors:words", "should return an nn.Module"),
                                          ("student.model=own_doors:broken", "out of order"),
                                          ("student.model=own_doors:nothing", "cannot be imported"),
                                          ("student.depth=3", "depth"), ("data.source=own_doors:count", "returned a"),
                                          ("student.img_size=null", "give img_size"), ("teacher.mean=null", "give mean and std")])
def test_what_fails_is_a_sentence(change, message, here, capsys):
    assert main(["train", "mine.yaml", change, "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err, err
