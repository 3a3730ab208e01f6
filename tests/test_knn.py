"k-NN of the student during training: when and of what, ranks, the best epoch by it, resuming, refusals, what is printed of it"
import json
import shutil

import pytest
import torch
from conftest import NO_MODEL, TINY
from forks import on_ranks, state_of
from test_unlabeled import BARE, PHOTOS, photos

import basd as package
from basd.analysis.evaluation import knn_accuracy, predict
from basd.runs.export import _card_rows
from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.runs.run_directory import load_checkpoint
from basd.training.build import build_trainer
from basd.training.callbacks import EMA

CE = [*(w for w in TINY if not w.startswith(("method.", "teacher."))), *NO_MODEL, "method={name: ce}"]
OF_DIGITS = [*TINY, *BARE, "data.knn_source=digits", "train.knn_every=1"]


def made(folder, *words, resume=False):
    return build_trainer(load_recipe("basd_cifar10", words)[""], folder, resume=resume, bars=False)


def near(rows): return [r.get("val_knn") for r in rows]


def test_measured_and_nothing_changed(tmp_path, capsys):
    "Every second epoch and the last, also of averaged weights; as evaluation has it; weights, optimizer, random state as without"
    plain = made(tmp_path/"plain", *CE)
    plain.fit()
    capsys.readouterr()
    trainer = made(tmp_path/"run", *CE, "train.knn_every=2")
    trainer.fit()
    rows, printed = read_metrics(tmp_path/"run", "epoch"), capsys.readouterr().out
    assert [k is None for k in near(rows)] == [True, False, False] and "val_knn_ema" in rows[1]
    assert "basd_cifar10: k-NN every 2 epochs: 50 images held out of digits/train, by 256 of its others, k = 12\n" in printed
    assert f"val k-NN {rows[1]['val_knn']:.2f} %, val k-NN ema" in printed
    data, student = trainer.data, trainer.task.student.eval()
    of = [predict(made_of(student), data.images, at, 16) for at in (data.fit, data.val)]
    assert rows[2]["val_knn"] == pytest.approx(knn_accuracy(*(x[k] for x in of for k in ("features", "labels")), k=12)["top1"])
    assert rows[2]["val_knn"] > 20                                        # chance: 10
    before, after = (load_checkpoint(tmp_path/r/"last.pt") for r in ("plain", "run"))
    for part in ("task", "optimizer", "rng", "meter"): assert str(before[part]) == str(after[part])
    bare = lambda run: [{k: v for k, v in r.items() if "knn" not in k and not k.startswith("time/")} for r in read_metrics(tmp_path/run)]
    assert bare("run") == bare("plain")


def made_of(student):
    from basd.training.task import tapped_at
    return tapped_at(student, [-1], False)


def test_best_by_labeled_images(tmp_path, monkeypatch, capsys):
    "Unlabeled images, a labeled folder besides: its k-NN chooses the best epoch, also of a run that was stopped; all say so"
    monkeypatch.chdir(photos(tmp_path, classes=False))
    (tmp_path/"photos").rename(tmp_path/"bare")
    photos(tmp_path)
    (tmp_path/"photos").rename(tmp_path/"labeled")
    words = [*(w for w in PHOTOS if w not in ("data.source=photos", "train.epochs=3")), "data.source=bare", "train.epochs=5",
             "data.knn_source=labeled", "train.knn_every=2", "train.eval_metric=knn"]
    result = package.train("unlabeled", words, run_dir="whole", bars=False)[""]
    printed, epochs = capsys.readouterr().out, read_metrics("whole", "epoch")
    assert "k-NN every 2 epochs: 10 images held out of labeled/train, by 38 of its others, k = 6\n" in printed
    assert "labeled has no folders of splits: a fifth of its 60 images" in printed
    top = max(r.get("val_knn", -1) for r in epochs)
    best = [r for r in epochs if r.get("val_knn") == top][-1]
    assert [r["epoch"] for r in epochs if "val_knn" in r] == [2, 4, 5]
    assert (result["best_by"], result["best_epoch"], result["val_knn"]) == ("knn", best["epoch"], top)
    assert result["val_distill_loss"] == best["val_distill_loss"] and load_checkpoint("whole/best.pt")["epoch"] == best["epoch"]
    assert f"best epoch {best['epoch']} by knn (its val k-NN {top:.2f} %)".replace("by knn", "by k-NN") in printed
    assert _card_rows("whole", "best")["epoch"] == f"{best['epoch']}, the best of the validation split by k-NN"
    recipe = load_recipe("unlabeled", words)[""]
    half = build_trainer(recipe, "half", bars=False)
    half.agreed_to_stop = lambda: half.step >= 5
    assert half.fit() is None and half.find(package.training.callbacks.Validation).best["epoch"] == 2
    shutil.move("labeled", "moved")                                       # the images may move; others are refused
    recipe.data.knn_source = "moved"
    next((tmp_path/"moved").rglob("0-7.jpg")).rename(tmp_path/"moved/1/0-7.jpg")
    with pytest.raises(ValueError, match="half holds a run of other k-NN images"): build_trainer(recipe, "half", resume=True, bars=False)
    (tmp_path/"moved/1/0-7.jpg").rename(tmp_path/"moved/0/0-7.jpg")
    build_trainer(recipe, "half", resume=True, bars=False).fit()
    assert state_of("half") == state_of("whole") and json.loads((tmp_path/"half/result.json").read_text())["best_epoch"] == best["epoch"]


