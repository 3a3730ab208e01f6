"""A run directory is self-contained: moved with its stages it is evaluated, repeated and resumed, however its path is spelled"""
import json
import shutil

import pytest
from forks import state_of

from basd.cli import main

WORDS = ["data.train_size=96", "data.val_size=32", "data.batch_size=32", "data.workers=0", "train.epochs=2",
         "train.warmup_epochs=0", "student.depth=4", "stages.ce=null"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    run = tmp_path_factory.mktemp("original")/"runs"/"two"
    assert main(["train", "quickstart", *WORDS, "--run-dir", str(run)]) == 0
    return run


@pytest.fixture
def copy(original, tmp_path, monkeypatch):
    "A copy elsewhere; what it was copied from is out of the way"
    shutil.copytree(original, tmp_path/"else"/"where")
    original.rename(original.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path/"else"/"where"
    original.with_name("gone").rename(original)


def test_judged(copy, capsys):
    assert main(["evaluate", str(copy/"basd"), "--corrupted", "0"]) == 0
    assert "top1" in json.loads((copy/"basd"/"report.json").read_text())["agreement"]       # the teacher was found
    assert main(["analyze", str(copy/"basd"), "--metrics", "cka", "--images", "16"]) == 0
    assert "skipped" not in json.loads(open("analysis/analysis.json").read())["cka"]["basd × teacher"]
    assert main(["evaluate", str(copy)]) == 2
    assert "holds the stages teacher, basd; name one of them" in capsys.readouterr().err


def test_repeated(copy):
    "All stages from the recipe above them, and one stage from its own, which finds its teacher beside it"
    assert main(["train", "else/where/recipe.yaml", "--run-dir", "again"]) == 0
    assert main(["train", "else/where/basd/recipe.yaml", "--run-dir", "one"]) == 0
    here = copy.parent.parent
    assert state_of(here/"again"/"basd") == state_of(here/"one") == state_of(copy/"basd")


@pytest.mark.parametrize("finished", ["teacher", "nothing"])
def test_resumed(finished, copy):
    "A copy is resumed, with other workers and another name, under another spelling of its path"
    whole = state_of(copy/"basd")
    shutil.rmtree(copy/"basd")
    if finished == "nothing":
        for f in ("result.json", "last.pt", "previous.pt", "best.pt", "student.safetensors"): (copy/"teacher"/f).unlink()
        (copy/"teacher"/"metrics.jsonl").write_text("")
    assert main(["resume", "else/../else/where", "data.workers=1", "name=renamed"]) == 0
    assert state_of(copy/"basd") == whole
    assert main(["train", "quickstart", *WORDS, "--resume", "--run-dir", str(copy)]) == 0
    assert main(["train", "quickstart", *WORDS, "train.lr=1", "--resume", "--run-dir", str(copy)]) == 2


def test_read_only(copy, capsys, monkeypatch):
    "Accuracies are printed before anything is written"
    from basd.analysis import reports
    def refuse(path, *args, **kwargs): raise OSError(30, "Read-only file system", str(path))
    monkeypatch.setattr(reports, "write_atomic", refuse)
    assert main(["evaluate", str(copy/"basd"), "--quick"]) == 0
    output = capsys.readouterr()
    assert "top-1" in output.out and "read-only file system" in output.err


def test_a_first_step_that_is_refused(tmp_path, monkeypatch, capsys):
    "A run refused at its first step leaves nothing that blocks the corrected command, with stages or without"
    from basd.training.trainer import Trainer
    monkeypatch.chdir(tmp_path)
    well = Trainer.run_step
    def refuse(self, batches): raise ValueError("refused")
    for words in (["quickstart", *WORDS], ["ce.yaml"]):
        (tmp_path/"ce.yaml").write_text("data: {train_size: 64, val_size: 20, batch_size: 32, workers: 0}\n"
                                        "student: {img_size: 16, patch_size: 4, depth: 2, width: 32, heads: 2}\n"
                                        "train: {epochs: 1, warmup_epochs: 0}")
        monkeypatch.setattr(Trainer, "run_step", refuse)
        monkeypatch.setattr("basd.cli.is_user_error", lambda e: True)
        assert main(["train", *words, "--run-dir", "run"]) == 2 and "refused" in capsys.readouterr().err
        assert not (tmp_path/"run").exists()
    monkeypatch.setattr(Trainer, "run_step", well)
    assert main(["train", "ce.yaml", "--run-dir", "run"]) == 0
