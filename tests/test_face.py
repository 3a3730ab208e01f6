"The public names of `import basd`: fourteen names, imported when they are used, and a task that any training loop can call"
import copy
import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from forks import on_ranks
from packaging.version import Version
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import basd
from basd.core.distributed import rank, world_size

NAMES = ("create_teacher create_student create_task tap TappedModel METHODS LOSSES train resume evaluate export compare load_recipe "
         "Recipe").split()
VIT = dict(img_size=16, patch_size=4, depth=3)
SMALL = dict(selector=dict(rank=4))
AT = dict(step=20, total_steps=40)


def models(num_classes=10):
    torch.manual_seed(0)
    teacher = basd.create_teacher("vit_tiny_patch16_224", untrained=True, embed_dim=36, num_heads=3, num_classes=num_classes,
                                  **VIT | dict(img_size=24))
    return basd.create_student(num_classes=num_classes, width=24, heads=3, **VIT), teacher


def batch(n=8): return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 10


def test_the_names():
    assert basd.__all__ == NAMES and {*NAMES} <= {*dir(basd)}
    for name in NAMES: assert callable(getattr(basd, name)) or name in ("METHODS", "LOSSES"), name
    assert {"basd", "ce", "distill", "match"} <= {*basd.METHODS} and {"rkd", "cka"} <= {*basd.LOSSES}
    assert basd.TappedModel(timm.create_model("resnet18")).names
    with pytest.raises(AttributeError, match="no attribute 'create_taks'; did you mean 'create_task'?"): basd.create_taks
    with pytest.raises(AttributeError, match="no attribute 'wonder'$"): basd.wonder
    assert not hasattr(basd, "__wrapped__")


