"""Numbers of images that neither a batch nor the ranks divide: training leaves the rest out, evaluation counts every
image once"""
import json

import pytest
import torch
from conftest import TINY
from forks import on_ranks
from torch.testing import assert_close

from basd.data.sources import ImageDataset, open_source
from basd.models.students import create_student
from basd.cli import train
from basd.runs.inference import validate, predict_logits
from basd.runs.metrics import read_metrics

SIZES = (1, 2, 3, 7, 50)


def scene():
    torch.manual_seed(0)
    return ImageDataset(open_source("digits", "test")), create_student(
        num_classes=10, layers=[], attention=False, model="deit_tiny_patch16_224", img_size=16, patch_size=4, depth=2,
        width=32, heads=2)


@pytest.fixture(scope="module")
def by_hand():
    "Accuracy and loss from all logits at once"
    images, student = scene()
    def one(n):
        where = list(range(5, 5 + n))
        z, y = predict_logits(student, images, where, 16, "cpu"), torch.as_tensor(images.labels)[where]
        best = z.topk(5).indices == y[:, None]
        return dict(top1=100*best[:, 0].double().mean().item(), top5=100*best.any(1).double().mean().item(),
                    loss=torch.nn.functional.cross_entropy(z.double(), y).item(), n=n)
    return {n: one(n) for n in SIZES}


@pytest.mark.parametrize("batch", (1, 4, 256))
def test_evaluation_by_batches(batch, by_hand):
    images, student = scene()
    for n in SIZES:
        assert_close(validate(student, images, list(range(5, 5 + n)), 16, "cpu", batch=batch), by_hand[n],
                     rtol=1e-5, atol=1e-5)


def all_sizes():
    images, student = scene()
    return {n: validate(student, images, list(range(5, 5 + n)), 16, "cpu", batch=4) for n in SIZES}


@pytest.mark.parametrize("ranks", (2, 3))
def test_evaluation_by_ranks(ranks, by_hand, tmp_path):
    "Accuracy and loss are exact where ranks have one image more than others, or none"
    found = on_ranks(all_sizes, ranks=ranks, folder=tmp_path)
    for n in SIZES: assert_close(found[n], by_hand[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, steps", [(70, 2), (63, 1), (32, 1)])
def test_last_batch(size, steps, tmp_path):
    "Every step has a full batch; images left over in one epoch come in another"
    train("basd_cifar10", *TINY, f"data.train_size={size}", "data.val_size=33", "train.epochs=2", "train.log_every=1",
          run_dir=str(tmp_path/"run"), bars=False)
    rows = [r for r in read_metrics(tmp_path/"run") if r["kind"] == "step"]
    assert [r["step"] for r in rows] == list(range(1, 2*steps + 1)) and not any(r["skipped"] for r in rows)
    test = json.loads((tmp_path/"run"/"result.json").read_text())["test"]["best"]
    assert test["n"] == len(open_source("digits", "test"))
