"""Models and data that are objects in Python: trained, stopped, resumed to the same weights, evaluated, exported; what only Python can
give is asked for in one sentence. (By package.module:callable and the command: tests/test_doors.py, test_hubs.py, test_export.py.)"""
import copy
import importlib.util

import pytest
import timm
import torch
import yaml
from forks import on_ranks, state_of
from safetensors.torch import load_file
from test_hubs import dinov2, timm_is_right
from torch import nn

import basd
from basd.cli import _of_stages, main
from basd.core.distributed import rank
from basd.models.students import load_student, save_student
from basd.models.taps import TappedModel
from basd.runs.builders import take_objects
from basd.runs.recipe_files import as_overrides
from basd.training.build import _check_given

SIZE = 28
PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))
SETTINGS = dict(views=dict(flip=0., color="none"), method=dict(name="match", losses=dict(cka={}), student_layers=[0, 2], teacher_layers=[0, 2]),
                train=dict(epochs=2, warmup_epochs=0, lr=.01))


class Cnn(nn.Sequential):
    "A student of one's own"
    def __init__(self, num_classes, width=8):
        conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
        super().__init__(conv(3, width), conv(width, width), conv(width, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


@timm.models.register_model
def own_cnn(pretrained=False, **kwargs):
    "The student as timm makes it, and opens it again"
    return timm.models.build_model_with_cfg(Cnn, "own_cnn", pretrained, kwargs_filter=("in_chans",), **kwargs)


class Images:
    "Three colors"
    classes = ["red", "green", "blue"]
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        x = torch.randint(0, 99, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(i + self.n), dtype=torch.uint8)
        x[i%3] += 100
        return x, i%3


def cnn(width=8):
    torch.manual_seed(1)
    return Cnn(3, width)


def named(width=8):
    torch.manual_seed(1)
    return timm.create_model("own_cnn", num_classes=3, width=width)


DATA = Images(48), Images(12)


def given(teacher, student=cnn): return dict(student=student(), teacher=teacher, data=DATA)


def train(run, teacher, student=cnn, **more):
    data = dict(source=DATA, batch_size=12, val_size=12, train_size=None, workers=0)
    objects = dict(student=dict(model=student(), img_size=SIZE), teacher=teacher, data=data) | more
    return basd.train("kd", run_dir=str(run), device="cpu", **objects, **SETTINGS)


def stopped_after_an_epoch(run, monkeypatch, teacher, student=cnn):
    from basd.training.trainer import Trainer
    with monkeypatch.context() as m:
        whole = Trainer.run_epoch
        def dies(self, *args, **kwargs):
            if self.step: raise KeyboardInterrupt
            return whole(self, *args, **kwargs)
        m.setattr(Trainer, "run_epoch", dies)
        with pytest.raises(KeyboardInterrupt): train(run, teacher, student)
    assert (run/"kd"/"last.pt").is_file() and not (run/"kd"/"result.json").is_file()


def story(folder, teacher, again, monkeypatch):
    "Train, stop, resume, evaluate, export, open by timm; `again` is how the teacher is given to a resumed run"
    before = copy.deepcopy(again.state_dict())
    result = train(folder/"whole", teacher, named)["kd"]                  # the stage that would train a teacher is left out
    assert all((v == before[k]).all() for k, v in again.state_dict().items())                        # the caller's own is not changed
    stopped_after_an_epoch(folder/"part", monkeypatch, teacher, named)
    basd.resume(str(folder/"part"), device="cpu", **given(again, named))
    whole, part = folder/"whole"/"kd", folder/"part"/"kd"
    assert state_of(part) == state_of(whole)
    found = basd.evaluate(str(part), device="cpu", **given(again, named))
    assert found[result["exported"]] == pytest.approx(result["test"][result["exported"]])
    own = named(8).eval()
    own.load_state_dict(load_file(part/"student.safetensors"))                       # by its own class alone
    with basd.core.registry.offering({"python.student:Cnn": lambda num_classes: named()}): student = load_student(part, layers=[])
    x = torch.rand(2, 3, SIZE, SIZE)
    assert (own(student.normalize(x)) == student.eval()(x).logits).all() and not (own[0][0].weight == named()[0][0].weight).all()
    onnx = all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime"))
    found = basd.export(part, folder/"out", onnx=onnx, student=named())
    assert not onnx or found["difference"] < 1e-4
    opened = timm_is_right(folder/"out", DATA[1], result["test"][result["exported"]]["top1"])
    with torch.no_grad(): assert (opened(x) == own(x)).all()
    print(f"logits differ by 0.0 in timm, {found.get('difference')} in ONNX")
    assert opened.pretrained_cfg["label_names"] == Images.classes and f"import {__name__}  # registers own_cnn" in (folder/"out"/"README.md").read_text()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Cnn(3, 12).eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    run = tmp_path_factory.mktemp("own")/"run"
    train(run, dict(model=teacher, img_size=SIZE, **PLAIN))
    return run/"kd"


def test_an_own_student_and_an_own_teacher(tmp_path, teacher, monkeypatch):
    story(tmp_path, dict(model=teacher, img_size=SIZE, **PLAIN), teacher, monkeypatch)
    stored = yaml.safe_load((tmp_path/"whole"/"kd"/"recipe.yaml").read_text())
    assert (stored["student"]["model"], stored["teacher"]["model"], stored["data"]["source"]) == (
        "python.student:Cnn", "python.teacher:Cnn", "python.data:Images")


def test_an_own_student_of_a_dinov2_of_timm(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, patch_size=7, depth=3, embed_dim=24, num_heads=2)
    story(tmp_path, vit, vit, monkeypatch)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_own_student_of_transformers(wrapped, tmp_path, monkeypatch):
    "The teacher as a module of transformers, and as `create_teacher` wraps it, which holds size and statistics"
    dinov2(tmp_path/"dino")
    from transformers import AutoModel
    plain = AutoModel.from_pretrained(tmp_path/"dino")
    again = basd.create_teacher(f"hf:{tmp_path}/dino", pretrained=True) if wrapped else plain
    story(tmp_path, again if wrapped else dict(model=plain, img_size=SIZE, **PLAIN), again, monkeypatch)


def test_a_wrapped_teacher_is_read_as_it_was_wrapped(tmp_path):
    "How `create_teacher` was told to read its layers is in the recipe of the run, which is resumed with it"
    torch.manual_seed(0)
    vit = basd.create_teacher("vit_tiny_patch16_224", img_size=SIZE, untrained=True, prefix=1, grid=(4, 4), patch_size=SIZE//4,
                              depth=3, embed_dim=24, num_heads=2, num_classes=3)
    train(tmp_path/"run", vit)
    stored = yaml.safe_load((tmp_path/"run"/"kd"/"recipe.yaml").read_text())
    assert stored["teacher"]["kwargs"] == dict(prefix=1, grid=[4, 4])
    assert basd.resume(str(tmp_path/"run"), device="cpu", **given(vit))["kd"]["test"]


def test_export(finished, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(package)
    found = basd.export(finished, tmp_path/"out", student=cnn())
    assert found["difference"] < 1e-4 and "README.md" in found["files"]
    assert "make the student by timm.create_model" in found["reason"] and found["reason"] in (tmp_path/"out"/"README.md").read_text()
    print(f"ONNX differs by {found['difference']:.1e}")
    with torch.no_grad(): cnn().load_state_dict(load_file(tmp_path/"out"/"model.safetensors"))


def test_what_only_python_can_give(finished, tmp_path, teacher, capsys):
    "Each command says so in a sentence, with the call; so does Python where one is missing or is another"
    for words, call in ((["resume", str(finished)], "resume("), (["evaluate", str(finished)], "evaluate("), (["export", str(finished)], "export("),
                        (["train", f"{finished}/recipe.yaml", "--run-dir", str(tmp_path/"new")], "train(")):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert f"only Python can give: basd.{call}" in err and "student=Cnn(…)" in err and len(err.splitlines()) == 1, err
    with pytest.raises(ValueError, match=r"\(given: Linear\)"): basd.evaluate(str(finished), student=nn.Linear(2, 2), data=DATA)
    with pytest.raises(ValueError, match="python.data:Images is an object"): basd.evaluate(str(finished), student=cnn())
    with pytest.raises(ValueError, match="build it yourself and load student.safetensors"): load_student(finished)
    assert not (tmp_path/"new").exists()


@pytest.mark.parametrize("more, words", [
    (dict(student=Cnn), "student is a type; give an nn.Module"), (dict(student=cnn(), _="student.img_size=null"), "give img_size"),
    (dict(teacher=Cnn(3)), "give img_size"), (dict(teacher=dict(model=Cnn(3), img_size=SIZE)), "give mean and std"),
    (dict(student=dict(model=cnn(), img_size=SIZE, width=3)), "width is for a model that is built by its name"),
    (dict(student=dict(model=cnn(), img_size=SIZE, pretrained=True)), "pretrained is for a model that is built by its name"),
    (dict(student=dict(model=Cnn(5), img_size=SIZE)), "has 5 logits for 3 classes; give it a head"), (dict(data=DATA[0]), "give two data sets of")])
def test_what_fails_is_a_sentence(more, words, tmp_path, teacher):
    more = dict(more)
    texts = [more.pop("_")] if "_" in more else []
    objects = dict(student=dict(model=cnn(), img_size=SIZE), teacher=dict(model=teacher, img_size=SIZE, **PLAIN),
                   data=dict(source=DATA, batch_size=12, val_size=12, train_size=None, workers=0)) | more
    with pytest.raises(ValueError, match=words): basd.train("kd", *texts, run_dir=str(tmp_path/"run"), device="cpu", **objects, **SETTINGS)
    assert not (tmp_path/"run").exists()


def test_a_student_is_not_that_of_the_teachers_stage():
    "Where the recipe trains its teacher, only the stage after it has the student that was given"
    from basd.core.registry import offering
    objects, brought, rest = take_objects(dict(student=dict(model=cnn(), img_size=SIZE)))
    with offering(objects): stages = basd.load_recipe("kd", as_overrides(**_of_stages("kd", brought, rest)))
    first, last = stages.values()
    assert (last.student.model, last.student.img_size, last.student.width) == ("python.student:Cnn", SIZE, None)
    assert first.student.model == basd.load_recipe("kd")["teacher"].student.model and not rest


def on_a_rank(folder):
    "What is refused where ranks make equal students, and where each makes its own"
    from types import SimpleNamespace
    recipe = SimpleNamespace(student=SimpleNamespace(model="python.student:Cnn"), teacher=SimpleNamespace(model=None))
    (folder/"last.pt").touch()
    (folder/"environment.json").write_text("{}")
    refused = []
    for seed in (0, rank()):
        torch.manual_seed(seed)
        task = SimpleNamespace(student=basd.create_student(Cnn(3), img_size=SIZE, layers=[]), teacher=None)
        try: _check_given(recipe, folder, task)
        except ValueError as e: refused.append([seed, str(e)])
    return refused


def test_ranks_have_the_same_object(tmp_path):
    (_, sentence), = on_ranks(on_a_rank, tmp_path, ranks=2, folder=tmp_path)
    assert "has other weights on each rank; call torch.manual_seed(0)" in sentence


def test_a_resumed_run_takes_the_same_teacher(tmp_path, teacher, monkeypatch):
    how = dict(model=teacher, img_size=SIZE, **PLAIN)
    stopped_after_an_epoch(tmp_path/"run", monkeypatch, how)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="began with a teacher of other weights"): basd.resume(str(tmp_path/"run"), **given(Cnn(3, 12)))


class Rows(nn.Module):
    "Blocks whose maps have their channels last, (B, h, w, D), as no attribute says"
    def __init__(self, d=24):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, d, 4, 4), nn.Linear(d, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d)) for _ in range(3))

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        for block in self.blocks: x = x + block(x)
        return self.head(x.mean((1, 2)))


