"Bad input ends in one sentence, exit status 2, no traceback, and nothing written over"
import json

import pytest
import torch
from conftest import TINY

from basd.training.cli import main

CASES = [
    (["train", "quikstart"], "did you mean 'quickstart'?"),
    (["train", "nowhere.yaml"], "no recipe file"),
    (["train", "basd_cifar10", "train.epoch=3"], "did you mean 'epochs'?"),
    (["train", "basd_cifar10", "train.epochs=many"], "valid integer"),
    (["train", "basd_cifar10", "train.epochs=0"], "greater than or equal to 1"),
    (["train", "basd_cifar10", "epochs"], "write key=value"),
    (["train", "basd_cifar10", "method.name=bsad"], "allowed: "),
    (["train", "basd_cifar10", "method.losses.rds={}"], "unknown key method.losses.rds"),
    (["train", "basd_cifar10", "method.losses.rsd.kapa=1"], "kapa"),
    (["train", "basd_cifar10", *TINY, "data.source=torch/cifar11"], "cifar11"),
    (["train", "basd_cifar10", *TINY, "student.model=deit_tinny_patch16_224"], "deit_tinny_patch16_224"),
    (["train", "basd_cifar10", *TINY, "teacher.model=vit_tinny"], "vit_tinny"),
    (["train", "basd_cifar10", *TINY, "teacher.checkpoint=nowhere.pth"], "nowhere.pth"),
    (["train", "basd_cifar10", *TINY, "teacher.run=nowhere"], "nowhere"),
    (["train", "basd_cifar10", *TINY, "method.points=[0, 7]"], "7"),
    (["train", "basd_cifar10", *TINY, "method.selector.rank=24"], "24"),
    (["train", "basd_cifar10", *TINY, "data.batch_size=33", "train.accumulate=2"], "multiple of 2"),
    (["train", "basd_cifar10", *TINY, "data.batch_size=4096"], "lower it"),
    (["train", "basd_cifar10", *TINY, "data.train_size=100000"], "data.train_size"),
    (["train", "quickstart", "--resume"], "--run-dir"),
    (["evaluate", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize("words, sentence", CASES, ids=lambda x: " ".join(x[-1:]) if isinstance(x, list) else "")
def test_refusals(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words] + (["--run-dir", "run"] if words[0] == "train" and "--resume" not in words else [])) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert sentence in err[-1] and err[-1].startswith("basd: ") and not any("Traceback" in line for line in err)
    assert not (tmp_path/"run"/"last.pt").exists()


def run_tiny(tmp_path, *words):
    return main(["train", "basd_cifar10", *TINY, "train.epochs=1", *words, "--run-dir", str(tmp_path/"run")])


def test_a_run_from_end_to_end(tmp_path, capsys):
    "Train, evaluate, load into timm, teach; then everything that must be refused on the finished run"
    import timm
    assert run_tiny(tmp_path) == 0
    run = tmp_path/"run"
    result = json.loads((run/"result.json").read_text())
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run/"evaluation.json").read_text())["best"] == result["test"]["best"]
    assert (run/"figures"/"run.png").stat().st_size > 10_000
    model = json.loads((run/"student.json").read_text())
    timm.create_model(model["architecture"], checkpoint_path=str(run/"student.safetensors"), num_classes=model["num_classes"], **model["model_args"])
    assert main(["train", "basd_cifar10", *TINY, "train.epochs=1", "teacher.model=null", f"teacher.run={run}", "--run-dir", str(tmp_path/"taught")]) == 0
    capsys.readouterr()
    for words, sentence in [([], "will not be written over"), (["--resume", "train.lr=1"], "another recipe")]:
        assert run_tiny(tmp_path, *words) == 2
        assert sentence in capsys.readouterr().err
    whole = (run/"last.pt").read_bytes()
    (run/"last.pt").write_bytes(whole[:len(whole)//2])
    (run/"result.json").unlink()
    assert run_tiny(tmp_path, "--resume") == 2
    assert "last.pt" in capsys.readouterr().err


def test_non_finite_loss_is_named(tmp_path, capsys):
    assert run_tiny(tmp_path, "train.lr=1e30", "train.clip=null", "train.warmup_epochs=0") == 2
    err = capsys.readouterr().err
    assert "was not finite at step" in err
    from basd.training.checkpoints import load
    weights = load(tmp_path/"run"/"last.pt")["lesson"]
    assert len(weights) > 10
