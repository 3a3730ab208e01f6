"""On a GPU: no step waits for it, numbers are those of a CPU, and runs train, compile, stop and go on. Skipped where
there is none."""
import json

import pytest
import torch
from conftest import TINY
from test_ranks import BASD, FRAME, METHODS

from basd.core.numerics import eigh, condition_covariance
from basd.runs.run_directory import load_checkpoint
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer
from basd.training.optimizers import LossScale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = METHODS | {"followed": [*BASD, "method.selector.solver=tracking", "method.selector.warmup_steps=3",
                                  "method.losses.spectral.form=moments"]}
QUIET = ["train.log_every=1000", "train.log_gradients=false"]


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 1, 33, 33), (64, 64)])
def test_decomposition_is_replayed(shape):
    "The recorded decomposition is that of LAPACK, for each new matrix, eager and compiled"
    def values(A):
        lam, X = eigh(A)
        return lam, X @ (lam[..., None]*X.mT)
    compiled = torch.compile(values, fullgraph=True)
    for seed in range(3):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        A, _ = condition_covariance(x @ x.mT)
        for f in (values, compiled):
            lam, again = f(A.cuda())
            torch.testing.assert_close(lam.cpu(), torch.linalg.eigvalsh(A).flip(-1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(again.cpu(), A, rtol=1e-4, atol=1e-4)


def trainer(folder, *words, device="cuda", resume=False):
    "A trainer on digits, ready for its next step"
    t = build_trainer(load_recipe("deit_cifar", [*FRAME, *words])[""], folder, device, resume, bars=False)
    t.task.train()
    return t


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits(name, tmp_path):
    "Twenty steps of the trainer in a mode in which waiting for the device is an error"
    t = trainer(tmp_path/"run", *QUIET, "train.epochs=40", "train.precision=bf16", "views.mix_prob=0.7",
                *METHODS[name])
    batches = [b for e in range(4) for b in t.data.read(e, e*t.data.per_epoch, (e + 1)*t.data.per_epoch)]
    for b in batches[:12]: t.run_step([b])      # created once: position embeddings, resampling matrices, optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in (batches*2)[12:32]: t.run_step([b])
    finally: torch.cuda.set_sync_debug_mode("default")
    assert t.step == 32 and t.skipped.item() == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "dot"])
def test_fp16_stays_finite(optimizer, tmp_path):
    "Two hundred steps with a loss scale: no fault, finite weights, few overflows, and no step waits for the device"
    t = trainer(tmp_path/"run", *QUIET, "train.epochs=40", "train.precision=fp16", f"train.optimizer={optimizer}", *METHODS["basd"])
    batches, overflows = [*t.data.read(0, 0, t.data.per_epoch)], torch.zeros((), device="cuda")
    for b in batches: t.run_step([b])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for b in (batches*200)[:200]:
            t.run_step([b])
            overflows += t.find(LossScale).overflow
    finally: torch.cuda.set_sync_debug_mode("default")
    assert t.skipped.item() == 0 and all(p.isfinite().all() for p in t.task.parameters())
    assert overflows.item() < 20 and t.find(LossScale).scale.item() >= 1


def moved(x, device):
    "Everything in a nest of containers, on the device"
    if isinstance(x, torch.Tensor): return x.to(device)
    if isinstance(x, torch.Generator): return torch.Generator(device).manual_seed(x.initial_seed())
    if isinstance(x, dict): return {k: moved(v, device) for k, v in x.items()}
    return type(x)(moved(v, device) for v in x) if type(x) in (list, tuple) else x


def outcome(folder, device, *words):
    ("Losses and gradients of one step in float64, with all samples drawn on the CPU "
     "(RKD samples its images itself: it takes all)")
    t = trainer(folder, *QUIET, "train.seed=1", *(w.replace("images: 8", "") for w in words), device=device)
    t.task.double()
    prepare, t.step = t.task.method.sample, 20
    t.task.method.sample = lambda p, n, d: (q := prepare(p, n, "cpu"))._replace(samples=moved(q.samples, d))
    out = t.forward(next(iter(t.data.read(0, 0, 1))))
    out["loss"].backward()
    return ({k: v.detach().cpu() for k, v in out["losses"].items()},
            {n: p.grad.cpu() for n, p in t.task.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("blend", ["views.mixup=0", "views.cutmix=0"])
@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_those_of_a_cpu(name, blend, tmp_path, record_property):
    "Losses agree to 1e-5, gradients to 1e-4 of each parameter's largest: decompositions are made of products there"
    parts, grads = outcome(tmp_path/"gpu", "cuda", blend, *METHODS[name])
    parts1, grads1 = outcome(tmp_path/"cpu", "cpu", blend, *METHODS[name])
    assert parts.keys() == parts1.keys() and grads.keys() == grads1.keys()
    size = lambda x: x.abs().max().clamp(min=1e-8)
    record_property("parts", max((abs(parts[k] - parts1[k])/size(parts1[k])).item() for k in parts1))
    record_property("gradients", max(((grads[k] - grads1[k]).abs().max()/size(grads1[k])).item() for k in grads1))
    for k in parts1: assert abs(parts[k] - parts1[k]) < 1e-5*size(parts1[k]), k
    for k in grads1: assert (grads[k] - grads1[k]).abs().max() < 1e-4*size(grads1[k]) + 1e-9, k


@pytest.mark.parametrize("words", [[], ["train.precision=bf16", "train.grad_accum_steps=2"],
                                   ["train.precision=bf16", "train.compile=true"],
                                   ["views.crop=center", "teacher.cache=CACHE"]],
                         ids=["float32", "bf16", "compiled", "cached"])
def test_a_run_from_the_shell(words, basd, tmp_path):
    "Train, evaluate; every logged number is finite"
    run, words = tmp_path/"run", [w.replace("CACHE", str(tmp_path/"cache")) for w in words]
    basd("train", "basd_cifar10", *TINY, *words, "--run-dir", run)
    rows = [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows if r["kind"] == "epoch"] == [1, 2, 3]
    assert all(v == v and abs(v) < 1e9 for r in rows for v in r.values() if isinstance(v, float))
    top1 = json.loads((run/"result.json").read_text())["test"]["last"]["top1"]
    assert f"{top1:.2f}" in basd("evaluate", run).stdout


def test_stop_and_go_on(tmp_path):
    "A run that is stopped in the middle of an epoch and resumed ends close to the weights of one that is not"
    words = "train.epochs=2", "train.warmup_epochs=0", *METHODS["basd"]
    whole = trainer(tmp_path/"whole", *words)
    whole.fit()
    half = trainer(tmp_path/"half", *words)
    half.agreed_to_stop = lambda: half.step >= 11
    assert half.fit() is None
    again = trainer(tmp_path/"half", *words, resume=True)
    assert again.step == 11
    again.fit()
    a, b = (load_checkpoint(tmp_path/r/"last.pt")["task"] for r in ("whole", "half"))
    assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-2, atol=1e-3) for k in a)
