"What a run keeps: the weights it says, statistics of batch norm, the best epoch, callbacks' values, the mode of every module"
import json
from types import SimpleNamespace

import basd
import numpy as np
import pytest
import torch
from conftest import TINY
from forks import on_ranks
from safetensors.torch import load_file
from torch import nn

from basd.cli import train
from basd.core.registry import METHODS
from basd.data.sources import ImageDataset, open_source
from basd.methods.base import Callback
from basd.models.students import create_student, load_student
from basd.runs.figures import _mark_best
from basd.runs.inference import predict_logits, validate
from basd.runs.metrics import read_metrics
from basd.runs.recipes import build_recipe, load_recipe
from basd.runs.run_directory import load_checkpoint, save_checkpoint, saved_weights
from basd.training.build import _schedule_notes, build_trainer, unused_parameters
from basd.training.callbacks import MetricsLog, NonFiniteGuard, StepRecorder, Validation
from basd.training.task import DistillationTask
from basd.training.trainer import Trainer

CE = [*TINY, "method.name=ce", "train.log_every=4"]


class Net(nn.Module):
    "Three layers, one of them batch norm"
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x): return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_exported_weights_are_those_named(tmp_path):
    "Also the last ones, which the evaluation of the best and the averaged ones had overwritten"
    words = [*CE, "train.epochs=3", "train.lr=.01", "train.min_lr=.01", "train.ema=.5", "data.val_size=16"]
    for name in ("last", "best", "ema"):
        result = train("basd_cifar10", *words, f"train.export={name}", run_dir=str(tmp_path/name), bars=False)[""]
        exported, saved = load_file(tmp_path/name/"student.safetensors"), saved_weights(tmp_path/name)
        same = [k for k, v in saved.items() if all(torch.equal(exported[n], v[n]) for n in exported)]
        assert result["exported"] == name and name in same and ("ema" in same) == (name == "ema"), same


def one_bad_step(*callbacks):
    "A run of six steps, the third of which has an image with a hole; its task and its guard"
    torch.manual_seed(0)
    task = DistillationTask(create_student(Net(), img_size=16, layers=[]), None, METHODS.get("ce")(None, None, None, 10), 10).train()
    batches = [(torch.rand(8, 3, 16, 16), torch.randint(10, (8,))) for _ in range(6)]
    batches[2][0][3, :, 5, 5] = torch.nan
    data = SimpleNamespace(total=6, per_epoch=6, steps=lambda e, first: iter([[b] for b in batches[first:]]), given=lambda b: b, close=lambda: None)
    settings = SimpleNamespace(epochs=1, log_every=3, clip_grad=None, max_nonfinite_steps=4)
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2, fused=True)
    optimizer.grad_scale = None
    guard = NonFiniteGuard(SimpleNamespace(train=settings), None, StepRecorder())
    Trainer(task, data, optimizer, settings, [guard, *callbacks]).fit()
    return task, guard


def test_a_skipped_step_leaves_batch_norm_as_it_was():
    task, guard = one_bad_step()
    norm = task.student.model.norm
    assert guard.skipped == 1 and norm.num_batches_tracked == 5
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all() and (norm.running_mean != 0).all()


def averaged(folder):
    "Validation and test loss of averaged weights, of an undisturbed run and of one that is stopped in the middle of its second epoch"
    recipe = load_recipe("ce", ["data.train_size=128", "data.val_size=48", "data.batch_size=16", "views.mix_prob=0", "train.epochs=2",
                                "student={model: lcnet_035, img_size: 32, patch_size: null, depth: null, width: null, heads: null}",
                                "train.warmup_epochs=0", "train.ema=.9", "train.lr=.05"])["ce"]
    found = []
    for stop in (None, 11):
        run = folder/f"stopped at {stop}"
        trainer = build_trainer(recipe, run, bars=False)
        if stop:
            trainer.agreed_to_stop = lambda trainer=trainer: trainer.step == 11
            trainer.fit()
            trainer = build_trainer(recipe, run, bars=False, resume=True)
        trainer.fit()
        found.append([[r["val_loss_ema"] for r in read_metrics(run, "epoch")], trainer.result["test"]["ema"]["loss"]])
    return found