def test_channels_last_are_told_by_the_layers():
    "64 tokens of 24 channels; they were read as 192 tokens of 8"
    model = Rows()
    student = basd.create_student(model, img_size=32)
    student.infer_shapes(torch.zeros(1, 3, 32, 32))
    assert (student.tokens, student.widths, student.grid_sizes) == ([64]*3, [24]*3, [(8, 8)]*3)
    turned = basd.create_teacher(model, img_size=32, **PLAIN, channels_last=False)
    turned.infer_shapes(torch.zeros(1, 3, 32, 32))
    assert turned.tokens == [8*24]*3                                                         # what is given counts


def test_gates_do_not_turn_maps():
    "A layer with linear gates over channels, whose map is as wide as the gate"
    class Gated(nn.Module):
        def __init__(self): super().__init__(); self.gate = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
        def forward(self, x): return x*self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), Gated(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    student = basd.create_student(model, img_size=32, layers=["1"])
    student.infer_shapes(torch.zeros(1, 3, 32, 32))
    assert (student.tokens, student.widths) == ([64], [32])


def test_weights_of_two_precisions():
    "Images are in the type of the kernels where no weight has theirs, and as they are where one has"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=3).bfloat16()
    model.cls_token.data = model.cls_token.data.float()
    assert TappedModel(model, [], mean=(.5,)*3, std=(.5,)*3).normalize(torch.rand(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16
    assert TappedModel(model.double().half(), [], mean=(.5,)*3, std=(.5,)*3).normalize(torch.rand(1, 3, 16, 16)).dtype == torch.float16


def test_a_teacher_in_half_precision():
    "In a loop in float32 it gets images in its own number type, and a student in float64 beside a teacher in float32 likewise"
    made = lambda seed: (torch.manual_seed(seed), timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, depth=2,
                                                                    embed_dim=24, num_heads=3))[1]
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    loss = lambda student, teacher: basd.create_task("distill", student, basd.create_teacher(teacher), total_steps=1)(x, y)["losses"]["logits"].item()
    exact = loss(made(0), made(1))
    assert loss(made(0), made(1).bfloat16()) == pytest.approx(exact, rel=.05) and loss(made(0).double(), made(1)) == pytest.approx(exact, rel=1e-4)
    assert loss(made(0), made(1).half()) == pytest.approx(exact, rel=.01)


def test_the_second_output_is_the_logits():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.features, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 10)
        def forward(self, x): z = self.features(x).mean((2, 3)); return z, self.head(z)
    student = basd.create_student(Two(), img_size=16, layers=[], logits=1)
    assert basd.create_task("ce", student, total_steps=1).classes == 10


def test_a_reading_that_was_given_is_stored(tmp_path):
    "In student.json, by which teachers and exports read the student"
    student = basd.create_student("deit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, depth=2, width=24, heads=3, prefix=1, grid=(4, 4), logits=None)
    save_student(student, tmp_path)
    again = load_student(tmp_path)
    assert (again.prefix, tuple(again.grid), again.logits, again.channels_last) == (1, (4, 4), None, None)
