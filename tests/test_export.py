"""A run that was trained by the command leaves as a folder that timm opens, and as ONNX; timm's validation gives its top-1"""
import json

import pytest
import timm
import torch
from PIL import Image

from basd.cli import main
from basd.data.sources import ImageDataset, open_source
from basd.models.students import create_student, save_student
from basd.runs.export import export_run

WORDS = ["train", "quickstart", "stages.teacher=null", "stages.basd=null", "data.labeled=null", "data.train_size=128",
         "data.batch_size=32", "train.epochs=1", "train.warmup_epochs=0", "student.img_size=8", "student.patch_size=2",
         "student.depth=2", "student.width=24", "student.heads=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"run"
    assert main([*WORDS, "--run-dir", str(folder)]) == 0
    return next(p.parent for p in sorted(folder.rglob("student.json")))


def test_timm_validates_as_the_run_did(run, tmp_path, capsys):
    "Digits have the student's size, so nothing is resized: the run's top-1 to the last digit"
    assert main(["export", str(run), "--to", str(tmp_path/"out")]) == 0
    assert "config.json" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path/'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images, result = ImageDataset(open_source("digits", "test")), json.loads((run/"result.json").read_text())
    x = torch.stack([transform(Image.fromarray(images[i][0].permute(1, 2, 0).numpy())) for i in range(len(images))])
    with torch.no_grad(): right = (model(x).argmax(1) == images.labels).float().mean().item()
    assert round(100*right, 4) == round(result["test"][result["exported"]]["top1"], 4)
    card = (tmp_path/"out"/"README.md").read_text()
    assert f"{100*right:.2f} % of {len(images)} images" in card and "license:" not in card


@pytest.mark.parametrize("words, sentence", [(["nowhere"], "is not a run directory"), (["{run}", "--to", "{run}"], "not an empty folder"),
                                             (["{run}", "--push", "me/x", "--to", "{tmp}/o"], "needs a token")])
def test_what_cannot_be_exported(words, sentence, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["export", *(w.format(run=run, tmp=tmp_path) for w in words)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1, err


def test_a_link_is_not_written_through(run, tmp_path, capsys):
    (tmp_path/"outside").mkdir(); (tmp_path/"out").symlink_to(tmp_path/"outside")
    assert main(["export", str(run), "--to", str(tmp_path/"out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err and not any((tmp_path/"outside").iterdir())


@pytest.mark.parametrize("student", [dict(img_size=32, patch_size=8, depth=2, width=24, heads=2), dict(model="resnet18")])
def test_onnx_has_the_same_logits(student, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    save_student(create_student(num_classes=3, layers=[], attention=False, **student), tmp_path)
    assert export_run(tmp_path, tmp_path/"out", onnx=True)["difference"] < 1e-4