def measured(folder):
    trainer = made(folder, *OF_DIGITS, "data.val_size=51")
    trainer.data.start_readers(16)
    return [trainer.data.evaluate_knn(trainer.task.student, stop) for stop in (None, lambda: True)]


def test_two_ranks_equal_one(tmp_path):
    assert (one := on_ranks(measured, tmp_path/"one", ranks=1, folder=tmp_path)) == on_ranks(measured, tmp_path/"two", ranks=2, folder=tmp_path)
    assert one[0]["knn"] > 10 and one[1] is None


def test_leaves_no_trace(tmp_path):
    "Random state, modes of all modules, and hooks that stay for a compiled step, are as before; features that overflow count as zeros"
    trainer = made(tmp_path/"run", *OF_DIGITS)
    average, student, rng = trainer.find(EMA).average.module, trainer.task.student.install_hooks(), torch.get_rng_state()
    modes = [m.training for model in (average, student) for m in model.modules()]
    found = [trainer.data.evaluate_knn(m)["knn"] for m in (student, average, student)]
    assert len(set(found)) == 1 and found[0] > 10 and torch.equal(rng, torch.get_rng_state()) and not student.taps.outputs
    assert modes == [m.training for model in (average, student) for m in model.modules()] and False in modes and True in modes
    with torch.no_grad(): next(iter(student.parameters())).fill_(torch.inf)
    assert trainer.data.evaluate_knn(student)["knn"] < 20


@pytest.mark.parametrize("words, message", [
    ([*BARE, "train.knn_every=1"], "data.labels=none reads no label; name labeled images with data.knn_source"),
    (["train.eval_metric=knn"], "train.knn_every=0 measures none; set train.knn_every"),
    (["data.knn_source=digits"], "data.knn_source='digits' is read for k-NN, and train.knn_every=0 measures none"),
    (["train.knn_every=1", "data.val_size=0"], "none of the 1438 images of digits/train is; raise data.val_size"),
    ([*OF_DIGITS, "data.source=photos", "data.knn_source=photos", "data.val_size=.2", "data.train_size=null"], "data.knn_source='photos': the images of photos/train have no labels"),
    ([*OF_DIGITS, "data.knn_source=one"], "are of one; name others with data.knn_source"),
    ([*CE, "train.knn_every=1", "student.model=test_knn:Flat"], "train.knn_every=1 reads the features of the student's last layer, and Flat has no list of layers"),
], ids=lambda w: "" if isinstance(w, list) else w[:30])
def test_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(photos(tmp_path, classes=False))
    shutil.copytree(tmp_path/"photos", tmp_path/"one/cat")
    with pytest.raises(ValueError, match=message): made(tmp_path/"run", *TINY, "data.root=null", *words)
    assert not (tmp_path/"run").exists()


class Flat(torch.nn.Module):
    "A student without layers that can be found"
    def __init__(self, num_classes, **kw):
        super().__init__()
        self.head = torch.nn.Linear(3*16*16, num_classes)

    def forward(self, x): return self.head(x.flatten(1))
