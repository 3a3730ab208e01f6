"""A run that was trained by the command leaves as a folder that timm opens, and as ONNX; timm's validation gives its top-1"""
import json
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from basd.cli import main
from basd.core import registry
from basd.core.registry import trusting
from basd.data.sources import ImageDataset, open_source
from basd.data.views import eval_transform
from basd.models.students import create_student, load_student, save_student
from basd.runs.export import export_run, middle_square
from basd.runs.run_directory import saved_weights

WORDS = ["train", "quickstart", "stages.teacher=null", "stages.basd=null", "data.labeled=null", "data.train_size=128",
         "data.batch_size=32", "train.epochs=1", "train.warmup_epochs=0", "student.img_size=8", "student.patch_size=2",
         "student.depth=2", "student.width=24", "student.heads=2", "train.ema=.9"]
MODULE = '''
from torch import nn

def cnn(num_classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"run"
    assert main([*WORDS, "--run-dir", str(folder)]) == 0
    return next(p.parent for p in sorted(folder.rglob("student.json")))


@pytest.mark.parametrize("weights", ["exported", "ema"])
def test_timm_validates_as_the_run_did(weights, run, tmp_path, capsys):
    "Digits have the student's size, so nothing is resized: the top-1 of the chosen weights to the last digit"
    assert main(["export", str(run), "--to", str(tmp_path/"out"), "--weights", weights]) == 0
    assert "config.json" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path/'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images, result = ImageDataset(open_source("digits", "test")), json.loads((run/"result.json").read_text())
    name = result["exported"] if weights == "exported" else weights
    for k, v in saved_weights(run)[name].items(): assert torch.equal(model.state_dict()[k], v), k
    x = torch.stack([transform(Image.fromarray(images[i][0].permute(1, 2, 0).numpy())) for i in range(len(images))])
    with torch.no_grad(): right = (model(x).argmax(1) == images.labels).float().mean().item()
    assert round(100*right, 4) == round(result["test"][name]["top1"], 4)
    card = (tmp_path/"out"/"README.md").read_text()
    assert f"{100*right:.2f} % of {len(images)} images ({name} weights)" in card and "license:" not in card


def shown_code(card, language): return re.search(f"```{language}\n(.*?)```", card, re.S)[1]


def assert_same_view(logits, student, x, size):
    "Pillow and torch round to levels of 255 that may be one apart; a view that is three pixels off is ten times as far away"
    with torch.no_grad(): ours, off = (student.eval()(eval_transform(size)(v)[None]).logits for v in (x, x.roll(3, 2)))
    assert (logits - ours).abs().max() < .1*(off - ours).abs().max(), ((logits - ours).abs().max(), (off - ours).abs().max())


def test_the_card_is_true(run, tmp_path, monkeypatch, capsys):
    "What the run recorded is on the card, its code gives the student's logits for an oblong image, its recipe trains"
    report = dict(weights="best", knn=dict(top1=12.5, n=359, train_n=128))
    (run/"report.json").write_text(json.dumps(report))
    try: export_run(run, tmp_path/"out")
    finally: (run/"report.json").unlink()
    card, made = (tmp_path/"out"/"README.md").read_text(), json.loads((run/"environment.json").read_text())
    for words in ("| teacher | none |", "`digits`: 128 training, 216 validation, 359 test", "1 epochs, 4 steps of 32 images",
                  "| k-NN | 12.50 % of 359 images among 128 |", "10 classes, in the order of the logits: `0`, `1`", made["git"]["commit"],
                  f"basd {made['versions']['basd']}", "images `digits`: not recorded"): assert words in card, words
    monkeypatch.chdir(tmp_path)
    image = Image.effect_mandelbrot((24, 17), (-2, -1, 1, 1), 60).convert("RGB")
    image.save("image.png"); monkeypatch.setattr(Image, "open", lambda path, was=Image.open: was("image.png"))
    exec(shown_code(card, "python"), seen := {})
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert_same_view(seen["logits"], load_student(run), x, 8)
    assert "basd train recipe.yaml" in shown_code(card, "sh")
    assert main(["train", "out/recipe.yaml", "--print"]) == 0 and "digits" in capsys.readouterr().out


def test_middle_square():
    image = Image.new("RGB", (9, 4)); image.putpixel((2, 0), (255, 0, 0)); image.putpixel((5, 3), (0, 255, 0))
    cut = middle_square(image)
    assert cut.size == (4, 4) and cut.getpixel((0, 0)) == (255, 0, 0) and cut.getpixel((3, 3)) == (0, 255, 0)
    assert middle_square(image.rotate(90, expand=True)).size == (4, 4)


@pytest.mark.parametrize("words, sentence", [(["nowhere"], "is not a run directory"), (["{run}", "--to", "{run}"], "not an empty folder"),
                                             (["{run}", "--push", "me/x", "--to", "{tmp}/o"], "needs a token"),
                                             (["{run}", "--weights", "emma"], "did you mean 'ema'")])
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


def test_a_student_of_ones_own(tmp_path, monkeypatch, capsys):
    "timm has no name for it: ONNX with a card whose code runs without it, and only where its code is trusted"
    for package in ("onnx", "onnxruntime", "onnxscript"): pytest.importorskip(package)
    (tmp_path/"own_export.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(registry, "_admitted", set())
    with trusting(["own_export:cnn"]): student = create_student("own_export:cnn", 3, 16, width=12, layers=[], attention=False)
    student.label_names = ["red", "green", "blue"]
    (tmp_path/"run").mkdir(); save_student(student, "run"); (tmp_path/"run/recipe.yaml").write_text("data: {source: digits}\n")
    monkeypatch.setattr(registry, "_admitted", set())
    assert main(["export", "run", "--to", "out"]) == 2 and "would import code" in capsys.readouterr().err
    assert main(["export", "run", "--to", "out", "--trust"]) == 0
    output, reason = capsys.readouterr().out, "timm has no model cnn of own_export; decorate the function with timm.models.register_model"
    assert "ONNX opset" in output and reason in output
    files, config = sorted(p.name for p in (tmp_path/"out").iterdir()), json.loads((tmp_path/"out/config.json").read_text())
    assert files == ["README.md", "config.json", "model.onnx", "model.safetensors", "recipe.yaml"]
    assert (config["architecture"], config["label_names"], config["format"]) == ("own_export:cnn", student.label_names, "onnx")
    assert config["onnx"]["difference"] < 1e-4
    card = (tmp_path/"out/README.md").read_text()
    assert "import timm" not in card and reason in card and "library_name: onnx" in card
    image = Image.effect_mandelbrot((24, 17), (-2, -1, 1, 1), 60).convert("RGB")
    image.save("image.png"); monkeypatch.setattr(Image, "open", lambda path, was=Image.open: was("image.png"))
    exec(shown_code(card, "python"), seen := {})
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert_same_view(torch.from_numpy(seen["logits"]), student, x, 16)


def test_the_folder_is_a_beginning_for_timm(run, tmp_path):
    "Other classes, no head and one channel, as of a folder that timm wrote; and a run that begins there is exported in its turn"
    export_run(run, tmp_path/"out")
    place = f"local-dir:{tmp_path/'out'}"
    weights = timm.create_model(place, pretrained=True).state_dict()
    for words in (dict(num_classes=7), dict(num_classes=0), dict(in_chans=1)):
        model = timm.create_model(place, pretrained=True, **words)
        assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"]), words
    again = create_student(place, num_classes=10, pretrained=True, img_size=8)
    save_student(again, tmp_path)
    for k, v in load_student(tmp_path).model.state_dict().items(): assert torch.equal(v, weights[k]), k
    with pytest.raises(ValueError, match="do not fit the model as built with .*embed_dim=36"):
        create_student(place, num_classes=10, pretrained=True, width=36, heads=2)