def test_import_is_light():
    "Neither torch nor anything else that is slow is imported before a name is used"
    code = ("import sys, time; t = time.perf_counter(); import basd; t = time.perf_counter() - t; dir(basd); "
            "print(t, *({'torch', 'timm', 'numpy', 'matplotlib', 'pydantic', 'fastcore', 'yaml'} & sys.modules.keys()))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[1:] == [] and float(out[0]) < .1


def test_submodules_are_not_hidden():
    "The names of the face are not those of rooms, so `basd.methods` stays a package"
    import basd.methods.basd
    assert basd.methods.basd.BASD is basd.METHODS.get("basd")
    assert not {*NAMES} & {*os.listdir(os.path.dirname(basd.__file__))}


def options_that_a_plain_loop_serves():
    "method → its options here, or the sentence of its refusal"
    found = {name: {} for name in basd.METHODS}
    found["basd"] = SMALL
    if "basd_literal" in found: found["basd_literal"] = SMALL
    found["match"] = dict(losses=dict(rkd={}))
    found["pocl"] = "a callback of the trainer"
    return found


@pytest.mark.parametrize("method", [*basd.METHODS])
def test_every_method_in_a_plain_loop(method):
    student, teacher = models()
    options, teachers = options_that_a_plain_loop_serves()[method], teacher
    needs_several = method in ("amtml", "diverse")
    if needs_several: teachers = [teacher, models()[1]]
    if isinstance(options, str):
        with pytest.raises(ValueError, match=options): basd.create_task(method, student, teachers)
        return
    task = basd.create_task(method, student, teachers, **options)
    optimizer, (x, y), before = torch.optim.SGD(task.parameters(), lr=.01), batch(), copy.deepcopy(student.model.state_dict())
    for step in range(2):
        out = task(x, y, step=step, total_steps=2)
        assert_close(out["loss"], sum(out["losses"].values()))
        assert out["output"].shape == (8, 10)
        out["loss"].backward()
        optimizer.step(); optimizer.zero_grad(); task.after_update()
    assert task.student.model is student.model and not any(p.requires_grad for p in teacher.parameters())
    assert any((v != before[k]).any() for k, v in student.model.state_dict().items())


def one_step(folder):
    "The gradients of a task under DDP, on this rank's share of the batch"
    student, teacher = models()
    task = basd.create_task("basd", student, teacher, precision="float32", **SMALL).double()
    model = DistributedDataParallel(task) if world_size() > 1 else task
    x, y = batch()
    x, y = x[rank()::world_size()].double(), y[rank()::world_size()]
    out = model(x, y, **AT)
    out["loss"].backward()
    return {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


def test_two_ranks_equal_one(tmp_path):
    one, two = (on_ranks(one_step, tmp_path, ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert one.keys() == two.keys() and len(one) > 20
    for k in one: assert_close(two[k], one[k], rtol=1e-6, atol=1e-9, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("how", ["task", "torch"])
def test_compiled(how):
    "`task.compile()` compiles student, teacher and method, `torch.compile(task)` leaves all as it is; the loss and gradients are equal"
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    plain = basd.create_task("basd", *models(), **SMALL)
    other = copy.deepcopy(plain)
    quick = other.compile(backend=backend) if how == "task" else torch.compile(other, backend=backend)
    (x, y), grads = batch(), []
    for task, model in ((plain, plain), (quick, other)):
        out = task(x, y, **AT)
        out["loss"].backward()
        grads.append([out["loss"], *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*grads, strict=True): assert_close(a, b, rtol=1e-4, atol=1e-6)
    whole = Version(torch.__version__) >= Version("2.14")      # torch 2.8 breaks them into more; equal results all the same
    assert len(graphs) == 0 if how == "torch" else len(graphs) == 2 if whole else len(graphs) >= 2


def test_state_is_that_of_student_and_method():
    "A task resumes from its state dictionary; the teacher is not in it, stays in evaluation mode and moves with the task"
    (student, teacher), (x, y) = models(), batch()
    task = basd.create_task("basd", student, teacher, **SMALL)
    assert not any("teacher" in k for k in task.state_dict())
    task.train(); assert not task.teacher.training
    task.double(); assert next(task.teacher.parameters()).dtype == torch.float64
    task.float()
    task(x, y, **AT)["loss"].backward(); task.after_update()
    again = basd.create_task("basd", *models(), seed=5, **SMALL)
    again.load_state_dict(task.state_dict())
    assert_close(again(x, y, **AT)["loss"], copy.deepcopy(task)(x, y, **AT)["loss"])
    assert {f"student.model.{n}" for n in student.model.no_weight_decay()} <= task.no_weight_decay()


@pytest.mark.parametrize("name, more", [("basd", dict(losses=dict(cka={}))), pytest.param("basd_fourier", {}, marks=pytest.mark.slow)])
def test_a_task_goes_to_another_process(name, more, tmp_path):
    "A task that is pickled here and read by a fresh interpreter outputs the same loss there"
    task, (x, y) = basd.create_task(name, *models(), **more).eval(), batch()
    (tmp_path/"task.pkl").write_bytes(pickle.dumps((task, x, y, AT)))
    code = ("import pickle, sys\nwith open(sys.argv[1], 'rb') as f: task, x, y, at = pickle.load(f)\n"
            "print(task(x, y, **at)['loss'].item())")
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path/"task.pkl")], capture_output=True, text=True, check=True)
    assert float(there.stdout) == pytest.approx(task(x, y, **AT)["loss"].item(), rel=1e-6)


def test_one_hot_labels_and_resized_teacher():
    (student, teacher), (x, y) = models(), batch()
    ce = basd.create_task("distill", student, teacher, alpha=.5).eval()
    with torch.no_grad():
        a, b, c = (ce(x, t, view, **AT)["loss"] for t, view in
                   ((y, None), (F.one_hot(y, 10).float(), None),
                    (y, F.interpolate(x, (24, 24), mode="bicubic", antialias=True).clamp(0, 1))))
    assert_close(a, b); assert_close(a, c)


TINY_RUN = dict(data=dict(train_size=96, val_size=64, batch_size=32, workers=0), views=dict(crop_scale=(.5, 1.)),
                student=dict(depth=2), train=dict(epochs=1, warmup_epochs=0, log_every=1))


def test_recipes_from_python(tmp_path):
    "Changes as texts and as sections are the same; a run has its directory and is evaluated there"
    given = basd.load_recipe("digits/rkd", "train.epochs=1", ["data.workers=0"])
    assert isinstance(given["rkd"], basd.Recipe) and (given["rkd"].train.epochs, given["rkd"].data.workers) == (1, 0)
    found = basd.train("digits", "stages.ce=null", "stages.basd=null", run_dir=tmp_path/"run", bars=False, **TINY_RUN)
    run = found["teacher"]["run"]
    assert run == str(tmp_path/"run"/"teacher") and basd.load_recipe(f"{run}/recipe.yaml")[""].views.crop_scale == (.5, 1.)
    judged = basd.evaluate(run)
    assert abs(judged["best"]["top1"] - found["teacher"]["test"]["best"]["top1"]) < 1e-4
    with pytest.raises(ValueError, match="unknown key train.epoch "): basd.train("digits", train=dict(epoch=3))


def test_compare_from_python(tmp_path):
    "A list of recipes under one budget; rows, one per entry"
    words = ["data.train_size=96", "data.val_size=64", "data.batch_size=32", "data.workers=0",
             "train.epochs=1", "train.warmup_epochs=0"]
    found = basd.compare(["kd", "digits/rkd"], seeds=1, overrides=words, folder=tmp_path/"race")
    assert [r["name"] for r in found["rows"]] == ["ce", "kd", "rkd"] and not any(r["failed"] for r in found["rows"])
