"Two ranks with half of the batch each are one rank with the whole of it: same loss, same gradients"
import copy
import math
import os
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import TINY
from forks import end, on_ranks, start
from torch.testing import assert_close

from basd.geometry.alignment import InterpolationAligner, target_statistics
from basd.core.features import Features, AttentionMap
from basd.geometry.frequency_selector import FrequencySelector
from basd.geometry.grassmann import orthonormal_scores, mean_squared_cca, whitened_scores, principal_subspace
from basd.geometry.projections import reconstruction_loss
from basd.geometry.selector import GrassmannSelector, sample_positions
from basd.core.distributed import all_reduce_mean, rank, world_size
from basd.core.numerics import center, covariance, effective_rank
from basd.core.sampling import sample_images, step_generator
from basd.losses.balance import LossBalancer
from basd.losses.cka import CKALoss
from basd.losses.gram import BatchSimilarityLoss
from basd.losses.instance_relations import CRDLoss, RKDLoss, VRMLoss
from basd.losses.rsd import RSDLoss
from basd.losses.spectral import SpectralLoss
from basd.runs.run_directory import load_checkpoint
from basd.cli import main
from basd.core.distributed import gather_objects
from basd.runs.builders import build_datasets
from basd.runs.recipes import load_recipe
from basd.training import build
from basd.training.build import TrainingData, build_trainer, replay


def in_double(recipe, run):
    "A trainer of float64, in training, with all ramps up, so that every term counts"
    def in_float64(*args, make=build.build_task): return make(*args).double()
    with patch.object(build, "build_task", in_float64): trainer = build_trainer(recipe, run, "cpu", bars=False)
    trainer.task.train()
    trainer.step = 20
    return trainer


def parts_and_gradients(trainer, batch):
    "Of one forward and backward pass; raw losses beside balanced ones, as those are all but constants at first"
    result = trainer.forward(batch)
    result["loss"].backward()
    logged = result["losses"] | {k: v for k, v in result["metrics"].items()
                              if k.split("/")[0] in ("loss_unweighted", "selector", "leap")}
    return ({k: all_reduce_mean(v.detach()) for k, v in logged.items()},
            {n: p.grad for n, p in trainer.task.named_parameters() if p.grad is not None})


def one_method(words, run):
    trainer = in_double(load_recipe("basd_cifar10", words)[""], run)
    return parts_and_gradients(trainer, next(iter(trainer.data.read(0, 0, 1))))