def test_averaged_batch_norm_is_that_of_the_checkpoint(tmp_path):
    "On two ranks, whose images differ: a resumed run has the same losses, and the saved weights have the loss that is reported"
    undisturbed, resumed = on_ranks(averaged, tmp_path, ranks=2, folder=tmp_path)
    assert resumed == undisturbed
    student, images = load_student(tmp_path/"stopped at None", layers=[]), ImageDataset(open_source("digits", "test"))
    student.model.load_state_dict(saved_weights(tmp_path/"stopped at None")["ema"])
    assert abs(validate(student, images, range(len(images)), 32, "cpu")["loss"] - undisturbed[1]) < 1e-5


def test_best_epoch():
    "A loss that is no number is never the best, unless it is all there is"
    def best(losses, by):
        validation = Validation("run", None, {})
        for epoch, value in enumerate(losses, 1): validation.keep_best({f"val_{by}": value, "epoch": epoch}, by)
        return validation.best["epoch"]
    nan = float("nan")
    assert best([.5, .3, nan, .9], "distill_loss") == 2
    assert best([nan, .9, .5, nan], "distill_loss") == 3 and best([nan], "distill_loss") == 1
    assert best([50., nan, 60., 40.], "top1") == 3 and best([0., 0.], "top1") == 2
    drawn = []
    axis = SimpleNamespace(axvline=lambda x, **k: drawn.append(x), annotate=lambda *a, **k: None, get_xaxis_transform=lambda: None)
    _mark_best(axis, [dict(step=s, val_distill_loss=v) for s, v in ((1, nan), (2, .3), (3, nan), (4, .9))], "distill_loss")
    assert drawn == [2]


def test_values_of_numpy_are_kept_and_others_refused(tmp_path):
    state = dict(best=np.float64(1.5), at=[np.int64(3), (np.zeros(2, np.float32), True)], net=nn.BatchNorm1d(2).state_dict())
    save_checkpoint(state, tmp_path/"one.pt")
    read = load_checkpoint(tmp_path/"one.pt")
    assert (read["best"], read["at"][0], type(read["at"][0])) == (1.5, 3, int)
    assert torch.equal(read["at"][1][0], torch.zeros(2)) and read["at"][1][1] is True
    assert torch.equal(read["net"]["running_var"], torch.ones(2))
    with pytest.raises(ValueError, match=r"the state.callbacks.Best.where\[1\] is of type PosixPath, and a checkpoint keeps tensors"):
        save_checkpoint(dict(callbacks=dict(Best=dict(where=[1, tmp_path]))), tmp_path/"two.pt")
    assert not (tmp_path/"two.pt").exists()


@pytest.mark.parametrize("measure", [validate, predict_logits])
def test_frozen_modules_stay_so(measure):
    "Where one part of a model is in evaluation and the rest in training, both are so afterwards, also after a stop"
    student = create_student(Net(), img_size=16, layers=[]).train()
    student.model.norm.eval()
    images = ImageDataset(open_source("digits", "test"))
    measure(student, images, range(8), 16, "cpu")
    if measure is validate: assert validate(student, images, range(8), 16, "cpu", stop=lambda: True) is None
    assert student.training and student.model.head.training and not student.model.norm.training


def test_steps_of_the_learning_rate_after_the_end_have_a_note():
    run = dict(epochs=100, warmup_epochs=5)
    (note,) = _schedule_notes(SimpleNamespace(**run, lr_steps=[60, 150, 180]))
    assert note.startswith("train.lr_steps: 150, 180 come after the last of 100 epochs")
    assert not _schedule_notes(SimpleNamespace(**run, lr_steps=[60, 80])) and not _schedule_notes(SimpleNamespace(**run, lr_steps=None))


class Losses(Callback):
    "The loss of every step, and the learning rate with which it is made"
    order = 99
    def __init__(self): self.seen, self.rates = [], []
    def after_backward(self, t): self.seen.append(t.out["loss"].item())
    def before_update(self, t): self.rates.append(t.optimizer.param_groups[-1]["lr"])


