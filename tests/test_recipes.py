"""Every packaged recipe trains, and its runs can be evaluated and compared. On digits and small MNIST files made here;
on real CIFAR-10 where BASD_CIFAR10 names a folder in the Hugging Face parquet layout."""
import gzip
import json
import os
import struct

import pytest
import torch
import yaml
from steps import changes_of, keep, take_steps, trained

from basd.cli import main, train
from basd.runs.recipe_files import RECIPES_DIR, frame_names, merge_override, read_recipe, recipe_names
from basd.runs.recipes import load_recipe

CIFAR10 = os.environ.get("BASD_CIFAR10")
SHORT = ["data.batch_size=32", "data.workers=0", "data.train_size=96", "data.val_size=64", "train.epochs=1",
         "train.warmup_epochs=0", "train.log_every=1"]
SOURCE = [f"data.source=hfds/{CIFAR10}" if CIFAR10 else "data.source=digits", "data.download=false"]
DEIT = ["student.depth=2", "student.width=48", "student.heads=3", "student.patch_size=8", "student.drop_path=0"]
RESNET = ["student.kwargs={channels: [8, 8, 16, 16]}"]


def test_names_are_found_by_folder_or_alone():
    "A recipe's name is unique over all folders, each folder's frame is only extended, and no recipe deletes what it inherits but a teacher"
    files = sorted(RECIPES_DIR.rglob("*.yaml"))
    frames = [p for p in files if p.parent.name == "frames"]
    assert recipe_names() == sorted(p.stem for p in files if p.stem != "_frame" and p not in frames) and len({*recipe_names()}) == len(recipe_names())
    assert frame_names() == sorted(p.stem for p in frames if p.stem[0] != "_")
    assert sorted(p.name for p in RECIPES_DIR.glob("*.yaml")) == ["quickstart.yaml", "unlabeled.yaml"]
    for p in files:
        if p in frames: continue
        folder, written = p.parent.relative_to(RECIPES_DIR).as_posix(), yaml.safe_load(p.read_text())
        assert read_recipe(f"{folder}/{p.stem}".removeprefix("./")) == merge_override(str(p))[0]
        if p.stem != "_frame": assert read_recipe(p.stem) == merge_override(str(p))[0]
        assert {k for k, v in (written.get("stages") or {}).items() if v is None} <= {"teacher"}, p


def result(run): return json.loads((run/"result.json").read_text())


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    "A trained CNN, used as the teacher"
    run = tmp_path_factory.mktemp("cnn")/"run"
    train("resnet18_cifar", *SHORT, *SOURCE, *RESNET, run_dir=str(run), bars=False)
    return run


def test_judged_and_compared(cnn, tmp_path, capsys):
    "Evaluate and analyze, on a run's own images and on others"
    run = tmp_path/"taught"
    train("deit_cifar_distill", *SHORT, *SOURCE, *DEIT, f"teacher.run={cnn}", run_dir=str(run), bars=False)
    assert main(["evaluate", str(run), "--corrupted", "16"]) == 0
    report = json.loads((run/"report.json").read_text())
    assert (abs(report["accuracy"]["top1"] - result(run)["test"]["best"]["top1"]) < 1e-4
            and "top1" in report["agreement"])
    assert (run/"report.png").stat().st_size > 20_000
    assert main(["evaluate", str(run), "--on", "digits", "--corrupted", "0", "--weights", "last"]) == 0
    assert (run/"report-digits.json").is_file()
    out = tmp_path/"analysis"
    assert main(["analyze", str(run), str(cnn), "--metrics", "attention,cka,spectrum", "--output-dir", str(out),
                 "--images", "32"]) == 0
    assert {p.name for p in out.iterdir()} == {"analysis.json", "attention.png", "cka.png", "spectrum.png"}
    capsys.readouterr()
    assert main(["analyze", str(cnn), "--metrics", "attention", "--output-dir", str(out)]) == 2
    assert "none of the 4 tapped layers" in capsys.readouterr().err
    assert main(["analyze", str(run), "--metrics", "sharpness", "--output-dir", str(out)]) == 2
    assert "metric 'sharpness' does not exist" in capsys.readouterr().err
    (run/"last.pt").unlink()
    assert main(["analyze", str(run), "--metrics", "attention", "--output-dir", str(out)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trainings(tmp_path_factory): return tmp_path_factory.mktemp("trainings")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_takes_steps(name, trainings):
    "Three steps of each stage, of which none is skipped and all losses are finite; a stage reads what an earlier one wrote"
    words = []
    if load_recipe(name).get("", load_recipe("ce")["ce"]).teacher.run == "runs/resnet18_cifar":     # the one that a user trains first
        r = load_recipe("resnet18_cifar", changes_of("resnet18_cifar"))[""]
        keep(trained(r, trainings), r, trainings/"cnn")
        words = [f"teacher.run={trainings/'cnn'}"]
    assert [*take_steps(name, trainings, *words)] == [*load_recipe(name)]


def idx(path, array):
    "Write an array in MNIST's own format"
    header = struct.pack(">BBBB", 0, 0, 8, array.dim()) + b"".join(struct.pack(">I", n) for n in array.shape)
    with gzip.open(path, "wb") as f: f.write(header + array.to(torch.uint8).numpy().tobytes())


def test_mnist(tmp_path):
    "The MNIST recipe on files in MNIST's format"
    raw = tmp_path/"MNIST"/"raw"
    raw.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 200), ("t10k", 50)):
        labels = torch.arange(n) % 10
        images = (torch.rand(n, 28, 28, generator=g)*60).int()
        for i, c in enumerate(labels.tolist()): images[i, 2*c:2*c + 6, 4:24] = 200
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            idx(raw/f"{split}-{kind}.gz", array)
            with gzip.open(raw/f"{split}-{kind}.gz") as f: (raw/f"{split}-{kind}").write_bytes(f.read())
    train("mnist_improved", *SHORT, f"data.root={tmp_path}", "data.download=false", "data.val_size=40",
          "train.epochs=3", run_dir=str(tmp_path/"run"), bars=False)
    assert result(tmp_path/"run")["test"]["best"]["n"] == 50


