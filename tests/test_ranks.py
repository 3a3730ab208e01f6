"Two ranks with half of the batch each are one rank with the whole of it: same loss, same gradients"
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from torch.testing import assert_close

from basd.training.checkpoints import load
from basd.training.lesson import open_data
from basd.training.recipes import load_recipe
from basd.training.faults import replay

SCRIPT = """
import os, sys, torch
from basd.data.views import build_loader
from basd.geometry.statistics import global_mean, world
from basd.training.lesson import processes, rank
from basd.training.recipes import load_recipe
from basd.training.trainer import Trainer
out, method, *words = sys.argv[1:]
build = Trainer.build_models
def build_double(self): build(self); self.lesson.double(); self.teacher.double()
Trainer.build_models = build_double
with processes('cpu') as device:
    trainer = Trainer(load_recipe(method, words)[''], out + '.run', device, bars=False)
    trainer.lesson.train()
    trainer.step = 20                                                   # all ramps are up, so every term counts
    loader = build_loader(trainer.images, trainer.fit, trainer.views, 32, seed=0, epoch=0, rank=rank(), world=world(), workers=0)
    result = trainer.forward(next(iter(loader)))
    result['loss'].backward()
    said = result['parts'] | {k: v for k, v in result['report'].items() if k.split('/')[0] in ('raw', 'mixing', 'distance')} # a balanced part is all but a constant at first
    parts = {k: global_mean(v.detach()) for k, v in said.items()}
    gradients = {n: p.grad for n, p in trainer.lesson.named_parameters() if p.grad is not None}
    if rank() == 0: torch.save((parts, gradients), out)
    if world() > 1: torch.distributed.barrier()
    os._exit(0)                 # a reducer outlives the group that it was made for, and its destructor may abort
"""