def test_a_row_is_a_mean_over_the_steps_that_were_made(tmp_path):
    "One step that was skipped made every number of its row nan, which is no JSON"
    log, losses = MetricsLog(tmp_path), Losses()
    log.open()
    one_bad_step(log, losses)
    first, second = read_metrics(tmp_path, "step")
    assert (first["skipped"], second["skipped"], np.isnan(losses.seen).tolist()) == (1, 1, [False, False, True, False, False, False])
    assert first["loss"] == pytest.approx(np.mean(losses.seen[:2]), rel=1e-6) and second["loss"] == pytest.approx(np.mean(losses.seen[3:]), rel=1e-6)
    assert all(np.isfinite(v) for v in first.values() if isinstance(v, float))
    def strictly(name): raise ValueError(f"{name} is no JSON")
    for line in (tmp_path/"metrics.jsonl").read_text().splitlines(): json.loads(line, parse_constant=strictly)


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    log = MetricsLog(tmp_path)
    log.open()
    log.write(dict(kind="step", step=1, loss=float("nan"), of=[1., float("inf")]))
    log.write(dict(kind="test", step=1, best_by=None))
    step, test = read_metrics(tmp_path)
    assert "NaN" not in (tmp_path/"metrics.jsonl").read_text() and np.isnan(step["loss"]) and np.isnan(step["of"][1]) and step["of"][0] == 1.
    assert test["best_by"] is None and log.log.rows[1] == test


def test_the_learning_rate_of_a_row_is_that_of_its_step(tmp_path):
    seen = Losses()
    train("basd_cifar10", *CE, "train.log_every=1", "train.epochs=1", run_dir=str(tmp_path/"run"), bars=False, callbacks=[seen])
    assert [r["lr"] for r in read_metrics(tmp_path/"run", "step")] == seen.rates and len({*seen.rates}) == len(seen.rates) > 3


class Spare(Net):
    "Has a layer that is never used, a second head that is, and no statistics of a batch"
    def __init__(self): super().__init__(); self.norm, self.spare, self.second = nn.GroupNorm(2, 8), nn.Linear(3, 3), nn.Linear(8, 10)
    def forward(self, x): z = torch.relu(self.norm(self.conv(x))).mean((2, 3)); return self.head(z) + self.second(z)


def with_a_spare_layer(folder):
    "The weights after a run whose student has a layer that nothing uses"
    torch.manual_seed(0)
    basd.train("ce", student=dict(model=Spare(), img_size=16), run_dir=str(folder/"run"), bars=False,
               data=dict(train_size=96, val_size=24, batch_size=24, workers=0), views=dict(mix_prob=0.), train=dict(epochs=2, lr=.01, warmup_epochs=1, export="last", precision="float32"))
    return {k: v.tolist() for k,v in load_file(folder/"run"/"ce"/"student.safetensors").items()}


def test_a_layer_that_is_never_used(tmp_path):
    "Ended a run of several ranks in its second step"
    assert unused_parameters(create_student(Spare(), img_size=16, layers=[])) == ["model.spare.weight", "model.spare.bias"]
    assert unused_parameters(create_student(Net(), img_size=16, layers=[])) == []
    weights = {}
    for ranks in (1, 2):
        (tmp_path/str(ranks)).mkdir()
        weights[ranks] = on_ranks(with_a_spare_layer, tmp_path/str(ranks), ranks=ranks, folder=tmp_path/str(ranks))
    torch.manual_seed(0)
    before = Spare().state_dict()
    for k,v in weights[1].items():
        assert np.allclose(weights[2][k], v, atol=2e-5), k
        assert np.array_equal(v, before[k]) == k.startswith("spare"), k
    student = create_student(Net(), img_size=16, layers=[]).train()
    student.model.norm.eval()
    unused_parameters(student)
    assert student.training and student.model.head.training and not student.model.norm.training and student.model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("given, words", [
    (dict(views=dict(crop_padding=4, crop_scale=[.5, 1.])), "crop_scale"), (dict(train=dict(lr_steps=[3, 5, 3])), "an epoch twice"),
    (dict(train=dict(lr_steps=[], lr_decay=.5)), "lr_decay=0.5 belongs to train.lr_steps")])
def test_settings_of_which_one_would_be_ignored(given, words):
    with pytest.raises(ValueError, match=words): build_recipe(given)


def test_small_numbers_among_arguments_are_numbers():
    "YAML takes 1e-5 for a text"
    recipe = build_recipe(dict(student=dict(kwargs=dict(eps="1e-5", name="e5", norm=dict(a=["-2.5E3", "1e"])))))
    assert recipe.student.kwargs == dict(eps=1e-5, name="e5", norm=dict(a=[-2500., "1e"]))
