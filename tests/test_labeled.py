"Few labels and all images: what a method may do with a label, which images its cross-entropy sees, ranks, resuming, replay"
import copy
import pytest
import torch
from conftest import TINY
from forks import on_ranks
from test_ranks import FRAME, METHODS, in_double, parts_and_gradients
from torch.testing import assert_close

from basd.runs.run_directory import digest, load, save, set_rng_state
from basd.training.nonfinite import look_again, repeat, replay
from basd.runs.recipes import load_recipe
from basd.training.trainer import Trainer, in_lines

FEW = ["data.labeled=.1", "views.blend_prob=.7", "train.gradient_shares=false"]


def first_batch(trainer): return next(iter(trainer.read(0, 0, 1, trainer.views)))


@pytest.mark.parametrize("name", METHODS)
def test_labels_enter_by_cross_entropy(name, tmp_path):
    "The loss is affine in the labels, or the method says that it reads them in another way"
    trainer = in_double(load_recipe("basd_cifar10", [*FRAME, *METHODS[name]])[""], tmp_path/"run")
    batch, before = first_batch(trainer), copy.deepcopy(trainer.lesson.state_dict())
    def loss(rarity):
        trainer.rarity = rarity
        trainer.lesson.load_state_dict(before)
        torch.manual_seed(0)
        return trainer.forward(batch)["loss"].detach()
    none, once, twice = (loss(r) for r in (0., 1., 2.))
    affine = torch.isclose(twice - once, once - none, rtol=1e-6, atol=1e-9)
    assert affine or trainer.needs.labels
    assert once != none


def test_refused(tmp_path):
    words = [*TINY, *FEW, "method={name: distill, loss: dkd}"]
    with pytest.raises(ValueError, match="data.labeled=0.1: method 'distill' with these options reads the label of every"):
        Trainer(load_recipe("basd_cifar10", words)[""], tmp_path/"run", bars=False)
    assert not (tmp_path/"run").exists()


def test_what_cross_entropy_sees(tmp_path):
    "Rows of the target are there where image and partner have a label, which a pair has both or neither of"
    trainer = Trainer(load_recipe("basd_cifar10", [*TINY, *FEW])[""], tmp_path/"run", bars=False)
    assert (len(trainer.fit), int((trainer.labels >= 0).sum()), trainer.rarity) == (256, 26, 256/26)
    seen, total = 0, 0.
    for batch in trainer.read(0, 0, trainer.per_epoch, trainer.views):
        _, taught, target, _ = trainer.show(batch)
        has = batch["label"] >= 0
        assert torch.equal(batch["label"], trainer.labels[batch["index"]])
        assert torch.equal(has[::2], has[1::2]) and len(taught.tokens[0]) == len(has)
        assert torch.equal(target.labels.sum(1) > 0, has)
        assert_close(target.labels[has].sum(1), torch.full((int(has.sum()),), trainer.rarity))
        seen, total = seen + int(has.sum()), total + target.labels.sum().item()
        trainer.step += 1
    assert seen == 26 and total == pytest.approx(256)                # the mean over an epoch is that over the labeled images


def test_labels_alone(tmp_path):
    "As many steps, on labeled images alone"
    words = [*TINY, *FEW, "teacher.model=null", "teacher.untrained=false", "teacher.img_size=null", "teacher.kwargs=null",
             "method={name: ce}"]
    trainer = Trainer(load_recipe("basd_cifar10", words)[""], tmp_path/"run", bars=False)
    taught = Trainer(load_recipe("basd_cifar10", [*TINY, *FEW])[""], tmp_path/"taught", bars=False)
    assert trainer.per_epoch == taught.per_epoch and trainer.labels is None
    assert set(trainer.fit) == set((taught.labels >= 0).nonzero().flatten().tolist())
    assert "256 training (26 with a label), " in in_lines(trainer.made_of())[0]


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
    state = lambda run: digest({k: v for k,v in load(run/"last.pt").items() if k not in ("elapsed", "offset")})
    Trainer(recipe, tmp_path/"whole", bars=False).train()
    half = Trainer(recipe, tmp_path/"half", bars=False)
    half.told_to_stop = lambda: half.step >= 5
    assert half.train() is None
    Trainer(recipe, tmp_path/"half", resume=True, bars=False).train()
    assert state(tmp_path/"half") == state(tmp_path/"whole")


def test_replay(tmp_path):
    "The step that ended a run is repeated with the labels that it had"
    trainer = Trainer(load_recipe("basd_cifar10", [*TINY, *FEW])[""], tmp_path/"run", bars=False)
    found = look_again(trainer)
    save(found, tmp_path/"run"/"nonfinite.pt")
    trainer.lesson.load_state_dict(found["lesson"])
    set_rng_state(found["rng"])
    assert (found["batch"]["label"] < 0).any() and found["rarity"] == trainer.rarity
    assert replay(tmp_path/"run", trust=True)["parts"] == repeat(trainer, found["batch"], 0)["parts"]
