"""Bad input ends in one sentence that names the thing, exit status 2, no traceback, and nothing written over. What
looks odd but is sound simply works. No file that is read can run code, no path in a recipe leads out of the run
directory, nothing is fetched unasked."""
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct

import numpy as np
import pytest
import torch
from conftest import NO_MODEL, TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from basd.data.sources import ImageDataset, open_source
from basd.cli import main

TRAIN = ["train", "basd_cifar10", *TINY, "data.train_size=32", "data.val_size=20", "train.epochs=1",
         "train.warmup_epochs=0", "train.ema=null"]
CE = [*TRAIN, "method.name=ce"]


def tree(folder):
    "Everything below a folder: name → content"
    kind = lambda p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
    return {str(p.relative_to(folder)): kind(p) for p in sorted(folder.rglob("*"))}


def refusal(words, capsys):
    "Run the command, which must fail; returns its error sentence"
    try: status = main([str(w) for w in words])
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(err) == 1 and err[0].startswith("basd: "), (status, err)
    return err[0]


def refuses(words, sentence, capsys, folder):
    "Check that the command fails with `sentence` and leaves all files as they are"
    before = tree(folder)
    message = refusal(words, capsys)
    assert sentence in message and len(message) < 1500, message
    assert tree(folder) == before
    return message


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- recipes

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}']*9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
RECIPES = {
    "syntax": ("train: {epochs: 3", "bad.yaml is not valid YAML"),
    "tab": ("train:\n\tepochs: 3", "bad.yaml is not valid YAML"),
    "two keys in a line": ("train: epochs: 3", "bad.yaml is not valid YAML"),
    "two documents": ("train: {}\n---\ntrain: {}", "bad.yaml is not valid YAML"),
    "anchor to nothing": ("train: *nothing", "bad.yaml is not valid YAML"),
    "date of no month": ("about: 2020-13-45", "bad.yaml is not valid YAML"),
    "number of no digits": ("train: {seed: !!int ''}", "bad.yaml is not valid YAML"),
    "truth of no kind": ("train: {compile: !!bool perhaps}", "bad.yaml is not valid YAML"),
    "5000 digits": (f"train: {{seed: {'9'*5000}}}", "bad.yaml is not valid YAML"),
    "NUL in the file": (b"train: {}\x00", "bad.yaml is not valid YAML"),
    "not UTF-8": ("about: müde".encode("latin-1"), "bad.yaml is not valid YAML"),
    "UTF-16 half": (b"\xff\xfea", "bad.yaml is not valid YAML"),
    "binary": (bytes(range(256))*8, "bad.yaml is not valid YAML"),
    "python object": ("student: !!python/object:basd.nothing {}", "bad.yaml is not valid YAML"),
    "python call": ("student: !!python/object/apply:os.system ['touch marker']", "bad.yaml is not valid YAML"),
    "python module": ("student: !!python/module:antigravity ''", "bad.yaml is not valid YAML"),
    "empty": ("", "bad.yaml must hold keys and values"),
    "comment": ("# nothing", "bad.yaml must hold keys and values"),
    "list on top": ("[train, data]", "bad.yaml must hold keys and values"),
    "word on top": ("train", "bad.yaml must hold keys and values"),
    "bomb": (BOMB, "bad.yaml is too large"),
    "bomb among keywords": (BOMB.replace("i: &i", "student: {kwargs: {x: &i").rstrip() + "}}", "bad.yaml is too large"),
    "bomb of merges": ("a: &a {x: 1}\n" + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}']*9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")), "use extends"),
    "huge": ("about: " + "x"*2_000_000, "bad.yaml is too large"),
    "itself within itself": ("student: {kwargs: &k {x: *k}}", "bad.yaml is nested too deeply"),
    "deep": ("student: " + "["*5000, "bad.yaml is nested too deeply"),
    "deep enough": ("student: {kwargs: {x: " + "["*100 + "]"*100 + "}}", "bad.yaml is nested too deeply"),
    "extends itself": ("extends: bad.yaml", "bad.yaml extends itself"),
    "extends in a circle": ("extends: other.yaml", "extends itself"),
    "extends nothing": ("extends: nothing.yaml", "no recipe file at nothing.yaml"),
    "extends a misspelling": ("extends: basd_cifar01", "did you mean 'basd_cifar10'?"),
    "extends a list": ("extends: [ce]", "extends"),
    "extends up": ("extends: ../../secret", "'../../secret'"),
    "set": ("student: {kwargs: {x: !!set {a, b}}}", "student.kwargs.x"),
    "date": ("student: {kwargs: {x: 2020-01-01}}", "student.kwargs.x"),
    "bytes": ("student: {kwargs: {x: !!binary aGVsbG8=}}", "student.kwargs.x"),
    "half a character": ('data: {root: "\\ud800"}', "data.root"),
    "NUL in a path": ('data: {source: "dig\\0its"}', "data.source"),
    "key of a number": ("1: 2", "1"),
    "key of a number within": ("student: {1: 2}", "1"),
    "key of a number among keywords": ("student: {kwargs: {1: 2}}", "kwargs"),
    "key of a list": ("? [a]\n: b", "bad.yaml is not valid YAML"),
    "unknown section": ("trian: {epochs: 3}", "did you mean 'train'?"),
    "unknown key": ("train: {epoch: 3}", "did you mean 'epochs'?"),
    "unknown key of the data": ("data: {batchsize: 3}", "did you mean 'batch_size'?"),
    "unknown key of the method": ("method: {name: basd, distill_wieght: 3}", "did you mean 'distill_weight'?"),
    "unknown key of a loss": ("method: {name: basd, losses: {rsd: {kapa: 1}}}", "kapa"),
    "unknown loss": ("method: {name: basd, losses: {rds: {}}}", "method.losses: unknown loss 'rds' (did you mean 'rsd'?)"),
    "unknown key of another teacher": ("teacher: {extra_teachers: [{modle: x}]}", "did you mean 'model'?"),
    "section of a word": ("train: fast", "train='fast'"),
    "section of a list": ("data: [digits]", "data=['digits']"),
    "section of nothing": ("train:", "train=None"),
    "method of a word": ("method: ce", "method='ce'"),
    "method of a number": ("method: {name: 3}", "method.name=3"),
    "method of nothing": ("method: {name: }", "method.name=None"),
    "method of a list": ("method: {name: [ce]}", "method.name=['ce']"),
    "unknown method": ("method: {name: bsad}", "did you mean 'basd'?"),
    "method that is no method": ("method: {name: 'os:system'}", "method.name='os:system'"),
    "method in no module": ("method: {name: 'nowhere.to.be:Found'}", "method.name='nowhere.to.be:Found'"),
    "method of no name": ("method: {name: ':'}", "method.name=':'"),
    "method of dots": ("method: {name: '..:x'}", "method.name='..:x'"),
    "word for a number": ("train: {epochs: many}", "train.epochs='many'"),
    "truth for a number": ("train: {epochs: yes}", "train.epochs=True"),
    "fraction": ("train: {epochs: 1.5}", "train.epochs=1.5"),
    "zero": ("train: {epochs: 0}", "greater than or equal to 1"),
    "negative": ("student: {depth: -1}", "student.depth=-1"),
    "negative batch": ("data: {batch_size: -4}", "data.batch_size=-4"),
    "negative workers": ("data: {workers: -1}", "data.workers=-1"),
    "a million workers": ("data: {workers: 1000000}", "data.workers=1000000"),
    "huge seed": (f"train: {{seed: {10**30}}}", f"train.seed={10**30}"),
    "negative seed": ("data: {split_seed: -1}", "data.split_seed=-1"),
    "huge depth": (f"student: {{depth: {10**9}}}", f"student.depth={10**9}"),
    "huge picture": (f"student: {{img_size: {10**30}}}", f"student.img_size={10**30}"),
    "endless": ("train: {lr: .inf}", "train.lr=inf"),
    "no number": ("train: {weight_decay: .nan}", "train.weight_decay=nan"),
    "no number in a view": ("views: {crop_scale: [.nan, 1]}", "views.crop_scale"),
    "no number in a method": ("method: {name: basd, distill_weight: .nan}", "method.distill_weight=nan"),
    "no number in a loss": ("method: {name: basd, losses: {rsd: {kappa: .inf}}}", "method.losses.rsd.kappa=inf"),
    "long warm-up": ("train: {warmup_epochs: 1e308}", "train.warmup_epochs='1e308'"),
    "share of two": ("views: {flip: 2}", "views.flip=2"),
    "crop of three": ("views: {crop_scale: [1, 2, 3]}", "views.crop_scale"),
    "crop of nothing": ("views: {crop_scale: [0, 0]}", "crop_scale"),
    "unknown choice": ("views: {crop: free}", "'shared', 'student_only' or 'center'"),
    "unknown optimizer": ("train: {optimizer: lion}", "train.optimizer='lion'"),
    "path of a number": ("data: {root: 3}", "data.root=3"),
    "keyword given twice": ("student: {kwargs: {num_classes: 3}}", "student.kwargs.num_classes"),
    "keyword of the section": ("teacher: {kwargs: {pretrained: true}}", "write teacher.pretrained"),
    "weights by the back door": ("student: {kwargs: {checkpoint_path: evil.pth}}", "checkpoint_path"),
    "download by the back door": (
        "teacher: {model: resnet18, untrained: true, kwargs: {pretrained_cfg_overlay: {url: 'http://example.org/x.pth'}}}\n"
        "method: {name: distill}", "pretrained_cfg_overlay"),
    "stages of a list": ("stages: [teacher]", "stages"),
    "stages of a word": ("stages: {teacher: 3}", "stages"),
    "stage of a number": ("stages: {1: {}}", "stage 1"),
    "stage that climbs": ("stages: {../../out: {}}", "stage '../../out'"),
    "stage that is absolute": ("stages: {/tmp/out: {}}", "stage '/tmp/out'"),
    "stage within a stage": ("stages: {a/b: {}}", "stage 'a/b'"),
    "stage of dots": ("stages: {..: {}}", "stage '..'"),
    "stage without a name": ("stages: {'': {}}", "stage ''"),
    "unknown key of a stage": ("stages: {one: {train: {epoch: 3}}}", "did you mean 'epochs'?"),
    "taught by nothing": ("stages: {one: {teacher: {run: 'stage:zero'}}}",
                          "'stage:zero' in stage 'one' must name an earlier stage"),
    "taught by itself": ("stages: {one: {teacher: {run: 'stage:one'}}}",
                         "'stage:one' in stage 'one' must name an earlier stage"),
    "taught by the next": ("stages: {one: {teacher: {run: 'stage:two'}}, two: {}}", "allowed: none"),
    "goes on with nothing": ("stages: {one: {}, two: {student: {checkpoint: 'stage:on'}}}", "allowed: one"),
    "second stage misspelt": ("stages: {one: {}, two: {student: {model: resnet81}}}", "'resnet81'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, here, capsys):
    text, sentence = RECIPES[name]
    (here/"bad.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    (here/"other.yaml").write_text("extends: bad.yaml")
    refuses(["train", "bad.yaml", "--run-dir", "run"], sentence, capsys, here)


# ------------------------------------------------------------------------------------------------------------ arguments

ARGUMENTS = [
    ([], "COMMAND"), (["frobnicate"], "frobnicate"), (["--frobnicate"], "COMMAND"),
    (["train"], "recipe"), (["evaluate"], "run_dir"), (["analyze"], "run_dir"), (["compare"], "recipe"),
    (["train", "quickstart", "--frobnicate"], "--frobnicate"), (["evaluate", "run", "--frobnicate"], "--frobnicate"),
    (["analyze", "run", "--frobnicate"], "--frobnicate"), (["compare", "ce", "--frobnicate"], "--frobnicate"),
    (["bench", "--frobnicate"], "--frobnicate"), (["recipes", "--frobnicate"], "--frobnicate"),
    (["train", "quickstart", "--run-dir"], "--run-dir"), (["evaluate", "run", "--weights"], "--weights"),
    (["analyze", "run", "--images"], "--images"),
    (["compare", "ce", "--seed", "3"], "--seed"), (["train", "quickstart", "--res"], "--res"),
    (["compare", "ce", "--seeds"], "--seeds"), (["bench", "--reps"], "--reps"),
    (["compare", "ce", "--seeds", "many"], "'many'"), (["compare", "ce", "--seeds", "0"], "--seeds"),
    (["compare", "ce", "--seeds", "-1"], "--seeds"), (["compare", "ce", "--seeds", str(10**12)], "--seeds"),
    (["compare", "ce", "--jobs", "0"], "--jobs"), (["bench", "--reps", "0"], "--reps"),
    (["analyze", "run", "--images", "0"], "--images"), (["evaluate", "run", "--corrupted", "-1"], "--corrupted"),
    (["train", "quickstart", "--device", "abacus"], "abacus"), (["bench", "--device", "abacus"], "abacus"),
    pytest.param(["train", "quickstart", "--device", "cuda"], "cuda",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")),
    (["train", "quikstart"], "did you mean 'quickstart'?"), (["bench", "quikstart"], "did you mean 'quickstart'?"),
    (["recipes", "quikstart"], "did you mean 'quickstart'?"), (["compare", "quikstart"], "did you mean 'quickstart'?"),
    (["train", "nowhere.yaml"], "no recipe file"), (["train", "folder.yaml"], "no recipe file at folder.yaml"),
    (["train", "../quickstart"], "'../quickstart'"), (["train", ""], "''"), (["train", "quick\0start"], "start'"),
    (["train", "basd_cifar10", "train.epoch=3"], "did you mean 'epochs'?"),
    (["train", "basd_cifar10", "train.epochs=many"], "valid integer"),
    (["train", "basd_cifar10", "train.epochs=0"], "greater than or equal to 1"),
    (["train", "basd_cifar10", "epochs"], "write key=value"), (["train", "basd_cifar10", "train.=3"], "'train.=3'"),
    (["train", "basd_cifar10", "=3"], "'=3'"), (["train", "basd_cifar10", "train.epochs=[3"], "'train.epochs=[3'"),
    (["train", "basd_cifar10", "about=2020-13-45"], "'about=2020-13-45'"),
    (["train", "basd_cifar10", "train.lr=nan"], "train.lr=nan"),
    (["train", "basd_cifar10", "train.lr=1e999"], "train.lr=inf"), (["train", "basd_cifar10", "train=3"], "train=3"),
    (["train", "basd_cifar10", "method=ce"], "method='ce'"),
    (["train", "basd_cifar10", "method.name.x=3"], "method.name"), (["train", "quickstart", "stages=3"], "stages"),
    (["train", "quickstart", "stages.ce=3"], "stages"),
    (["train", "quickstart", "stages.../x.train.lr=1"], "stages.../x"),
    (["train", "quickstart", "stages.c3.train.lr=1"], "has no stage 'c3'"),
    (["train", "basd_cifar10", "method.name=bsad"], "allowed: "),
    (["train", "basd_cifar10", "method.losses.rds={}"], "method.losses: unknown loss 'rds' (did you mean 'rsd'?)"),
    (["train", "basd_cifar10", "method.losses.rsd.kapa=1"], "kapa"),
    ([*TRAIN, "data.source=torch/cifar11"], "cifar11"),
    ([*TRAIN, "data.source=torch/cifar10", "data.download=false", "data.root=nowhere"],
     "torch/cifar10 cannot be opened in nowhere"),
    ([*TRAIN, "data.source=nowhere"], "unknown source 'nowhere'"),
    ([*TRAIN, "data.train_split=trian"], "no split 'trian'"),
    ([*TRAIN, "student.model=deit_tinny_patch16_224"], "deit_tinny_patch16_224"),
    ([*TRAIN, "teacher.model=vit_tinny"], "vit_tinny"), ([*TRAIN, "teacher.model=null"], "needs a teacher"),
    ([*TRAIN, "student.model=hf-hub:nobody/nothing"], "pretrained"),
    ([*TRAIN, "student.model=local-dir:nowhere"], "nowhere"),
    ([*TRAIN, "teacher.checkpoint=nowhere.pth", "teacher.untrained=false"], "nowhere.pth"),
    ([*TRAIN, *NO_MODEL, "teacher.run=nowhere"], "nowhere"),
    ([*TRAIN, "teacher.untrained=false"], "would teach without trained weights"),
    ([*TRAIN, "teacher.run=nowhere"], "for the run, add teacher.model=null teacher.untrained=false"),
    ([*TRAIN, "teacher.checkpoint=t.pth"], "weights come from one place"),
    ([*CE, "student.pretrained=true", "student.checkpoint=s.pth"], "weights come from one place"),
    ([*TRAIN, "student.checkpoint=nowhere.pth"], "nowhere.pth"), ([*TRAIN, "student.kwargs={colour: red}"], "colour"),
    ([*TRAIN, "student.kwargs={norm_layer: 7}"], "norm_layer"), ([*TRAIN, "student.heads=3"], "heads=3"),
    ([*TRAIN, "student.patch_size=32"], "patches of 32"), ([*TRAIN, "teacher.img_size=31"], "patches of 8"),
    ([*TRAIN, "method.student_layers=[0, 7]"], "7"), ([*TRAIN, "method.student_layers=[0, x]"], "x"),
    ([*TRAIN, "method.selector.rank=24"], "24"),
    ([*TRAIN, "data.batch_size=33", "train.grad_accum_steps=2"], "multiple of 2"),
    ([*TRAIN, "data.batch_size=4096"], "lower it"),
    *(([*TRAIN, f"data.labeled={x}"], "data.labeled") for x in (1.5, 1e9, 0)),
    ([*TRAIN, "data.train_size=100000"], "data.train_size"), ([*TRAIN, "data.val_size=1e9"], "data.val_size"),
    ([*TRAIN, "teacher.cache=cache"], "views.crop"),
    (["train", "quickstart", "--resume"], "--run-dir"),
    (["train", "quickstart", "--resume", "--run-dir", "nowhere"], "nowhere"),
    ([*CE, "--run-dir", "file"], "file is not empty"), ([*CE, "--run-dir", "full"], "full is not empty"),
    ([*CE, "--run-dir", "file/run"], "file/run"), ([*CE, "--run-dir", "/proc/run"], "/proc/run"),
    ([*CE, "--run-dir", "x"*300], "xxx"), ([*CE, "--resume", "--run-dir", "full"], "full is not a run directory"),
    ([*CE, "--resume", "--run-dir", "file"], "file"),
    (["bench", "basd_cifar10", *TINY, "--out", "file"], "file"), (["compare", "ce", "--folder", "file"], "file"),
    (["compare", "kd", "--set", "train.seed=3"], "train.seed=3"),
    (["compare", "kd", "--set", "epochs"], "write key=value"),
    (["evaluate", "nowhere"], "nowhere"), (["evaluate", "file"], "file"),
    (["evaluate", "full"], "full is not a run directory"), (["evaluate", "."], "is not a run directory"),
    (["analyze", "run", "--output-dir", "file"], "file"),
]


@pytest.mark.parametrize("words, sentence", ARGUMENTS,
                         ids=lambda x: " ".join([*x[:1], *x[-2:]])[:70] if isinstance(x, list) else "")
def test_arguments(words, sentence, here, capsys):
    (here/"file").write_text("a file")
    (here/"folder.yaml").mkdir()
    (here/"full").mkdir()
    (here/"full"/"thesis.txt").write_text("a thesis")
    refuses([*words] + (["--run-dir", "run"] if words[:1] == ["train"] and "--run-dir" not in words
                        and "--resume" not in words and len(words) > 1 else []), sentence, capsys, here)


# ----------------------------------------------------------------------------------------------------------------- data

def image(size=(20, 16), seed=0):
    "An image of colored squares"
    squares = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize(size, Image.NEAREST)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pets(root, per_class=2):
    "A folder of images in two classes and two splits"
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (root/split/name).mkdir(parents=True)
            for i in range(per_class): (root/split/name/f"{i}.png").write_bytes(encoded(image(seed=10*k + i), "png"))
    return root


def only(root, keep):
    "Remove all files from the folder but those in `keep`"
    for p in pets(root).rglob("*.png"):
        if not keep(p): p.unlink()


def texts(root):
    for p in pets(root).rglob("*.png"): p.rename(p.with_suffix(".txt"))


def flat(root):
    (root/"train").mkdir(parents=True)
    (root/"train"/"0.png").write_bytes(encoded(image(), "png"))


def odd(root):
    "A folder called as an image, a link, a class that tests lack, a name in other letters, a pipe, a loop, a text"
    (pets(root)/"train"/"cat"/"0.jpg").mkdir()
    (root/"train"/"cat"/"2.png").symlink_to(root/"train"/"cat"/"0.png")
    os.mkfifo(root/"train"/"cat"/"pipe.png")
    (root/"train"/"dog"/"all").symlink_to("..")
    (root/"train"/"dog"/"notes.txt").write_text("a good dog")
    shutil.copytree(root/"test"/"cat", root/"train"/"ca té ' \U0001F431")


def forbidden(root):
    (pets(root)/"train"/"cat").chmod(0)


FOLDERS = {
    "missing": (lambda root: None, "unknown source 'pets'"),
    "a file": (lambda root: root.write_text("cat"), "unknown source 'pets'"),
    "a link to nothing": (lambda root: root.symlink_to("nowhere"), "unknown source 'pets'"),
    "empty": (lambda root: root.mkdir(), "pets has no split 'train'; its folders are none"),
    "no test split": (lambda root: shutil.rmtree(pets(root)/"test"), "pets has no split 'test'; its folders are train"),
    "empty split": (lambda root: only(root, lambda p: "train" not in p.parts),
                    "train holds no images in class folders"),
    "texts": (texts, "train holds no images in class folders"),
    "no classes": (flat, "train holds no images in class folders"),
    "one class": (lambda root: only(root, lambda p: "cat" in p.parts), "pets/train has a single class, 'cat'"),
    "broken link": (lambda root: (pets(root)/"train"/"cat"/"0.jpg").symlink_to("nowhere.jpg"),
                    "pets/train/cat/0.jpg cannot be decoded"),
    "a class for tests alone": (lambda root: shutil.copytree(pets(root)/"test"/"cat", root/"test"/"eel"),
                                "pets/test has images of class 'eel', which is none of the 2 classes of the training split"),
    "a class in capitals": (lambda root: (pets(root)/"test"/"cat").rename(root/"test"/"Cat"), "did you mean 'cat'"),
    "odd but sound": (odd, "works"),
}
if os.getuid() != 0: FOLDERS["no permission"] = (forbidden, "pets/train/cat cannot be read")
SMALL = ["data.source=pets", "data.root=null", "data.val_size=0", "data.batch_size=2", "data.train_size=null"]


def works(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, here, capsys):
    make, outcome = FOLDERS[name]
    make(here/"pets")
    words = [*CE, *SMALL, "--run-dir", "run"]
    works(words, capsys) if outcome == "works" else refuses(words, outcome, capsys, here)


@pytest.mark.parametrize("memory", ["true", "false"])
def test_an_image_that_breaks_later(memory, here, capsys):
    ("Found while a set is read into memory, or, in a worker process, when its turn comes; "
     "left out where `data.on_error` allows it")
    pets(here/"pets", 3)
    (here/"pets"/"train"/"dog"/"1.png").write_bytes(b"no image")
    words = [*CE, *SMALL, f"data.in_memory={memory}", "--run-dir"]
    assert "pets/train/dog/1.png cannot be decoded (8 bytes in no known format)" in refusal(
        [*words, "run", "data.workers=1"], capsys)
    works([*words, "skipping", "data.on_error=skip"], capsys)
    assert json.loads((here/"skipping"/"result.json").read_text())["skipped_images"] == 1


def damaged(raw, rng):
    "A PNG with a flipped bit, a wrong checksum, a stretch written over, or an end cut off"
    out, at, kind = bytearray(raw), rng.randrange(8, len(raw) - 16), rng.randrange(4)
    if kind == 0: out[at] ^= 1 << rng.randrange(8)
    if kind == 1: out[-5] ^= 255
    if kind == 2: out[at:at + 8] = rng.randbytes(8)
    if kind == 3: del out[at:]
    return bytes(out)


@pytest.mark.parametrize("memory", ["true", "false"])
def test_two_hundred_damaged_pngs(memory, here, capsys):
    "None ends the process, neither in memory nor in a worker process; each is left out and counted, or named"
    pets(here/"pets", 8)
    rng = random.Random(0)
    for i in range(200): (here/"pets"/"train"/"dog"/f"bad{i:03}.png").write_bytes(damaged(encoded(image(), "png"), rng))
    words = [*CE, *SMALL, f"data.in_memory={memory}", "data.workers=1", "data.batch_size=8", "--run-dir"]
    works([*words, "skipping", "data.on_error=skip"], capsys)
    assert json.loads((here/"skipping"/"result.json").read_text())["skipped_images"] == 200
    assert "pets/train/dog/bad" in refusal([*words, "run"], capsys)


def over_white(palette, hole):
    "A picture of a palette with one color transparent, on white paper"
    holes, picture = np.asarray(palette) == hole, np.array(palette.convert("RGB"))
    picture[holes] = 255
    return Image.fromarray(picture)


PICTURE = image()
DEEP = (np.arange(320).reshape(16, 20)*200).astype("uint16")
# file name: (content, what is wrong with it; or, where it works, the picture that it shows, None for PICTURE)
IMAGES = {
    "truncated.jpg": (encoded(image((200, 200)), "jpeg")[:-600], "truncated"),
    "cut.jpg": (encoded(PICTURE, "jpeg")[:200], "cannot be decoded"),
    "cut.png": (encoded(PICTURE, "png")[:60], "cannot be decoded"),
    "cut.webp": (encoded(PICTURE, "webp")[:40], "cannot be decoded"),
    "cut.gif": (encoded(PICTURE.quantize(16), "gif")[:40], "cannot be decoded"), "empty.jpg": (b"", "an empty file"),
    "page.jpg": (b"<html>404</html>", "in no known format"), "zeros.png": (b"\0"*100, "in no known format"),
    "text.png": ("hello".encode("utf-16"), "in no known format"),
    "float.tif": (encoded(Image.fromarray(np.linspace(0, 1, 320, dtype="float32").reshape(16, 20)), "tiff"),
                  "32 bits per pixel"),
    "int.tif": (encoded(Image.fromarray(np.arange(320, dtype="int32").reshape(16, 20)), "tiff"), "32 bits per pixel"),
    "pickle.png": (pickle.dumps({"no": "image"}), "in no known format"),
    "plain.png": (encoded(PICTURE, "png"), None), "plain.bmp": (encoded(PICTURE, "bmp"), None),
    "plain.tif": (encoded(PICTURE, "tiff"), None), "lossless.webp": (encoded(PICTURE, "webp", lossless=True), None),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "jpeg", quality=100, subsampling=0), None),
    "cmyk.tif": (encoded(PICTURE.convert("CMYK"), "tiff"), None),
    "palette.png": (encoded(PICTURE.quantize(32), "png"), None),
    "holes.png": (encoded(PICTURE.quantize(32), "png", transparency=0), over_white(PICTURE.quantize(32), 0)),
    "alpha.png": (encoded(PICTURE.convert("RGBA"), "png"), None),
    "palette.gif": (encoded(PICTURE.quantize(32), "gif"), None),
    "moving.gif": (encoded(PICTURE.quantize(32), "gif", save_all=True,
                           append_images=[PICTURE.rotate(180).quantize(32)]), None),
    "moving.webp": (encoded(PICTURE, "webp", lossless=True, save_all=True, append_images=[PICTURE.rotate(180)]), None),
    "moving.png": (encoded(PICTURE, "png", save_all=True, append_images=[PICTURE.rotate(180)]), None),
    "png-inside.jpg": (encoded(PICTURE, "png"), None),
    "jpeg-inside.png": (encoded(PICTURE, "jpeg", quality=100, subsampling=0), None),
    "deep.png": (encoded(Image.fromarray(DEEP), "png"), Image.fromarray((DEEP/257).astype("uint8"))),
    "deep.tif": (encoded(Image.fromarray(DEEP), "tiff"), Image.fromarray((DEEP/257).astype("uint8"))),
    "grey.png": (encoded(PICTURE.convert("L"), "png"), PICTURE.convert("L")),
    "grey-alpha.png": (encoded(PICTURE.convert("LA"), "png"), PICTURE.convert("L")),
    "bits.png": (encoded(PICTURE.convert("1"), "png"), PICTURE.convert("1")),
    "pixel.png": (encoded(image((1, 1)), "png"), image((1, 1))),
    "thin.png": (encoded(image((5000, 1)), "png"), image((5000, 1))),
    "tall.png": (encoded(image((1, 5000)), "png"), image((1, 5000))),
}
GOOD = [name for name, (_, outcome) in IMAGES.items() if not isinstance(outcome, str)]


@pytest.mark.parametrize("name", [n for n in IMAGES if n not in GOOD])
def test_bad_images(name, here, capsys):
    content, sentence = IMAGES[name]
    (pets(here/"pets")/"train"/"dog"/name).write_bytes(content)
    words = [*CE, *SMALL, "--run-dir", "run"]
    before = tree(here)
    message = refusal(words, capsys)
    assert f"pets/train/dog/{name}" in message and sentence in message and "0x" not in message and tree(here) == before


def test_odd_images(here, capsys):
    "Each decodes to what it shows, and a run on all of them works"
    pets(here/"pets")
    for name in GOOD: (here/"pets"/"train"/"dog"/name).write_bytes(IMAGES[name][0])
    source = open_source("pets", "train")
    assert set(GOOD) < {os.path.basename(path) for path in source.dataset}
    for i, path in enumerate(source.dataset):
        name = os.path.basename(path)
        if name not in GOOD: continue
        expected = np.asarray((IMAGES[name][1] or PICTURE).convert("RGB")).astype(int)
        assert np.abs(source[i][0].permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2, name
    works([*CE, *SMALL, "views.crop=student_only", "data.in_memory=false", "--run-dir", "run"], capsys)


# ---------------------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A small run that has ended"
    run = tmp_path_factory.mktemp("finished")/"run"
    assert main([*CE, "--run-dir", str(run)]) == 0
    return run


class Evil:
    "Unpickling it would leave a marker in the working directory"
    def __reduce__(self): return os.mkdir, ("marker",)


def saved(content, path="x.pth"):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def tensors(change, run):
    "The run's weights, changed, as the content of a .safetensors file"
    from safetensors.torch import save
    return save({k: v.contiguous() for k, v in change(load_file(run/"student.safetensors")).items()})


def header(text): return struct.pack("<Q", len(text)) + text.encode()


def weights(run): return (run/"student.safetensors").read_bytes()


def holed(number):
    def change(state): state["blocks.1.mlp.fc1.weight"][3, 4] = number; return state
    return change


UNREADABLE = "cannot be read as a checkpoint of tensors"
FILES = { # file: (content from a finished run, the expected sentence | "works")
    "cut.safetensors": (lambda run: weights(run)[:-1000], UNREADABLE),
    "stump.safetensors": (lambda run: weights(run)[:5], UNREADABLE), "empty.safetensors": (lambda run: b"", UNREADABLE),
    "empty.pth": (lambda run: b"", UNREADABLE), "words.pth": (lambda run: b"these are no weights", UNREADABLE),
    "words.safetensors": (lambda run: b"these are no weights", UNREADABLE),
    "long-header.safetensors": (lambda run: struct.pack("<Q", 2**60) + b"{}", UNREADABLE),
    "no-json.safetensors": (lambda run: header("{no json"), UNREADABLE),
    "beyond.safetensors": (
        lambda run: header('{"head.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}'), UNREADABLE),
    "overlap.safetensors": (
        lambda run: header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                           '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"1234", UNREADABLE),
    "none.safetensors": (lambda run: header("{}"), "holds no state dict"),
    "cut.pth": (lambda run: saved(load_file(run/"student.safetensors"))[:-3000], UNREADABLE),
    "stump.pth": (lambda run: b"PK\x03\x04", UNREADABLE),
    "flipped.pth": (lambda run: b"\x80\x02}q\x00X" + bytes(range(200)), UNREADABLE),
    "pickle.pth": (lambda run: pickle.dumps({"a": 1}), UNREADABLE),
    "object.pth": (lambda run: pickle.dumps(Evil()), UNREADABLE), "evil.pth": (lambda run: saved(Evil()), UNREADABLE),
    "evil-within.pth": (lambda run: saved({"model": load_file(run/"student.safetensors") | {"x": Evil()}}), UNREADABLE),
    "evil.pt": (lambda run: saved({"state_dict": Evil()}), UNREADABLE),
    "evil.safetensors": (lambda run: pickle.dumps(Evil()), UNREADABLE),
    "module.pth": (lambda run: saved(torch.nn.Linear(2, 2)), "save its state_dict() alone"),
    "list.pth": (lambda run: saved([torch.zeros(2)]), "holds no state dict"),
    "numbers.pth": (lambda run: saved({"a": 1}), "holds no state dict"),
    "nothing.pth": (lambda run: saved({}), "holds no state dict"),
    "numbered.pth": (lambda run: saved({1: torch.zeros(2)}), "holds no state dict"),
    "tensor.pth": (lambda run: saved(torch.zeros(2)), "holds no state dict"),
    "resnet.pth": (lambda run: saved({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)}),
                   "resnet.pth is no checkpoint of VisionTransformer"),
    "lacking.safetensors": (lambda run: tensors(lambda s: {k: v for k, v in s.items() if "blocks.1" not in k}, run),
                            "missing weights such as blocks.1"),
    "deeper.safetensors": (lambda run: tensors(lambda s: s | {"blocks.2.norm1.weight": torch.ones(32)}, run),
                           "unknown weights such as blocks.2"),
    "wider.safetensors": (lambda run: tensors(lambda s: s | {"norm.weight": torch.ones(64)}, run),
                          "norm.weight (64,) for (32,)"),
    "nan.safetensors": (lambda run: tensors(holed(float("nan")), run), "not finite, in blocks.1.mlp.fc1.weight"),
    "inf.safetensors": (lambda run: tensors(holed(float("inf")), run), "not finite, in blocks.1.mlp.fc1.weight"),
    "half.safetensors": (lambda run: tensors(lambda s: {k: v.half() for k, v in s.items()}, run), "works"),
    "wrapped.pth": (lambda run: saved({"epoch": 3, "model": {
        f"module.{k}": v for k, v in load_file(run/"student.safetensors").items()}}), "works"),
}


@pytest.mark.parametrize("name", FILES)
def test_checkpoints(name, finished, here, capsys):
    content, outcome = FILES[name]
    (here/name).write_bytes(content(finished))
    words = [*CE, f"student.checkpoint={name}", "--run-dir", "run"]
    if outcome == "works": return works(words, capsys)
    assert name in refuses(words, outcome, capsys, here)
    assert not (here/"marker").exists()


def test_other_checkpoints(finished, here, capsys):
    "A folder; a head for other classes, which a student replaces and a teacher does not"
    (here/"folder.pth").mkdir()
    refuses([*CE, "student.checkpoint=folder.pth", "--run-dir", "run"], "no checkpoint at folder.pth", capsys, here)
    (here/"ten.safetensors").write_bytes(weights(finished))
    teacher = ["teacher.model=deit_tiny_patch16_224", "teacher.img_size=16",
               "teacher.kwargs={patch_size: 4, depth: 2, embed_dim: 32, num_heads: 2}",
               "teacher.checkpoint=ten.safetensors", "teacher.untrained=false"]
    refuses([*TRAIN, *teacher, "--run-dir", "run"],
            "weights of another shape such as head.weight (10, 32) for (1000, 32)", capsys, here)


RESUME, EVALUATE = [*CE, "--resume", "--run-dir", "run"], ["evaluate", "run", "--quick"]
TAUGHT = [*TRAIN, *NO_MODEL, "teacher.run=run", "--run-dir", "taught"]
STATE = { # what is wrong with a file of a run: content from the file as it was
    "cut": lambda b: b[:len(b)//2], "empty": lambda b: b"", "words": lambda b: b"no state",
    "flipped": lambda b: b[:len(b)//2] + bytes(x ^ 255 for x in b[len(b)//2:len(b)//2 + 200]) + b[len(b)//2 + 200:],
    "foreign": lambda b: saved({"a": torch.zeros(2)}), "evil": lambda b: pickle.dumps(Evil()),
    "evil within": lambda b: saved({"state": {"task": Evil()}, "digest": ""}),
    "evil of torch": lambda b: saved(Evil()),
}
TEXTS = {"empty": "", "cut": "{", "list": "[]", "other": "{}", "words": "no state",
         "evil": "!!python/object/apply:os.mkdir [marker]", "deep": "["*5000}
RUNS = [(words, file, what, content) for words, file, contents in [
    (RESUME, "last.pt", STATE), (EVALUATE, "last.pt", STATE), (EVALUATE, "best.pt", STATE),
    (TAUGHT, "student.safetensors", {k: STATE[k] for k in ("cut", "empty", "words", "evil", "evil of torch")}),
    (RESUME, "environment.json", {k: v for k, v in TEXTS.items() if k != "other"}),
    (RESUME, "result.json", TEXTS), (TAUGHT, "student.json", TEXTS),
    (EVALUATE, "recipe.yaml", {k: TEXTS[k] for k in ("empty", "cut", "list", "words", "evil", "deep")}),
    (TAUGHT, "recipe.yaml", {k: TEXTS[k] for k in ("empty", "evil")}),
    (["analyze", "run", "--metrics", "attention"], "last.pt", {k: STATE[k] for k in ("cut", "evil")})]
        for what, content in contents.items()]


@pytest.mark.parametrize("words, file, what, content", RUNS, ids=lambda x:
                         x[-1] if isinstance(x, list) else x if isinstance(x, str) and len(x) < 30 else "")
def test_damaged_runs(words, file, what, content, finished, here, capsys):
    shutil.copytree(finished, here/"run")
    if words is RESUME and file != "result.json": (here/"run"/"result.json").unlink()
    whole = (here/"run"/file).read_bytes()
    (here/"run"/file).write_bytes(content(whole) if callable(content) else content.encode())
    before = tree(here)
    try: status = main(words)
    except SystemExit as e: status = e.code
    err = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and file in err[0] and all(line.startswith("basd: ") for line in err), err
    assert not (here/"marker").exists() and {k: v for k, v in tree(here).items() if k in before} == before


CACHE = ["views.crop=center", "teacher.cache=kept"]


@pytest.mark.parametrize("file", ["shard-00000.bin", "cache.json"])
def test_evil_caches(file, here, capsys):
    "Records are plain numbers and their note is JSON: no file of a cache can run code"
    words = [*TRAIN, *CACHE, "train.log_gradients=false"]
    works([*words, "--run-dir", "first"], capsys)
    whole = (here/"kept"/file).read_bytes()
    (here/"kept"/file).write_bytes(pickle.dumps(Evil()))
    if file == "cache.json": assert file in refusal([*words, "--run-dir", "second"], capsys)
    else:
        works([*words, "--run-dir", "second"], capsys)         # of a wrong length, so it is made again
        assert (here/"kept"/file).read_bytes() == whole
    assert not (here/"marker").exists()


# ------------------------------------------------------------------------------------------------------ nothing gets in

CALLS = {"torch.load": "weights_only", "numpy.load": None, "np.load": None, "pickle.load": None, "pickle.loads": None,
         "pickle.Unpickler": None, "yaml.load": None, "yaml.full_load": None, "yaml.unsafe_load": None, "eval": None,
         "exec": None, "os.system": None, "os.popen": None, "joblib.load": None, "torch.hub.load": None,
         "urllib.request.urlopen": None, "requests.get": None, "torch.jit.load": None, "shelve.open": None}
# what runs code by intent: an entry of torch.hub after `admit` (tests/test_hubs.py), and the text that a caller of `run_on_ranks` gives
MEANT = {("teachers.py", "torch.hub.load"), ("distributed.py", "exec")}


def test_no_call_that_runs_what_it_reads():
    "In the whole package: no reader that could execute a file, and `torch.load` with weights alone"
    import ast

    import basd
    from pathlib import Path
    seen = []
    for path in Path(basd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call): continue
            name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert ("shell" not in words and words.get("allow_pickle", "False") == "False"
                    and words.get("weights_only", "True") == "True"), f"{path.name}: {ast.unparse(node)}"
            if name in CALLS:
                seen.append(name)
                if (path.name, name) in MEANT: continue
                assert CALLS[name] and words.get(CALLS[name]) == "True", f"{path.name}: {ast.unparse(node)}"
    assert "torch.load" in seen and {name for _, name in MEANT} <= {*seen}


def test_writing_stays_in_the_run_directory(here, capsys):
    ("Whatever paths a recipe holds, it writes below --run-dir and nowhere else; "
     "`teacher.cache` names one further folder")
    (here/"r.yaml").write_text("name: ../../outside\nabout: /tmp/outside\nstages: {one: {}, two: {name: ../elsewhere, "
                               "teacher: {run: 'stage:one'}, method: {name: distill}}}")
    before = tree(here)
    works(["train", "r.yaml", *[w for w in TINY if w.split(".")[0] not in ("teacher", "method")], "train.epochs=1",
           "train.warmup_epochs=0", "--run-dir", "below/run"], capsys)
    after = tree(here)
    assert ({k.split(os.sep)[0] for k in after.keys() - before.keys()} == {"below"}
            and set(os.listdir("below/run")) == {"one", "two", "recipe.yaml"})
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("words, outcome", [
    ([*TRAIN], "works"), ([*CE, "data.source=hfds/nobody/nothing", "data.download=false"], "hfds/nobody/nothing"),
    ([*CE, "data.source=torch/cifar10", "data.download=false"], "torch/cifar10 cannot be opened"),
    ([*CE, "student.model=hf-hub:nobody/nothing"], "only where pretrained=true"),
    (["bench", "basd_cifar10", *TINY, "--reps", "1"], "works")], ids=lambda x: x[-1] if isinstance(x, list) else "")
def test_no_connection_unless_named(words, outcome, here, capsys, monkeypatch):
    "Nothing is fetched where `pretrained` and `download` are false: no socket is opened, no name looked up"
    requests = []
    def refuse(*args, **kwargs): requests.append(args); raise OSError("no network in this test")
    for name in ("connect", "connect_ex", "sendto"): monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"): monkeypatch.setattr(socket, name, refuse)
    words = [*words, *(["--run-dir", "run"] if words[0] == "train" else [])]
    works(words, capsys) if outcome == "works" else refuses(words, outcome, capsys, here)
    assert not requests
