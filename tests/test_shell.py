"A run from end to end by shell commands, and what a finished or failed run refuses"
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import NO_MODEL, TINY
from forks import ENVIRONMENT

from basd.core.files import fingerprint
from basd.models.students import load_student
from basd.cli import main
from basd.training.build import in_lines

def run_tiny(tmp_path, *words):
    return main(["train", "basd_cifar10", *TINY, "train.epochs=1", *words, "--run-dir", str(tmp_path/"run")])


@pytest.mark.figures
def test_a_run_from_end_to_end(tmp_path, capsys):
    "Train, evaluate, load into timm, use as a teacher; then everything that must be refused on the finished run"
    import timm
    assert run_tiny(tmp_path) == 0
    run = tmp_path/"run"
    result = json.loads((run/"result.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run/"evaluation.json").read_text())["best"] == result["test"]["best"]
    assert (run/"figures"/"run.png").stat().st_size > 10_000
    model = json.loads((run/"student.json").read_text())
    timm.create_model(model["architecture"], checkpoint_path=str(run/"student.safetensors"),
                      num_classes=model["num_classes"], **model["model_args"])
    capsys.readouterr()
    assert main(["train", "basd_cifar10", *TINY, "train.epochs=1", *NO_MODEL, f"teacher.run={run}",
                 "--run-dir", str(tmp_path/"taught")]) == 0
    lines = [l for l in capsys.readouterr().out.splitlines() if l.startswith("basd_cifar10: ")]
    made = json.loads((tmp_path/"taught"/"environment.json").read_text(encoding="utf-8"))["made_of"]
    assert lines[:4] == [f"basd_cifar10: {line}" for line in in_lines(made)] and "about" not in " ".join(lines)
    assert made["teacher"]["weights"] == f"run {run}" and made["expected_seconds"] > 0
    assert made["teacher"]["digest"] == fingerprint(load_student(run).model.state_dict())
    for words, sentence in [([], "will not be written over"), (["--resume", "train.lr=1"], "another recipe")]:
        assert run_tiny(tmp_path, *words) == 2
        assert sentence in capsys.readouterr().err
    whole = (run/"last.pt").read_bytes()
    (run/"last.pt").write_bytes(whole[:len(whole)//2])
    (run/"result.json").unlink()
    assert run_tiny(tmp_path, "--resume") == 2
    assert "last.pt" in capsys.readouterr().err


def test_non_finite_loss_is_named(tmp_path, capsys):
    assert run_tiny(tmp_path, "train.lr=1e30", "train.clip_grad=null", "train.warmup_epochs=0") == 2
    err = capsys.readouterr().err
    from basd.runs.run_directory import load_checkpoint
    from basd.training.build import replay
    found = load_checkpoint(tmp_path/"run"/"nonfinite.pt")
    assert (f"loss {found['term']!r} was not finite at step {found['step']}, first in the student's blocks." in err
            and "Traceback" not in err)
    assert all(v.isfinite().all() for v in load_checkpoint(tmp_path/"run"/"last.pt")["task"].values())
    assert {k: found[k] for k in ("term", "of", "layer")}.items() <= replay(tmp_path/"run").items()
    assert run_tiny(tmp_path, "train.lr=1e30", "train.clip_grad=null", "train.warmup_epochs=0", "--resume") == 2
    assert capsys.readouterr().err == err


def test_a_comparison_without_its_baseline_has_failed(tmp_path, capsys):
    "The table is written, and the exit status reports that its baseline is missing"
    words = ["compare", "kd", "--seeds", "1", "--folder", str(tmp_path), "--set", "data.train_size=128",
             "train.epochs=1", "train.warmup_epochs=0", "student.width=24", "student.depth=2"]
    assert main([*words, "train.clip_grad=null", "train.lr=1.0e+30", "stages.teacher.train.lr=1.0e-3"]) == 1
    assert "failed: loss 'ce' was not finite" in capsys.readouterr().out and (tmp_path/"table.md").is_file()
    assert main(words) == 2 and "run of another recipe" in capsys.readouterr().err


def test_a_terminal_without_utf8_gets_question_marks():
    "A summary of two stages has a dot that ASCII lacks; printing it must not end a finished run"
    code = "import basd.cli as c; c.dispatch = lambda args: print('accuracy a \u00b7 b'); sys.exit(c.main(['recipes']))"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout.strip()) == (0, "accuracy a ? b"), done.stderr


def test_a_rank_that_is_no_number(tmp_path, capsys, monkeypatch):
    "Whatever the launcher left in the environment: one sentence, and no run is begun"
    monkeypatch.setenv("RANK", "x")
    assert run_tiny(tmp_path) == 2 and main(["compare", "kd", "--folder", str(tmp_path/"race")]) == 2
    err = capsys.readouterr().err
    assert err.count("basd: RANK='x' in the environment should be a whole number") == 2 and "Traceback" not in err
    assert not [*tmp_path.iterdir()]


HEAVY = ("torch", "timm", "torchvision", "sklearn", "matplotlib", "scipy", "numpy", "pydantic", "fastcore")


@pytest.mark.parametrize("words, status, output", [
    (["--help"], 0, "COMMAND"), (["train", "kd", "--epochs", "3"], 2, "train.epochs=3"), (["recipes", "fitnts", "--all"], 2, "did you mean 'fitnets'?")])
def test_words_alone_import_nothing_heavy(words, status, output):
    "Help and the refusal of a misspelled word come before torch is imported; tests/test_manners.py has many more"
    code = ("import sys; sys.argv[0] = 'basd'; from basd.__main__ import start\n"
            "try: status = start()\nexcept SystemExit as e: status = e.code\n"
            f"print(*[m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    *err, heavy = done.stderr.splitlines()
    assert (done.returncode or 0, heavy) == (status, "") and output in done.stdout + " ".join(err), done


def test_changes_among_the_recipes_of_a_race(tmp_path, capsys):
    "Changes apply to all recipes; a key that one of them lacks is refused before anything is trained"
    race = ["compare", "kd", "data.train_size=128", "cka", "--seeds", "1", "--folder", str(tmp_path/"race")]
    for word, sentence in (("train.epoch=1", "did you mean 'epochs'?"), ("method.T=2", "no stage has a method with this key")):
        assert main([*race, word]) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1 and not (tmp_path/"race").exists(), err


def test_a_change_to_the_method_goes_to_the_stages_that_have_the_key(tmp_path, capsys):
    "The command names them; where none has it, nothing is trained and the error names the nearest key of each stage"
    assert main(["train", "quickstart", "method.distill_wieght=0.5", "--run-dir", str(tmp_path/"run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "teacher: ce, ce: ce, basd: basd (did you mean 'method.distill_weight'?)" in err, err
    assert not (tmp_path/"run").exists()
    assert main(["train", "quickstart", "method.distill_weight=0.5", "data.root=" + str(tmp_path/"none"), "data.source=torch/cifar10",
                 "data.download=false", "--run-dir", str(tmp_path/"run")])
    assert "method.distill_weight=0.5 goes to basd; the method of teacher, ce has no such key" in "".join(capsys.readouterr())


def test_a_recipe_of_stages_is_timed_by_its_last(tmp_path, capsys):
    assert main(["bench", "quickstart", "--reps", "1", "data.batch_size=8", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert re.search(r"stage +basd\n", capsys.readouterr().out)
    assert json.loads((tmp_path/"bench.json").read_text())["stage"] == "basd"
