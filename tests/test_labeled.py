"Few labels and all images: how labels enter a loss, which images cross-entropy uses, ranks, resuming, replay"
import copy
import pytest
import torch
from conftest import TINY
from forks import on_ranks, state_of
from PIL import Image
from test_ranks import FRAME, METHODS, in_double, parts_and_gradients
from torch.testing import assert_close

from basd.runs.recipes import to_dict, load_recipe
from basd.runs.run_directory import save_checkpoint, set_rng_state
from basd.training.nonfinite import diagnose_nonfinite, rerun_step
from basd.training.build import _as_many, build_trainer, in_lines, loader_arguments, replay

FEW = ["data.labeled=.1", "views.mix_prob=.7", "train.log_gradients=false"]


def first_batch(trainer): return next(iter(trainer.data.read(0, 0, 1)))


@pytest.mark.parametrize("name", METHODS)
def test_labels_enter_by_cross_entropy(name, tmp_path):
    "The loss is affine in the labels, or the method requires labels"
    trainer = in_double(load_recipe("basd_cifar10", [*FRAME, *METHODS[name]])[""], tmp_path/"run")
    batch, before = first_batch(trainer), copy.deepcopy(trainer.task.state_dict())
    def loss(label_scale):
        trainer.task.label_scale = label_scale
        trainer.task.load_state_dict(before)
        torch.manual_seed(0)
        return trainer.forward(batch)["loss"].detach()
    none, once, twice = (loss(r) for r in (0., 1., 2.))
    affine = torch.isclose(twice - once, once - none, rtol=1e-6, atol=1e-9)
    assert affine or trainer.data.requires.labels
    assert once != none


def test_refused(tmp_path):
    words = [*TINY, *FEW, "method={name: distill, loss: dkd}"]
    with pytest.raises(ValueError, match="data.labeled=0.1: method 'distill' with these options reads the label of every"):
        build_trainer(load_recipe("basd_cifar10", words)[""], tmp_path/"run", bars=False)
    assert not (tmp_path/"run").exists()


def test_pairs_take_an_even_share(tmp_path):
    "Labeled images are mixed with labeled ones, in pairs; a rank's micro-batch of odd size has none, and would lose a third of the labels"
    words = [*TINY, *FEW, "data.batch_size=60", "train.grad_accum_steps=4"]
    with pytest.raises(ValueError, match="the 15 images of a rank's micro-batch are no pairs; make data.batch_size a multiple of 8"):
        build_trainer(load_recipe("basd_cifar10", words)[""], tmp_path/"run", bars=False)
    build_trainer(load_recipe("basd_cifar10", [*words, "views.mix_prob=0"])[""], tmp_path/"run", bars=False)


@pytest.mark.parametrize("few", [7, 30, 60, 99])
def test_each_class_as_often(few):
    "Labels alone take as many steps as all images: images sorted by class, as in folders, are repeated alike"
    labels = torch.arange(10).repeat_interleave(few)
    taken = torch.tensor(_as_many(list(range(10*few)), 1000))
    assert len(taken) == 1000 and (taken.bincount(minlength=10*few).amax() - taken.bincount(minlength=10*few).amin()) <= 1
    counts = labels[taken].bincount()
    assert counts.amax() - counts.amin() <= 1


def test_what_cross_entropy_sees(tmp_path):
    "Rows of the target are there where image and partner have a label, which a pair has both or neither of"
    trainer = build_trainer(load_recipe("basd_cifar10", [*TINY, *FEW])[""], tmp_path/"run", bars=False)
    data, task = trainer.data, trainer.task
    assert (len(data.fit), int((data.labels >= 0).sum()), task.label_scale) == (256, 26, 256/26)
    seen, total = 0, 0.
    for step, batch in enumerate(data.read(0, 0, data.per_epoch)):
        _, teacher_features, target, _ = task.prepare_batch(*data.given(batch), step=step, total_steps=data.total)
        has = batch["label"] >= 0
        assert torch.equal(batch["label"], data.labels[batch["index"]])
        assert torch.equal(has[::2], has[1::2]) and len(teacher_features.tokens[0]) == len(has)
        assert torch.equal(target.labels.sum(1) > 0, has)
        assert_close(target.labels[has].sum(1), torch.full((int(has.sum()),), task.label_scale))
        seen, total = seen + int(has.sum()), total + target.labels.sum().item()
    assert seen == 26 and total == pytest.approx(256)                # the mean over an epoch is that over the labeled images


