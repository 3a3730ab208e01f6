"Images without labels: folders, what is learned and logged, refusals, evaluation, resuming, ranks"
import copy
import json
import pytest
import torch
from conftest import TINY
from forks import on_ranks, state_of
from PIL import Image
from sklearn.datasets import load_digits
from test_ranks import FRAME, METHODS, in_double, parts_and_gradients
from torch.testing import assert_close

import basd as package
from basd.analysis.reports import evaluate_run, evaluate_student
from basd.models.students import load_student
from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

BARE = ["data.labels=none", "views.mix_prob=.7", "train.log_gradients=false"]
PHOTOS = [*(w for w in TINY if not w.startswith("data.")), "data.source=photos", "data.batch_size=16", "data.workers=0"]


def photos(root, classes=True):
    "60 JPEGs of three digits, in class folders or at several depths"
    digits = load_digits(n_class=3)
    for c in range(3):
        for i, x in enumerate(digits.images[digits.target == c][:20]):
            path = root/"photos"/(str(c) if classes else ("", "trips", "trips/far")[i % 3])/f"{c}-{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((15.9*x).astype("uint8")).resize((32, 32)).convert("RGB").save(path)
    return root


def made(folder, *words, recipe="basd_cifar10"):
    return build_trainer(load_recipe(recipe, [*TINY, *BARE, *words])[""], folder, bars=False)


@pytest.mark.figures
def test_sixty_photos(tmp_path, monkeypatch, capsys):
    "Five lines: a student without a head, k-NN where folders are classes, a sheet; and nothing depends on the labels"
    monkeypatch.chdir(photos(tmp_path))
    result = package.train("unlabeled", PHOTOS, run_dir="runs/photos", bars=False)[""]
    output, run = capsys.readouterr().out, tmp_path/"runs/photos"
    assert "38 training (no label is read), 10 validation, 12 test images\n" in output
    assert output.count("photos has no folders of splits: a fifth of its 60 images, the same share of each class, is drawn") == 1
    assert "test distillation loss" in output and "among the 12 test images" in output and (run/"figures/run.png").is_file()
    best = result["test"]["best"]
    assert best.keys() == {"distill_loss", "n", "knn", "k"} and (best["n"], best["k"]) == (12, 2)
    rows = [r["val_distill_loss"] for r in read_metrics(run, "epoch")]
    assert rows[-1] < rows[0] and result["val_distill_loss"] == min(rows) == rows[result["best_epoch"] - 1]
    assert not [k for r in read_metrics(run, "step") for k in r if k == "loss/ce"]
    student = load_student(run)
    assert student(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).logits is None
    again = evaluate_student(str(run))["best"]
    report = evaluate_run(str(run), "best", corrupted=0)["knn"]
    assert again["knn"] == best["knn"] == pytest.approx(report["top1"]) and report["k"] == 2


def test_any_depth(tmp_path, monkeypatch):
    "Images at several depths have no classes, are all used, and are refused where labels would be needed"
    monkeypatch.chdir(photos(tmp_path, classes=False))
    result = package.train("unlabeled", PHOTOS, run_dir="run", bars=False)[""]
    assert result["test"]["best"].keys() == {"distill_loss", "n"} and result["test"]["best"]["n"] == 12
    with pytest.raises(ValueError, match="run was trained without labels, and photos/test has none"): evaluate_student("run")


@pytest.mark.parametrize("words, message", [
    (["method={name: ce}"], "data.labels=none: method 'ce' learns from labels alone"),
    (["method={name: distill, loss: dkd}"], "data.labels=none: method 'distill' with these options reads the label of every"),
    (["data.labeled=.1"], "data.labeled=0.1 chooses among the labels, and data.labels=none reads none"),
    (["train.optimizer=dot"], "data.labels=none leaves cross-entropy out"),
    (["method={name: distill}", "teacher.kwargs.num_classes=0"], "compares logits, and the teacher has no head"),
], ids=lambda w: w[0] if isinstance(w, list) else "")
def test_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message): made(tmp_path/"run", *words)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_labels_are_not_read(name, tmp_path):
    "A step of each method is finite without labels, and its gradient is that of the teacher's losses; others are refused"
    words = [*FRAME, *METHODS[name], "data.labels=none"]
    try: trainer = in_double(load_recipe("basd_cifar10", words)[""], tmp_path/"run")
    except ValueError as e: assert "data.labels=none" in str(e); return
    out = trainer.forward(next(iter(trainer.data.read(0, 0, 1))))
    assert "loss_unweighted/ce" not in out["metrics"]                      # or it would be reported as dead
    assert out["loss"].isfinite() and "ce" not in out["losses"] and (trainer.data.images.labels == -1).all()
    assert_close(out["loss"], sum(out["losses"].values()))
    out["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.task.parameters())


def test_head(tmp_path):
    "Logits are compared with a head of the teacher's classes; features need none"
    logits = made(tmp_path/"logits", "method={name: distill}", "teacher.kwargs.num_classes=7")
    assert (logits.task.classes, logits.data.names) == (7, list("0123456"))
    assert made(tmp_path/"features").task.classes == 0


def test_validation_changes_nothing(tmp_path):
    "The validation loss is the same twice, and leaves the method and the random state as they were"
    trainer = made(tmp_path/"run")
    before, rng = copy.deepcopy(trainer.task.state_dict()), torch.get_rng_state()
    first, second = (trainer.data.evaluate(trainer.task.student, "val", "float32") for _ in range(2))
    assert first == second and first["n"] == 50 and torch.equal(rng, torch.get_rng_state())
    after = trainer.task.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()) and trainer.task.student.training


