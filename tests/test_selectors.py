"""Selectors whose state moves in a run: stopped anywhere and resumed they are equal to the last bit, two ranks
equal one, and no step reads a teacher layer that was not run"""
import pytest
import torch
from conftest import TINY
from forks import on_ranks, state_of
from test_ranks import in_double
from torch.testing import assert_close

from basd.core.registry import SELECTORS
from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

# so that in 16 steps frontiers move by measurement and by the clock, and maps settle
OWN = {"progressive": dict(share=.3, ema_decay=.5, until=.8, fast=.5), "ramp": dict(until=.9), "complementary": dict(batches=3),
       "arc_length": dict(batches=3), "nearest_once": dict(batches=3, tau=.3)}
# columns distance, temperature, entropy in the log: what is not measured is not there
LOGGED = {"progressive": [True, False, False], "nearest_once": [False, False, True]} | {n: [False]*3 for n in ("ramp", "complementary", "arc_length", "leap", "fixed")}
WORDS = [w for w in TINY if not w.startswith(("method.selector", "teacher.kwargs"))] + [
    "teacher.kwargs={patch_size: 8, depth: 6, embed_dim: 48, num_heads: 3}", "student.drop_path=0", "train.log_every=2", "train.epochs=2",
    "train.log_gradients=false", "train.ema=null", "data.val_size=0"]


def arguments(name):
    taken = {"dim": 24, "rank": 4} if hasattr(SELECTORS.get(name), "measure") else {}
    options = dict(name=name) | taken | OWN.get(name, {})
    return [*WORDS, "method.selector={" + ", ".join(f"{k}: {v}" for k,v in options.items()) + "}"]


def moved(run): return [(r["step"], r["selector/weights"], r.get("selector/frontier")) for r in read_metrics(run) if r["kind"] == "step"]


@pytest.mark.parametrize("name", SELECTORS)
def test_stop_and_go_on(name, tmp_path):
    "Stopped three times: between two rows of the log, right after one, and between two of the teacher's depths"
    recipe = load_recipe("basd_cifar10", [*arguments(name), *["train.precision=bf16"]*(name == "nearest")])[""]
    build_trainer(recipe, tmp_path/"whole", bars=False).fit()
    run = tmp_path/"stopped"
    trainer = build_trainer(recipe, run, bars=False)
    for stop in (5, 6, 11):             # the second right after a row of the log
        trainer.agreed_to_stop = lambda t=trainer, stop=stop: t.step >= stop
        assert trainer.fit() is None
        layers = [(s.depth, s.mixed_layers) for s in [trainer.task.method.selector]]
        trainer = build_trainer(recipe, run, resume=True, bars=False)
        assert trainer.step == stop and [(s.depth, s.mixed_layers) for s in [trainer.task.method.selector]] == layers
    trainer.fit()
    assert state_of(run) == state_of(tmp_path/"whole") and moved(run) == moved(tmp_path/"whole")
    row = next(r for r in read_metrics(tmp_path/"whole") if r["kind"] == "step")
    assert [f"selector/{c}" in row for c in ("distance", "temperature", "entropy")] == LOGGED.get(name, [True, True, True])
    if name in OWN: # the test can fail: something has moved
        first, *_, last = moved(tmp_path/"whole")
        assert first[1:] != last[1:] or name in ("complementary", "arc_length")     # these are equal from the first batch on
        assert name != "nearest_once" or any(0. in w for w in last[1])              # layers were dropped


def whole_run(words, run):
    "Weights over a run, and the depth at its end"
    trainer = in_double(load_recipe("basd_cifar10", words)[""], run)
    trainer.step = 0
    trainer.fit()
    return torch.tensor([r["selector/weights"] for r in read_metrics(run) if r["kind"] == "step"]), trainer.task.method.selector.depth


@pytest.mark.parametrize("name", SELECTORS)
def test_two_ranks_equal_one(name, tmp_path):
    (one, depth), (two, depth_of_two) = (
        on_ranks(whole_run, arguments(name), tmp_path/f"run_{ranks}", ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert depth == depth_of_two
    assert_close(two, one, rtol=1e-6, atol=1e-7)