# changes of a recipe in former names of keys, losses and values → the name that the error gives
FORMER = {
    "quickstart": {"method.points=[0]": "student_layers", "method.layers=[0]": "teacher_layers",
        "method.rule=uniform": "layer_map", "method.weight=1": "distill_weight", "method.align=1": "align_weight",
        "method.starts={}": "ramp_starts", "method.aligner.codes=false": "pos_embed",
        "method.selector={name: nearest, memory: 0.5}": "ema_decay",
        "method.selector={name: nearest, settle: 3}": "warmup_steps", "method.balance.settle=3": "warmup_steps",
        "method.balance.form=reference": "uwso_ema", "method.losses.token={}": "token_cosine",
        "data.memory=false": "in_memory", "data.on_bad=skip": "on_error", "views.geometry=shared": "crop",
        "views.crop=fixed": "center", "views.photometry=none": "color", "views.erase=0": "random_erasing",
        "views.blend_prob=1": "mix_prob", "views.teacher_sees_blend=true": "mix_teacher_input",
        "views.smoothing=0": "label_smoothing", "teacher.others=[]": "extra_teachers",
        "train.momenta_apart=0.05": "dot_delta", "train.clip=1": "clip_grad",
        "train.accumulate=2": "grad_accum_steps", "train.gradient_shares=false": "log_gradients",
        "train.skip_nonfinite=1": "max_nonfinite_steps", "train.save_every=1": "checkpoint_every",
        "train.headline=last": "export"},
    "pkd": {"method.labels=1": "ce_weight", "method.start=0.1": "kd_start", "method.rise=0.1": "kd_warmup",
        "method.start_from_teacher=true": "init_from_teacher", "method.losses={hidden: {}}": "hidden_states",
        "method.losses.hidden_states.normalise=unit": "normalize", "method.logits.virtual=true": "two_views"},
    "kd": {"method.head=distillation": "dist", "method.virtual=true": "two_views"},}


@pytest.mark.parametrize("recipe, change, new", [(r, w, n) for r, d in FORMER.items() for w, n in d.items()])
def test_a_former_name_is_answered_with_todays(recipe, change, new):
    with pytest.raises(ValueError, match=rf"\(it is now '[\w.]*{new}'\)"): load_recipe(recipe, [change])


@pytest.mark.parametrize("former, new", dict(hinton="kd", cosine="token_cosine", patient="patient_kd", map_uniform="basd_map_uniform",
                                             select_ramp="basd_select_ramp").items())
def test_a_former_recipe_is_answered_with_todays(former, new):
    with pytest.raises(ValueError, match=f"'{new}'"): load_recipe(former)


def test_a_loss_is_added_by_an_override():
    losses = load_recipe("quickstart", ["method.losses.cka={rows: image}", "method.losses.rsd=null"])["basd"].method.options.losses
    assert losses.cka.rows == "image" and losses.rsd is None and losses.rel is not None
