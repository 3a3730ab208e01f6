"""A device without float64 (Apple's GPU), played by the CPU: in training steps, validation and the reading of layers no float64 number
arises but in tables, which are made on the CPU and moved"""
import traceback
from collections import Counter

import pytest
import torch
from steps import changes_of, take_steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from basd.analysis.attention_distance import attention_distance
from basd.analysis.cka_maps import cka_map
from basd.analysis.curvature import hessian_spectrum, loss_landscape
from basd.analysis.spectra import spectra
from basd.core import numerics
from basd.data.sources import ImageDataset, open_source
from basd.losses.token_relations import sample_token_pairs
from basd.models.students import create_student
from basd.runs.inference import validate

ON_THE_CPU = {"_interpolation", "_overlap", "_stencil", "_built", "_ring", "_rings", "_codes",        # tables
              "_open_digits", "stratified_split", "_shuffled"}                 # images, their split, the order of a layer's tokens


class Float64(TorchDispatchMode):
    "Where operations give float64"
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                names = [s for s in traceback.extract_stack() if "/basd/" in s.filename]
                if not ON_THE_CPU & {s.name for s in names}: self.seen[f"{names[-1].filename}:{names[-1].lineno} {f}" if names else str(f)] += 1
        return out


@pytest.fixture
def no_float64(monkeypatch):
    monkeypatch.setattr(numerics, "_without_float64", {"cpu"})
    with Float64() as mode: yield mode
    assert not mode.seen, mode.seen


@pytest.mark.parametrize("name", ["basd_cifar10", "fourier", "rkd", "tinybert"])
def test_steps(name, no_float64, tmp_path): assert take_steps(name, tmp_path)


def test_validation(no_float64):
    student = create_student("deit_tiny_patch16_224", 10, 16, 4, depth=2, width=24, heads=3)
    digits = ImageDataset(open_source("digits", "test"))
    with torch.no_grad(): assert validate(student, digits, list(range(40)), 16, "cpu")["n"] == 40


class Measured(Float64):
    "The same where measurements go on in float64 on the CPU: only `to_float64` leads there, and nothing comes back or is mixed"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        given = {x.dtype for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor) and x.dim() and x.is_floating_point()}
        out = f(*args, **(kwargs or {}))
        made = {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dim()}
        if torch.float64 in made and given and given != {torch.float64} or len(given) > 1:
            names = [s for s in traceback.extract_stack() if "/basd/" in s.filename]
            # the jitter of `condition_covariance` is made of a bool, beside the matrix
            if names and names[-1].name not in ("to_float64", "condition_covariance", *ON_THE_CPU): self.seen[f"{names[-1].filename}:{names[-1].lineno} {f}"] += 1
        return out


def test_analysis(monkeypatch):
    "All that `basd analyze` measures, and the effective rank of a logged step"
    monkeypatch.setattr(numerics, "_without_float64", {"cpu"})
    student = create_student("deit_tiny_patch16_224", 10, 16, 4, depth=2, width=24, heads=3)
    digits = ImageDataset(open_source("digits", "test"))
    x, y = digits.pixels[:16], digits.labels[:16]
    x = torch.nn.functional.interpolate(x.float(), 16).byte()
    with Measured() as mode:
        attention_distance(student, [x]), cka_map(student, student, [x[:8], x[8:]]), spectra(student, [x])
        hessian_spectrum(student, [(x, y)], k=2, steps=3, probes=2), loss_landscape(student, [(x, y)], points=3, steps=3)
        numerics.effective_rank(torch.randn(20, 8))
    assert not mode.seen, mode.seen


def test_it_is_noticed(monkeypatch):
    with Float64() as mode: torch.zeros(2).double() + 1
    assert mode.seen


@pytest.mark.parametrize("n", [2, 3, 65, 197, 5001])
def test_pairs_are_the_same_from_float32(n, monkeypatch):
    "The inverse of the triangular numbers is rounded in float32 and then mended"
    draw = lambda: sample_token_pairs(n, 10**5, torch.Generator().manual_seed(0))
    exact = draw()
    monkeypatch.setattr(numerics, "_without_float64", {"cpu"})
    (i, j), pairs = draw(), min(10**5, n*(n - 1)//2)
    assert all(map(torch.equal, exact, (i, j))) and (j >= 0).all() and (j < i).all() and len((i*n + j).unique()) == pairs
