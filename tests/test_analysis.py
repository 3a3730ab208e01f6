"Analysis of runs that are not the usual ones: without labels, with several teachers, of two models by one name"
import pytest
import torch
from conftest import TINY

from basd.analysis.compare_runs import analyze, open_run
from basd.analysis.reports import evaluate_run, summary
from basd.runs.recipes import build_recipe, load_recipe
from basd.training.build import build_trainer

SHORT = ["train.epochs=1", "train.warmup_epochs=0"]


def fitted(run, recipe, *words):
    build_trainer(load_recipe(recipe, [*TINY, *SHORT, *words])[""], run, bars=False).fit()
    return str(run)


def test_a_student_without_labels(tmp_path):
    "It has no head, though its test images have classes; a run beside it is measured all the same"
    bare = fitted(tmp_path/"bare", "basd_cifar10", "data.labels=none", "views.mix_prob=.7", "train.log_gradients=false")
    usual = fitted(tmp_path/"usual", "basd_cifar10")
    out = analyze(bare, usual, output_dir=tmp_path/"out", images=16, device="cpu")
    skipped = {m: [n for n, r in of.items() if "skipped" in r] for m, of in out.items() if m != "problems"}
    assert skipped == dict(attention=[], cka=[], hessian=["bare"], spectrum=[], mixing=[]) and not out["problems"]
    assert "no classifier head" in out["hessian"]["bare"]["skipped"]


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    student = dict(img_size=16, patch_size=4, depth=2, width=32, heads=2)
    def fit(name, seed=0, student=student, **more):
        build_trainer(build_recipe(dict(data=dict(source="digits", train_size=256, val_size=50, batch_size=32, workers=0), views=dict(flip=0.),
                                        student=student, train=dict(epochs=1, warmup_epochs=0, seed=seed)) | more), folder/name, bars=False).fit()
        return str(folder/name)
    first, second = fit("first"), fit("second", 1, student | dict(depth=3))
    return fit("run", teacher=dict(run=first, extra_teachers=[dict(run=second)]), method=dict(name="amtml"))


def test_each_teacher_is_compared(two_teachers, tmp_path):
    out = analyze(run := two_teachers, metrics=["cka"], output_dir=tmp_path, images=16, device="cpu")["cka"]
    assert {t: (len(r["layers_b"]), len(r["cka"][0])) for t, r in out.items()} == {
        "run": (2, 2), "run × teacher 1": (2, 2), "run × teacher 2": (3, 3)}
    report = evaluate_run(run, corrupted=0, device="cpu")
    agreed = [report[p]["top1"] for p in ("agreement", "agreement_2")]
    ours = open_run(run, images=10**6)
    guess = lambda model: torch.cat([model(x).logits.argmax(1) for x in ours.batches()])
    with torch.no_grad():
        student = guess(ours.student)
        for at, teacher in enumerate(ours.teachers.values()):
            assert agreed[at] == pytest.approx(100*(guess(teacher) == student).float().mean().item())
    assert "agreement with teacher 1: " in summary(report) and "agreement with teacher 2: " in summary(report)
