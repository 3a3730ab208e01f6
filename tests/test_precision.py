"fp16 with a loss scale, on a CPU: an overflow skips its step and halves the scale, and is no fault; ranks, DOT, resuming"
import pytest
import torch
from conftest import TINY
from forks import on_ranks, state_of

from basd.core.distributed import gather_objects, rank
from basd.methods.base import Callback
from basd.runs.builders import _checkpoint_blocks
from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.runs.run_directory import checksum
from basd.training.build import build_trainer
from basd.training.optimizers import LossScale

FP16 = [*TINY, "train.precision=fp16", "train.epochs=1", "train.warmup_epochs=0", "train.log_every=2",
        "train.grad_accum_steps=2"]


class Spoil(Callback):
    "An infinite gradient at one step; weights and scale before each step"
    order = 13
    def __init__(self, at, spoil): self.at, self.spoil, self.weights, self.scales = at, spoil, [], []
    def before_batch(self, t):
        if t.micro: return
        self.weights.append(checksum(dict(t.task.named_parameters()))); self.scales.append(t.find(LossScale).scale.item())
    def before_clip(self, t):
        if t.step == self.at: self.spoil(t.groups[0])


def trainer(folder, *words, at=None, spoil=None, resume=False):
    t = build_trainer(load_recipe("basd_cifar10", [*FP16, *words])[""], folder, "cpu", resume, bars=False)
    t.listen([*t.callbacks, Spoil(at, spoil)])
    return t


def into_gradients(params): params[0].grad.view(-1)[0] = torch.inf


def into_labels(params): params[0].of_labels = params[0].of_labels*torch.inf


@pytest.mark.parametrize("optimizer, spoil", [
    ("adamw", into_gradients), pytest.param("dot", into_gradients, marks=pytest.mark.slow), ("dot", into_labels)])
def test_an_overflow_skips_its_step(optimizer, spoil, tmp_path):
    "Exactly that step changes nothing, the scale halves once, no fault is counted, and a resumed run ends bit-equal"
    words = [f"train.optimizer={optimizer}"]
    whole = trainer(tmp_path/"whole", *words, at=2, spoil=spoil)
    assert whole.fit() is not None
    seen = whole.find(Spoil)
    assert seen.scales == [2.**16]*3 + [2.**15]*(len(seen.scales) - 3)
    assert seen.weights[3] == seen.weights[2] and len(set(seen.weights)) == len(seen.weights) - 1
    assert whole.skipped.item() == 0 and [r["overflow"] for r in read_metrics(tmp_path/"whole", "step")][:2] == [0, .5]
    half = trainer(tmp_path/"half", *words, at=2, spoil=spoil)
    half.agreed_to_stop = lambda: half.step >= 3
    assert half.fit() is None
    again = trainer(tmp_path/"half", *words, resume=True)
    assert again.step == 3 and again.find(LossScale).scale.item() == 2.**15
    again.fit()
    assert state_of(tmp_path/"half") == state_of(tmp_path/"whole")


def one_rank_overflows(folder):
    "On rank 1 gradients overflow at step 1, and the loss is not finite at step 3: scales, faults and weights of all ranks"
    t = trainer(folder, "train.max_nonfinite_steps=5", "train.grad_accum_steps=1")
    t.task.student.model.head.weight.register_hook(lambda g: g*torch.inf if rank() and t.step == 1 else g)
    given = t.task.method.forward
    def spoiled(*args):
        out = given(*args)
        return out | dict(loss=out["loss"]*torch.nan) if rank() and t.step == 3 else out
    t.task.method.forward = spoiled
    t.fit()
    return gather_objects((t.find(Spoil).scales, t.find(Spoil).weights, t.skipped.item()))


def test_ranks_agree(tmp_path):
    one, two = on_ranks(one_rank_overflows, tmp_path/"run", ranks=2, folder=tmp_path)
    scales, weights, skipped = one
    assert one == two and skipped == 1
    assert scales == [2.**16]*2 + [2.**15]*(len(scales) - 2)
    assert [i for i in range(1, len(weights)) if weights[i] == weights[i - 1]] == [2, 4]


def stored(folder, *words):
    "Weights after three steps with drop-path, and bytes that the forward pass of the first stores for the backward pass"
    t = build_trainer(load_recipe("basd_cifar10", [*TINY, "student.depth=6", *words])[""], folder,
                      "cpu", bars=False)
    t.task.train()
    seen = {}
    def keep(x): seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
    batches = [*t.data.read(0, 0, 3)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = t.task.student(t.task.scaled(t.data.given(batches[0])[0]))
    before = sum(seen.values())
    del features
    torch.manual_seed(1)
    for b in batches: t.run_step([b])
    return {n: p.detach().clone() for n, p in t.task.named_parameters()}, before


def test_recomputed_activations(tmp_path):
    "The same weights to the last bit under drop-path, with tokens and attention tapped, from less than half of the stored bytes"
    (plain, much), (again, less) = stored(tmp_path/"plain"), stored(tmp_path/"again", "student.grad_checkpointing=true")
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)
    assert less < .5*much, (less, much)


def test_recomputing_is_refused():
    "Together with compilation, and for a model that has no setter"
    recipe = lambda *words: load_recipe("basd_cifar10", [*TINY, *words])[""]
    with pytest.raises(ValueError, match="were not tried together"): _checkpoint_blocks(None, recipe("train.compile=true"))
    with pytest.raises(ValueError, match="set_grad_checkpointing"): _checkpoint_blocks(torch.nn.Linear(2, 2), recipe())