def test_stop_and_go_on(tmp_path):
    made(tmp_path/"whole", "train.epochs=2").fit()
    half = made(tmp_path/"half", "train.epochs=2")
    half.agreed_to_stop = lambda: half.step >= 5
    assert half.fit() is None
    build_trainer(load_recipe("basd_cifar10", [*TINY, *BARE, "train.epochs=2"])[""], tmp_path/"half", resume=True, bars=False).fit()
    assert state_of(tmp_path/"half") == state_of(tmp_path/"whole")
    results = [json.loads((tmp_path/r/"result.json").read_text()) for r in ("whole", "half")]
    assert results[0]["test"] == results[1]["test"] and results[0]["val_distill_loss"] == results[1]["val_distill_loss"]


def measured(name, folder):
    trainer = in_double(load_recipe("basd_cifar10", [*FRAME, *METHODS[name], "data.labels=none", "data.val_size=48",
                                                     "student.drop_path=0"])[""], folder)
    trainer.data.start_readers(16)
    found = trainer.data.evaluate(trainer.task.student, "val", "float32")
    return parts_and_gradients(trainer, next(iter(trainer.data.read(0, 0, 1)))), found


@pytest.mark.parametrize("name", ["basd", "vrm"])       # vrm reads each image twice
def test_two_ranks_equal_one(name, tmp_path):
    ((parts1, grads1), val1), ((parts2, grads2), val2) = (
        on_ranks(measured, name, tmp_path/f"run_{ranks}", ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    for k in parts1: assert_close(parts2[k], parts1[k], rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    for k in grads1: assert_close(grads2[k], grads1[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")
    assert val1["n"] == val2["n"] == 48 and val1["distill_loss"] == pytest.approx(val2["distill_loss"], rel=1e-6)


def test_sixty_pictures_are_enough_for_the_recipe():
    "A fifth of them is the test split and a fifth of the rest the validation split; 38 are left"
    assert load_recipe("unlabeled")[""].data.batch_size <= 38


@pytest.mark.parametrize("size, method, who", [(2, "{name: match, losses: {rkd: {}}}", "losses.rkd takes 3"), (1, "{name: match, losses: {crd: {}}}", "losses.crd takes 2"),
                                               (1, "{name: distill, loss: vrm, alpha: 1.0}", "logits.loss takes 2")])
def test_too_few_to_validate(size, method, who, tmp_path):
    "Images among which a loss compares: refused before the first step where validation would read 0 or stop the run"
    words = [f"data.val_size={size}", f"method={method}"]
    with pytest.raises(ValueError, match=f"{who} images at least, and there are {size} to validate on; raise data.val_size"):
        made(tmp_path/"run", *words)
    assert not (tmp_path/"run").exists()


def test_a_distillation_head(tmp_path):
    "Such a student, trained without labels, is validated and tested"
    words = [*TINY, *BARE, "method={name: distill, head: dist, alpha: 1.0}", "student.model=deit_tiny_distilled_patch16_224", "train.epochs=1"]
    result = package.train("basd_cifar10", words, run_dir=str(tmp_path/"run"), bars=False)[""]
    assert result["test"]["best"]["distill_loss"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_to_validate_on_are_large_enough(ranks, tmp_path, monkeypatch):
    "Micro-batches of four divide nine images into three, three and three, and five into a batch of two, in which no triple is"
    trainer = made(tmp_path/"run", "data.batch_size=4", "data.val_size=5", "method={name: match, losses: {rkd: {}}}")
    monkeypatch.setattr("basd.training.build.world_size", lambda: ranks)
    for images in range(4, 40):
        parts = trainer.data.unlabeled_batches(trainer.task, images)
        assert min(map(len, parts))*ranks >= 3 and sum(map(len, parts)) == images//ranks
    assert max(map(len, trainer.data.unlabeled_batches(trainer.task, 36))) == 4//ranks


def test_fewer_images_than_ranks(tmp_path, monkeypatch):
    "No rank is without an image"
    trainer = made(tmp_path/"run", "data.val_size=1", "method={name: distill, alpha: 1.0}")
    monkeypatch.setattr("basd.training.build.world_size", lambda: 2)
    with pytest.raises(ValueError, match="one image per rank at least, and there are 0 to validate on; raise data.val_size"):
        trainer.data.check_unlabeled_batches(trainer.task)
