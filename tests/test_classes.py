"""Classes have names: a run keeps those of its training split, and whatever meets it later is numbered by them."""
import json
import os
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from basd.analysis.reports import evaluate_run, evaluate_student
from basd.cli import main
from basd.core.registry import METHODS
from basd.runs.builders import build_teacher
from basd.runs.recipes import load_recipe
from basd.runs.run_directory import read_classes

COLOURS = dict(ant=(220, 30, 30), bee=(30, 220, 30), cow=(30, 30, 220), dog=(220, 220, 30))
WORDS = ["data.train_split=Training", "data.test_split=Testing", "data.workers=0", "data.batch_size=12", "data.val_size=12",
         "views.color=none", "views.random_erasing=0", "views.mixup=0", "views.cutmix=0", "student.img_size=16",
         "student.patch_size=8", "student.depth=1", "student.width=32", "student.heads=2", "student.drop_path=0",
         "train.epochs=8", "train.lr=0.01", "train.warmup_epochs=0", "train.ema=null", "train.log_every=4"]
CE, LOGITS = ["deit_cifar", *WORDS, "method.name=ce"], ["deit_cifar", *WORDS, "method.name=distill"]


def zoo(root, per_class=16, **splits):
    "Folders of colored squares: split → {class name: color}"
    rng = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, shows in classes.items():
            (root/split/name).mkdir(parents=True)
            for i in range(per_class):
                x = np.clip(COLOURS[shows] + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype("uint8")
                Image.fromarray(x).save(root/split/name/f"{i}.png")
    return root


def called(*names, **others): return {n: n for n in names} | others


def run(capsys, *words, status=0):
    "Run the command in this process; returns stdout and stderr"
    assert main([str(w) for w in words]) == status
    return capsys.readouterr()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run on three classes, of which its tests lack the middle one"
    at = tmp_path_factory.mktemp("classes")
    zoo(at/"zoo", Training=called("ant", "bee", "cow"), Testing=called("ant", "cow"))
    assert main(["train", *CE, f"data.source={at/'zoo'}", "--run-dir", str(at/"run")]) == 0
    return at


def test_a_split_without_the_middle_class(trained):
    result = json.loads((trained/"run"/"result.json").read_text())
    assert result["val_top1"] == 100 and result["test"]["best"]["top1"] == 100              # 50 by its own numbers
    assert result["test"]["best"]["classes"] == 2
    notes = json.loads((trained/"run"/"environment.json").read_text())["made_of"]["notes"]
    assert notes == ["zoo/Testing has 2 of the 3 classes (not 'bee'); accuracy on it is measured among these"]


def test_a_run_and_its_student_name_their_classes(trained):
    assert json.loads((trained/"run"/"classes.json").read_text()) == ["ant", "bee", "cow"]
    assert json.loads((trained/"run"/"student.json").read_text())["label_names"] == ["ant", "bee", "cow"]


def test_other_images(trained, tmp_path, capsys):
    "Fewer classes in another order are matched by name; images of unknown classes have no accuracy"
    words = ["evaluate", trained/"run", "--quick", "--on"]
    printed = run(capsys, *words, zoo(tmp_path/"few", Testing=called("bee", "cow"))).out
    assert "top-1 100.00 %" in printed and "judged among their own 2 classes" in printed
    printed = run(capsys, *words, zoo(tmp_path/"renamed", Testing=called("bee", "cow", emmet="ant")))
    assert "renamed/Testing has images of class 'emmet', which is none of the 3 classes" in printed.err and "top-1" not in printed.out
    full = zoo(tmp_path/"full", Training=called("bee", "cow", emmet="ant"), Testing=called("bee", "cow", emmet="ant"))
    printed = run(capsys, "evaluate", trained/"run", "--corrupted", "0", "--on", full)
    assert "class 'emmet'" in printed.err and "k-NN: 100.00 %" in printed.out and "top-1: left out" in printed.out
    printed = run(capsys, "evaluate", trained/"run", "--corrupted", "0", "--weights", "best").out
    report = json.loads((trained/"run"/"report.json").read_text())
    assert [c["name"] for c in report["per_class"]["classes"]] == ["ant", "cow"] and report["accuracy"]["top1"] == 100
    assert "among 2 of 3 classes" in printed


def test_a_run_that_is_older_than_names(trained, tmp_path, capsys):
    "A run without class names prints a note and keeps its numbering"
    old = shutil.copytree(trained/"run", tmp_path/"old")
    (old/"classes.json").unlink()
    student = json.loads((old/"student.json").read_text())
    del student["label_names"]
    (old/"student.json").write_text(json.dumps(student))
    assert read_classes(old) is None
    printed = run(capsys, "evaluate", old, "--quick").out
    assert f"{old} was written by an earlier version, without class names" in printed and "top-1 100.00 %" in printed
    (old/"result.json").unlink()
    environment = json.loads((old/"environment.json").read_text())
    environment["data"] = dict(train="0123456789abcdef", test="0123456789abcdef")
    (old/"environment.json").write_text(json.dumps(environment))
    printed = run(capsys, "train", *CE, f"data.source={trained/'zoo'}", "--run-dir", old, "--resume").out
    assert "was written by an earlier version" in printed and "its train images are not compared" in printed
    assert read_classes(old) == ["ant", "bee", "cow"] and (old/"result.json").is_file()


def test_a_teacher_of_other_classes(trained, tmp_path, capsys):
    "Its logits are matched by class name; if it lacks one of the student's classes the run is refused"
    teacher = [f"teacher.run={trained/'run'}", "teacher.model=null"]
    two = zoo(tmp_path/"two", Training=called("cow", "ant"), Testing=called("cow", "ant"))
    run(capsys, "train", *LOGITS, *teacher, f"data.source={two}", "train.epochs=1", "--run-dir", tmp_path/"two-run")
    last = [json.loads(line) for line in (tmp_path/"two-run"/"metrics.jsonl").read_text().splitlines()]
    assert any("agreement" in row for row in last)
    more = zoo(tmp_path/"more", Training=called("cow", "dog"), Testing=called("cow", "dog"))
    printed = run(capsys, "train", *LOGITS, *teacher, f"data.source={more}", "--run-dir", tmp_path/"no", status=2).err
    assert "has no class 'dog' (3 classes: 'ant', 'bee', 'cow')" in printed and not (tmp_path/"no").exists()


def test_notes_before_the_first_step(tmp_path, capsys):
    "Equal splits, classes without images, the order of numbers"
    root = zoo(tmp_path/"zoo", 4, Training={str(i): "ant" if i % 2 else "cow" for i in range(12)})
    (root/"Training"/"12").mkdir()
    printed = run(capsys, "train", *CE, f"data.source={root}", "data.test_split=Training", "train.epochs=1", "--run-dir",
               tmp_path/"run").out
    assert "test and training images are the same, so test accuracy is measured on training images" in printed
    assert "1 of the 13 classes of zoo/Training has no images, '12' for one" in printed
    assert read_classes(tmp_path/"run") == [*map(str, range(13))]
    shutil.copytree(root/"Training", root/"Testing")                                    # a copy is as equal as a name
    assert "test and training images are the same" in run(
        capsys, "train", *CE, f"data.source={root}", "train.epochs=1", "--run-dir", tmp_path/"copy").out


def test_tests_that_are_among_the_training_images(tmp_path, capsys):
    root = zoo(tmp_path/"zoo", 12, Training=called("ant", "bee"))
    shutil.copytree(root/"Training", root/"Testing")
    for i in range(8): (root/"Testing"/"ant"/f"{i}.png").unlink()
    printed = run(capsys, "train", *CE, f"data.source={root}", "train.epochs=1", "--run-dir", tmp_path/"run").out
    assert "16 of the 16 test images are among the training images" in printed


def named_teacher(classes, method="distill", **section):
    "The teacher of a run on images of these classes, by the names that come with its weights"
    recipe = load_recipe("deit_cifar", [*WORDS, "method.name=distill"])[""]
    recipe.teacher = replace(recipe.teacher, **section)
    return build_teacher(recipe, replace(METHODS.get("distill").requires(recipe.method.options), logits=method == "distill"), classes)


def test_weights_that_come_with_names(trained, tmp_path, capsys):
    "An exported student, from its folder or its file, teaches by the names of its classes as its run does"
    run(capsys, "export", trained/"run", "--to", tmp_path/"out")
    for origin in (dict(model=f"local-dir:{tmp_path/'out'}", pretrained=True),
                   dict(model="deit_tiny_patch16_224", checkpoint=str(trained/"run"/"student.safetensors"), img_size=16,
                        kwargs=dict(patch_size=8, depth=1, embed_dim=32, num_heads=2, num_classes=3))):
        assert named_teacher(["cow", "ant"], **origin).columns.tolist() == [2, 0]
        assert named_teacher(["ant", "bee", "cow"], **origin).columns is None
        with pytest.raises(ValueError, match="has no class 'dog'"): named_teacher(["ant", "dog"], **origin)
        assert named_teacher(["cow", "ant"], method="ce", **origin).columns.tolist() == [2, 0]      # as a report compares it
        capsys.readouterr()
        assert named_teacher(["ant", "bee", "Cow"], **origin).columns is None                # one is spelled otherwise
        assert named_teacher(["n01", "n02", "n03"], **origin).columns is None                # another vocabulary, as ImageNet's numbers
        assert "its logits are taken in the student's order" in capsys.readouterr().out


def test_a_folder_without_splits_is_tested_whole(trained, tmp_path, capsys):
    "A fifth of it was, without a word"
    whole = zoo(tmp_path, **{".": called("ant", "bee", "cow")}, per_class=10)
    assert "(30 images)" in run(capsys, "evaluate", trained/"run", "--quick", "--on", whole).out
    report = evaluate_run(str(trained/"run"), on=whole, corrupted=0, device="cpu")           # a path, not a text
    seen = shutil.copytree(trained/"zoo"/"Training", tmp_path/"seen")
    with pytest.warns(UserWarning, match="48 of the 48 images of seen/ are among the training images"): evaluate_student(str(trained/"run"), on=seen, device="cpu")
    assert report["accuracy"]["n"] == 30 and report["knn"]["train_n"] == 36 and report["images"] == str(whole)


def test_other_images_by_the_same_name(trained, tmp_path, capsys):
    "The images of a run are compared with those of its test"
    copy = shutil.copytree(trained, tmp_path/"copy")
    edit = (copy/"run"/"recipe.yaml").read_text().replace(str(trained/"zoo"), str(zoo(tmp_path/"zoo", Training=called("ant", "bee", "cow"), Testing=called("ant", "bee"))))
    (copy/"run"/"recipe.yaml").write_text(edit)
    with pytest.warns(UserWarning, match="are not those of"): evaluate_student(str(copy/"run"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_student(str(trained/"run"), device="cpu")


def test_dollars_and_bytes(tmp_path, capsys):
    "Names are drawn as they are; a name that is no text is refused before a step is made"
    zoo(tmp_path/"money", Training={"$1-$5": "ant", "$5_$10": "bee"}, Testing={"$1-$5": "ant", "$5_$10": "bee"})
    run(capsys, "train", *CE, f"data.source={tmp_path/'money'}", "train.epochs=1", "--run-dir", tmp_path/"run")
    run(capsys, "evaluate", tmp_path/"run", "--corrupted", "0")
    try: os.rename(os.fsencode(tmp_path/"money"/"Training"/"$1-$5"), os.fsencode(tmp_path/"money"/"Training")+b"/caf\xe9")
    except OSError: pytest.skip("the file system takes no such name")
    assert "is no UTF-8" in run(capsys, "train", *CE, f"data.source={tmp_path/'money'}", "--run-dir", tmp_path/"other", status=2).err


def test_a_recipe_that_was_edited_in_its_run(trained, tmp_path, capsys):
    "It was compared with itself"
    copy = shutil.copytree(trained/"run", tmp_path/"run")
    text = (copy/"recipe.yaml").read_text()
    (copy/"recipe.yaml").write_text(text.replace("  epochs: 8\n", "  epochs: 9\n"))
    assert "was changed since the run began: train.epochs: 8, 9" in run(capsys, "resume", copy, status=2).err
    (copy/"recipe.yaml").write_text(text.replace("  workers: 0\n", "  workers: 1\n"))            # may change
    run(capsys, "resume", copy)
    (copy/"recipe.yaml").write_text(text.replace("  run: null\n", "  run: moved\n"))                # a teacher elsewhere: not refused for that
    run(capsys, "resume", copy)


def test_a_folder_with_tests_alone(trained, tmp_path):
    "Its images are judged by neighbors among the run's training images; where their classes are others, among each other"
    zoo(tmp_path/"known", Testing=called("ant", "cow"))
    report = evaluate_run(str(trained/"run"), on=str(tmp_path/"known"), corrupted=0, device="cpu")
    assert report["accuracy"]["top1"] == 100 and report["knn"]["top1"] > 90 and report["knn"]["train_n"] == 24 and "top1" in report["linear_probe"]
    zoo(tmp_path/"other", Testing=called("ant", emu="dog"))
    report = evaluate_run(str(trained/"run"), on=str(tmp_path/"other"), corrupted=0, device="cpu")
    assert report["knn"]["train_n"] == 31 and report["knn"]["top1"] > 90 and "labeled training images" in report["linear_probe"]["skipped"]