@pytest.mark.parametrize("seed", [0, 1, 2]) # MixUp, CutMix and their boxes come out differently
def test_two_ranks_equal_one(seed, tmp_path, environment):
    (tmp_path/"script.py").write_text(SCRIPT)
    found = []
    for ranks in (1, 2):
        out = tmp_path/f"{ranks}.pt"
        words = [*TINY, f"train.seed={seed}", "student.drop_path=0"]  # drop-path draws differ between ranks on purpose
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc_per_node={ranks}", tmp_path/"script.py", out, "basd_cifar10", *words],
                              env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out))
    (parts1, grads1), (parts2, grads2) = found
    assert (set(parts1) >= {"ce", "rsd", "rel", "attn", "spectral", "raw/rsd", "raw/attn", "mixing"}
            and set(grads1) == set(grads2))
    for k in parts1: assert_close(parts2[k], parts1[k], rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    for k in grads1: assert_close(grads2[k], grads1[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")


HOLED = """
import os, sys, torch
from basd.training.cli import main
from basd.training.trainer import Trainer
show = Trainer.show
def show_holed(self, batch, *rest):
    x, *others = show(self, batch, *rest)
    return torch.where((batch['index'] == self.fit[7])[:, None, None, None], torch.nan, x), *others
Trainer.show = show_holed
code = main(sys.argv[1:])
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


def test_a_hole_on_one_rank(tmp_path, environment):
    ("An image that only one rank sees ends the run on both; it is found on that rank, "
     "and the saved batch is that of all")
    (tmp_path/"script.py").write_text(HOLED)
    run = tmp_path/"run"
    words = [*TINY, "train.epochs=1", "train.warmup_epochs=0", "train.accumulate=2"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           tmp_path/"script.py", "train", "basd_cifar10", *words, "--run-dir", run],
                          env=environment, capture_output=True, text=True, timeout=300)
    found = load(run/"nonfinite.pt")
    assert (f"loss 'ce' was not finite at step {found['step']}, first in the images on rank {found['rank']}; "
            "the weights before it") in done.stderr, done.stderr
    shares = found["batch"]["index"].tensor_split(2)
    assert ([len(i) for i in shares] == [8, 8]
            and open_data(load_recipe("basd_cifar10", words)[""])[1][7] in shares[found["rank"]])
    assert all(v.isfinite().all() for v in load(run/"last.pt")["lesson"].values())
    repeated = replay(run)                                              # without the hole
    assert not repeated["term"] and all(math.isfinite(v) for v in repeated["parts"].values())


FRAME = [w for w in TINY if not w.startswith(("method.", "teacher.kwargs"))] + [
    "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3, num_classes: 10}", "student.drop_path=0"]
LOSSES = ["hidden", "at", "cka", "gram", "token", "correlation", "fourier", "rkd", "crd", "rsd", "scores", "heads",
          "dynamics"]
BASD = ["method.name=basd", "method.points=[0, 1]", "method.selector={dim: 24, rank: 4}"]
OWN = {"cka": "debias: true", "heads": "heads: 4", "rkd": "images: 8"}
METHODS = {
    "match": ["method.name=match", "method.points=[0, 1]", "method.logits={weight: 1.0, temperature: {kind: sample}}",
              "method.losses={" + ", ".join(f"{n}: {{{OWN.get(n, '')}}}" for n in LOSSES) + "}"],
    "distill": ["method.name=distill", "method.loss=dkd"],
    "vrm": ["method.name=distill", "method.loss=vrm", "method.virtual=true"],
    "learned maps": ["method.name=match", "method.points=[0, 1]", "method.losses={lad: {}, alp: {}}"],
    "ofa": ["method.name=ofa", "method.points=[0, 1]"], "byot": ["method.name=byot", "method.points=[0, 1]"],
    "dual_head": ["method.name=dual_head", "method.points=[0, 1]"],
    "basd_fourier": ["method.name=basd_fourier", "method.points=[0, 1]"],
    "amtml": ["method.name=amtml", "method.points=[0, 1]"], "diverse": ["method.name=diverse", "method.points=[0, 1]"],
    "basd": BASD, "uniform": [*BASD, "method.rule=uniform"], "pocl": ["method.name=pocl"],
    "sampled": [*BASD, "method.selector.max_rows=128",
                "method.losses={rsd: {max_rows: 128}, attn: {rows: 4}, spectral: {samples: 16}}",
                "method.aligner={samples: 16}"],
}
EVERY = """
import json, os, sys, torch
from basd.geometry.statistics import global_mean, world
from basd.training.lesson import processes, rank
from basd.training.recipes import load_recipe
from basd.training.trainer import Trainer
out, *words = sys.argv[1:]
build = Trainer.build_models
def build_double(self):
    build(self); self.lesson.double()
    if self.teacher is not None: self.teacher.double()
Trainer.build_models = build_double
found = {}
with processes('cpu') as device:
    for name, own in json.loads(words.pop()).items():
        trainer = Trainer(load_recipe('deit_cifar', [*words, *own])[''], f'{out}.{name}', device, bars=False)
        trainer.lesson.train()
        trainer.step = 20
        result = trainer.forward(next(iter(trainer.read(0, 0, 1, trainer.views))))
        result['loss'].backward()
        said = result['parts'] | {k: v for k, v in result['report'].items() if k.split('/')[0] in ('raw', 'mixing', 'distance')} # a balanced part is all but a constant at first
        found[name] = {k: global_mean(v.detach()) for k, v in said.items()}, {n: p.grad for n, p in trainer.lesson.named_parameters() if p.grad is not None}
    if rank() == 0: torch.save(found, out)
    if world() > 1: torch.distributed.barrier()
    os._exit(0)                 # several reducers outlive the group that they were made for, and their destructors may abort
"""


@pytest.mark.parametrize("blend", ["views.mixup=0", "views.cutmix=0"]) # CutMix alone, MixUp alone
def test_every_method_on_several_ranks(blend, tmp_path, environment, record_property):
    (tmp_path/"script.py").write_text(EVERY)
    found, several = {}, (2, 4)
    for ranks in (1, *several):
        out = tmp_path/f"{ranks}.pt"
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc_per_node={ranks}", tmp_path/"script.py", out, *FRAME, blend,
                               json.dumps(METHODS)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[ranks] = torch.load(out)
    far = lambda a, b: max((((a[k] - b[k]).abs()/b[k].abs().clamp(min=1e-2)).max().item() for k in b if b[k].numel()),
                           default=0.)
    for i, what in enumerate(("parts", "gradients")):
        record_property(what, max(far(found[ranks][name][i], found[1][name][i])
                                  for ranks in several for name in METHODS))
    record_property("methods", len(METHODS))
    for name in METHODS:
        parts1, grads1 = found[1][name]
        for ranks in several:
            parts, grads = found[ranks][name]
            assert parts.keys() == parts1.keys() and grads.keys() == grads1.keys()
            for k in parts1: assert_close(parts[k], parts1[k], rtol=1e-8, atol=1e-10,
                                          msg=lambda m, k=k: f"{name} on {ranks} ranks, {k}: {m}")
            for k in grads1: assert_close(grads[k], grads1[k], rtol=1e-6, atol=1e-9,
                                          msg=lambda m, k=k: f"{name} on {ranks} ranks, {k}: {m}")