def test_labels_alone(tmp_path):
    "Labels alone take as many steps, on labeled images only"
    words = [*TINY, *FEW, "teacher.model=null", "teacher.untrained=false", "teacher.img_size=null", "teacher.kwargs=null",
             "method={name: ce}"]
    recipe = load_recipe("basd_cifar10", words)[""]
    trainer = build_trainer(recipe, tmp_path/"run", bars=False)
    distilled = build_trainer(load_recipe("basd_cifar10", [*TINY, *FEW])[""], tmp_path/"taught", bars=False)
    assert trainer.data.per_epoch == distilled.data.per_epoch and trainer.data.labels is None
    assert set(trainer.data.fit) == set((distilled.data.labels >= 0).nonzero().flatten().tolist())
    assert "256 training (26 with a label), " in in_lines(loader_arguments(recipe, trainer.data, trainer.task))[0]


def gradients(folder, words):
    trainer = in_double(load_recipe("basd_cifar10", [*words, *FEW, "student.drop_path=0"])[""], folder)
    return parts_and_gradients(trainer, first_batch(trainer))


def test_two_ranks_equal_one(tmp_path):
    (parts1, grads1), (parts2, grads2) = (
        on_ranks(gradients, tmp_path/f"run_{ranks}", TINY, ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert parts1.keys() == parts2.keys() and grads1.keys() == grads2.keys()
    for k in parts1: assert_close(parts2[k], parts1[k], rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    for k in grads1: assert_close(grads2[k], grads1[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")


def test_stop_and_go_on(tmp_path):
    recipe = load_recipe("basd_cifar10", [*TINY, *FEW, "train.epochs=2"])[""]
    build_trainer(recipe, tmp_path/"whole", bars=False).fit()
    half = build_trainer(recipe, tmp_path/"half", bars=False)
    half.agreed_to_stop = lambda: half.step >= 5
    assert half.fit() is None
    build_trainer(recipe, tmp_path/"half", resume=True, bars=False).fit()
    assert state_of(tmp_path/"half") == state_of(tmp_path/"whole")


def test_replay(tmp_path):
    "The step that ended a run is replayed with the same labels"
    recipe = load_recipe("basd_cifar10", [*TINY, *FEW])[""]
    trainer = build_trainer(recipe, tmp_path/"run", bars=False)
    trainer.task.train()
    found = diagnose_nonfinite(trainer, {}, {}) | dict(recipe=to_dict(recipe), names=trainer.data.names)
    save_checkpoint(found, tmp_path/"run"/"nonfinite.pt")
    trainer.task.load_state_dict(found["task"])
    set_rng_state(found["rng"])
    assert (found["batch"]["label"] < 0).any() and found["label_scale"] == trainer.task.label_scale
    here = rerun_step(trainer.task, *trainer.data.given(found["batch"]), **{k: found[k] for k in ("step", "total_steps", "epoch", "micro")})
    assert replay(tmp_path/"run", trust=True)["losses"] == here["losses"]


def test_classes_without_an_image_or_a_label(tmp_path, monkeypatch, capsys):
    "Are said before the first step, and refused where one is left"
    monkeypatch.chdir(tmp_path)
    for name, count in (("apple", 60), ("cherry", 2), ("fig", 30)):
        (tmp_path/"fruit"/name).mkdir(parents=True)
        for i in range(count): Image.new("RGB", (32, 32), (i, 2*i, 9)).save(tmp_path/"fruit"/name/f"{i}.png")
    words = [*(w for w in TINY if not w.startswith("data.")), "data.source=fruit", "data.root=null", "data.batch_size=4", "data.workers=0", "data.val_size=0", "method={name: ce}"]
    def lines(folder, *more):
        build_trainer(load_recipe("basd_cifar10", [*words, *more])[""], tmp_path/folder, bars=False)
        return [l for l in capsys.readouterr().out.splitlines() if " of the 3 classes of " in l]
    assert not lines("all")
    line, = lines("few", "data.train_size=6", "data.split_seed=0")
    assert "1 of the 3 classes of fruit/train has no image among the 6 that are trained on, 'cherry' for one" in line
    with pytest.raises(ValueError, match="the 4 images that are trained on have a single class, 'apple'; raise data.train_size"):
        lines("one", "data.train_size=4", "data.split_seed=13")
    line, = lines("labels", "data.labeled=4", "method={name: distill}", "teacher={model: deit_tiny_patch16_224, untrained: true}")
    assert "1 of the 3 classes of fruit/train has no label among the 4 that are used, 'cherry' for one; raise data.labeled" in line