@pytest.mark.parametrize("seed", [0, 1, 2]) # MixUp, CutMix and their boxes come out differently
def test_two_ranks_equal_one(seed, tmp_path):
    words = [*TINY, f"train.seed={seed}", "student.drop_path=0"]  # drop-path draws differ between ranks on purpose
    (parts1, grads1), (parts2, grads2) = (
        on_ranks(one_method, words, tmp_path/f"run_{ranks}", ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert (set(parts1) >= {"ce", "rsd", "rel", "attn", "spectral", "loss_unweighted/rsd", "loss_unweighted/attn", "selector/weights"}
            and set(grads1) == set(grads2))
    for k in parts1: assert_close(parts2[k], parts1[k], rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    for k in grads1: assert_close(grads2[k], grads1[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")


def main_with_a_hole(words):
    given = TrainingData.given
    def holed(self, batch):
        x, *others = given(self, batch)
        return torch.where((batch["index"] == self.fit[7])[:, None, None, None], torch.nan, x/255), *others
    TrainingData.given = holed
    code = main(words)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)


def test_a_hole_on_one_rank(tmp_path):
    ("An image that only one rank sees ends the run on both; it is found on that rank, "
     "and the saved batch is that of all")
    run, out = tmp_path/"run", tmp_path/"out.txt"
    words = [*TINY, "train.epochs=1", "train.warmup_epochs=0", "train.grad_accum_steps=2"]
    status = end(start(main_with_a_hole, ["train", "basd_cifar10", *words, "--run-dir", str(run)], out=out, ranks=2))
    output = out.read_text()
    assert status == [2, 2], output
    found = load_checkpoint(run/"nonfinite.pt")
    assert (f"loss 'ce' was not finite at step {found['step']}, first in the images on rank {found['rank']}; "
            "the weights before it") in output, output
    shares = found["batch"]["index"].tensor_split(2)
    assert ([len(i) for i in shares] == [8, 8]
            and build_datasets(load_recipe("basd_cifar10", words)[""])[1][7] in shares[found["rank"]])
    assert all(v.isfinite().all() for v in load_checkpoint(run/"last.pt")["task"].values())
    repeated = replay(run)                                              # without the hole
    assert not repeated["term"] and all(math.isfinite(v) for v in repeated["losses"].values())


def pieces(x, y, b):
    ("All pieces computed from this rank's student tokens (b, 9, 12) and teacher tokens (b, 9, 10): name → its modules, and "
     "either a statistic of all ranks, or a share of a mean over ranks")
    D, E, n = x.shape[-1], y.shape[-1], torch.tensor(200.)
    rows_x, rows_y = x.flatten(0, 1), y.flatten(0, 1)
    made = lambda cls, *words, **more: (torch.manual_seed(0), cls(*words, **more).double())[1]
    def whitened(z, k=3):
        z = center(z)
        return whitened_scores(z, *principal_subspace(covariance(z), k))[None]
    along = lambda z, k=3: orthonormal_scores(center(z), torch.eye(z.shape[-1], k, dtype=z.dtype))[None]
    interp = made(InterpolationAligner, 9, E, 4)
    selectors = dict(eigh={}, tracked=dict(solver="tracking"), turned=dict(space="channel", procrustes=True), channel=dict(space="channel"))
    selectors = {k: made(GrassmannSelector, [D], [E, E], rank=3, dim=8, **v) for k, v in selectors.items()}
    frequency, balances = made(FrequencySelector, [D], [E, E], bins=2), {f: LossBalancer(["a", "b"], form=f) for f in ("uwso_ema", "uwso", "uwso_original")}
    mixed = lambda s: (m := s([x], [y, y.square()], *([[(3, 3)], [(3, 3)]*2] if s is frequency else []))).weights.sum(0)*n + m.regularizer
    rsd = {f"{norm} {center} {pooled}": made(RSDLoss, [D], [E], norm=norm, center=center, pooled=pooled)
           for norm in ("layer", "batch") for center in (True, False) for pooled in (True, False)}
    spectral = {f"{center}": SpectralLoss("batch", center=center) for center in (True, False)}
    cka = {f"{rows} {debias}": CKALoss(rows=rows, debias=debias) for rows in ("token", "image", "within") for debias in (True, False, None)
           if rows == "token" or debias is not None}
    near = {k: made(c, **o) for k, (c, o) in dict(
        rkd=(RKDLoss, dict(images=None)), correlation=(BatchSimilarityLoss, {}), centered=(BatchSimilarityLoss, dict(center=True)),
        crd=(CRDLoss, dict(widths_s=[D], widths_t=[E]))).items()}
    statistics = dict(
        centre=(None, lambda: center(rows_x).square().mean() if world_size() == 1 else all_reduce_mean(center(rows_x).square().mean())),
        covariance=(None, lambda: covariance(rows_x)), cross=(None, lambda: covariance(center(rows_x), center(rows_y))),
        effective_rank=(None, lambda: effective_rank(rows_x)), health=(None, lambda: torch.stack(list(target_statistics(x).values()))),
        scores=(None, lambda: mean_squared_cca(whitened(rows_x), whitened(rows_y))), along=(None, lambda: mean_squared_cca(along(rows_x), along(rows_y))),
        interp=(None, lambda: (interp.fit(y), interp.projection @ interp.projection.mT + interp.mean)[1]),
        tokens=(None, lambda: reconstruction_loss(rows_y, rows_x[:, :10])), mean=(None, lambda: reconstruction_loss(rows_y, rows_x[:, :10], "mean")),
        frequency=(frequency, lambda: mixed(frequency)),
        **{f"selector {k}": (s, lambda s=s: mixed(s)) for k, s in selectors.items()},
        **{f"rsd {k}": (l, lambda l=l: l([x], [y])) for k, l in rsd.items()},
        **{f"spectral {k}": (None, lambda l=l: l([x], l.spectra([y], [8]))) for k, l in spectral.items()},
        **{f"cka {k}": (None, lambda l=l: l([x], [y])) for k, l in cka.items() if not k.startswith("within")},
        **{f"balance {k}": (None, lambda l=l: l(torch.stack([x.square().mean(), y.square().mean()]), n, n)[1]["weights"]) for k, l in balances.items()})
    means = {**{k: (l, lambda l=l: l([x], [y])) for k, l in near.items()},
             "vrm": (None, lambda: VRMLoss()(x[:, 0], y[:, 0].new_zeros(b, D).index_add(1, torch.arange(E), y[:, 0]), None)),
             **{f"cka {k}": (None, lambda l=l: l([x], [y])) for k, l in cka.items() if k.startswith("within")}}
    return statistics, means


def every_piece():
    "Values and gradients of all pieces on this rank's share of 16 images, and how much is drawn on all ranks together"
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    loud = 1 + torch.arange(16.).double()[:, None, None]/8                   # ranks see images of other size and mean
    whole = draw(16, 9, 12)*loud + loud, draw(16, 9, 10)*loud + draw(16, 1, 10) + loud
    x, y = (z.chunk(world_size())[rank()] for z in whole)
    scale, values, gradients = torch.ones(12, dtype=torch.float64, requires_grad=True), {}, {}
    for average, found in zip((False, True), pieces(x*scale, y, len(x))):
        for name, (module, f) in found.items():
            value = f()
            leaves = [scale, *(p for p in (module.parameters() if module is not None else ()) if p.requires_grad)]
            grads = (torch.autograd.grad((value*torch.linspace(1, 2, value.numel()).view_as(value)).sum(), leaves, retain_graph=True,
                                         allow_unused=True, materialize_grads=True) if value.requires_grad else [])
            values[name] = all_reduce_mean(value.detach()) if average else value.detach()
            for i, d in enumerate(grads): gradients[f"{name}, {i}"] = all_reduce_mean(d)
    total = lambda places, images=len(x): torch.tensor(images*world_size()*len(places))
    drawn = torch.zeros(16).index_add(0, sample_images(len(x), 8, step_generator(0, 0)) + rank()*len(x), torch.ones(8//world_size()))
    values |= dict(images=all_reduce_mean(drawn)*world_size(), places=total(sample_positions(9, len(x), 2, 64)),
                   rsd=total(RSDLoss([12], [10], max_rows=64).draw(9, len(x))), cka=total(CKALoss(max_rows=64).draw(9, len(x))))
    return values, gradients


def test_every_piece_on_several_ranks(tmp_path):
    "Each statistic is that of all ranks, each loss averages to that of one rank, and so do the gradients"
    (values, gradients), others = on_ranks(every_piece, ranks=1, folder=tmp_path), on_ranks(every_piece, ranks=2, folder=tmp_path)
    for one, two in zip((values, gradients), others):
        assert one.keys() == two.keys()
        for k in one: assert_close(two[k], one[k], rtol=1e-7, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")


FRAME = [w for w in TINY if not w.startswith(("method.", "teacher.kwargs"))] + [
    "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3, num_classes: 10}", "student.drop_path=0"]
LOSSES = ["hidden_states", "at", "cka", "gram", "token_cosine", "batch_similarity", "fourier", "rkd", "crd", "rsd", "attention_scores", "qkv_relations",
          "trajectory"]
BASD = ["method.name=basd", "method.student_layers=[0, 1]", "method.selector={name: nearest, dim: 24, rank: 4}"]
OWN = {"cka": "debias: true", "qkv_relations": "heads: 4", "rkd": "images: 8"}
METHODS = {
    "match": ["method.name=match", "method.student_layers=[0, 1]", "method.logits={weight: 1.0, temperature: {kind: sample}}",
              "method.losses={" + ", ".join(f"{n}: {{{OWN.get(n, '')}}}" for n in LOSSES) + "}"],
    "stops early": ["method.name=match", "method.student_layers=[0, 1]", "method.layer_map=first", "method.losses={cka: {}, gram: {}}"],
    "distill": ["method.name=distill", "method.loss=dkd"],
    "vrm": ["method.name=distill", "method.loss=vrm", "method.two_views=true"],
    "leap": ["method.name=match", "method.student_layers=[0, 1]", "method.losses={leap: {ema_decay: 0.5}}"],
    "leap selector": ["method.name=basd", "method.student_layers=[0, 1]", "method.selector={name: leap, ema_decay: 0.5}"],
    "learned maps": ["method.name=match", "method.student_layers=[0, 1]", "method.losses={lad: {}, alp: {}}"],
    "ofa": ["method.name=ofa", "method.student_layers=[0, 1]"], "byot": ["method.name=byot", "method.student_layers=[0, 1]"],
    "dual_head": ["method.name=dual_head", "method.student_layers=[0, 1]"],
    "basd_fourier": ["method.name=basd_fourier", "method.student_layers=[0, 1]"],
    "amtml": ["method.name=amtml", "method.student_layers=[0, 1]"], "diverse": ["method.name=diverse", "method.student_layers=[0, 1]"],
    "default": ["method.name=basd", "method.student_layers=[0, 1]", "method.selector={rank: 4}"],
    "basd": BASD, "uniform": [*BASD, "method.selector=null", "method.layer_map=uniform"], "pocl": ["method.name=pocl"],
    "sampled": [*BASD, "method.selector.max_rows=128",
                "method.losses={rsd: {max_rows: 128}, attn: {rows: 4}, spectral: {samples: 16}}",
                "method.aligner={samples: 16}"],
}
def every_method(words, run):
    "Of each method under CutMix alone and under MixUp alone, from the same state: its losses and gradients"
    def one(name, own):
        trainer = in_double(load_recipe("deit_cifar", [*words, *own])[""], run/name)
        task, batch = trainer.task, next(iter(trainer.data.read(0, 0, 1)))
        start, mixing = copy.deepcopy(task.state_dict()), task.mixing
        assert mixing.mixup and mixing.cutmix
        def under(**none):
            task.load_state_dict(start)
            task.zero_grad()
            task.mixing = mixing._replace(**none)
            found = copy.deepcopy(parts_and_gradients(trainer, batch))
            assert (task.depth == 1) == (name == "stops early")
            return found
        return {blend: under(**none) for blend, none in BLENDS.items()}
    return {name: one(name, own) for name, own in METHODS.items()}


BLENDS = {"CutMix": dict(mixup=0.), "MixUp": dict(cutmix=0.)}


@pytest.fixture(scope="module")
def on_each_number_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {ranks: on_ranks(every_method, FRAME, folder/str(ranks), ranks=ranks, folder=folder) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("blend", BLENDS)
def test_every_method_on_several_ranks(blend, on_each_number_of_ranks, record_property):
    several = 2, 4
    found = {ranks: {name: of[blend] for name, of in every.items()} for ranks, every in on_each_number_of_ranks.items()}
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


def test_the_blends_differ(on_each_number_of_ranks):
    "Every method has other losses under CutMix than under MixUp, so the two cases above differ"
    for name, of in on_each_number_of_ranks[1].items():
        parts = [of[blend][0] for blend in BLENDS]
        assert any(not torch.equal(parts[0][k], parts[1][k]) for k in parts[0]), name


def cached_method(words, run):
    "Of one batch with recorded views in the second epoch: which views, then what `parts_and_gradients` gives"
    words = [*words, f"teacher.cache={run.parent/'cache'}-{world_size()}"]
    trainer = in_double(load_recipe("basd_cifar10", words)[""], run)
    def kept_in_double(positions, view, kept=trainer.task.cache, **upto):
        f = kept(positions, view, **upto)
        return Features([x.double() for x in f.tokens], [AttentionMap(a.map.double()) for a in f.attention],
                        f.logits if f.logits is None else f.logits.double(), f.grid_sizes)
    trainer.task.cache = kept_in_double
    batch = next(iter(trainer.data.read(1, trainer.data.per_epoch, trainer.data.per_epoch + 1)))
    return gather_objects([*zip(batch["requested"].tolist(), batch["view"].tolist())]), *parts_and_gradients(trainer, batch)


def test_two_ranks_share_recorded_views(tmp_path):
    "Two ranks build the same records in shares, sample the same views, and get the same losses and gradients"
    words = [*TINY, "student.drop_path=0", "teacher.cache_views=5"]
    (views1, parts1, grads1), (views2, parts2, grads2) = (
        on_ranks(cached_method, words, tmp_path/f"run_{ranks}", ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert sum(views2, []) == views1[0] and len({v for _, v in views1[0]}) == 5
    records = lambda ranks: {p.name: p.read_bytes() for p in (tmp_path/f"cache-{ranks}").glob("shard-*")}
    assert len(records(1)) > 1 and records(1) == records(2)
    for k in parts1: assert_close(parts2[k], parts1[k], rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")
    for k in grads1: assert_close(grads2[k], grads1[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")
