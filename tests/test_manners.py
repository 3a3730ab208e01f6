"The command answers help and wrong words at once: nothing heavy is imported, and what was probably meant is named"
import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import yaml
from forks import ENVIRONMENT

from basd.cli import keys_text, main

# what is typed → what the answer names
WRONG = {
    "trian quickstart": "did you mean 'train'?", "fit kd": "did you mean 'train'?", "eval runs/x": "did you mean 'evaluate'?",
    "comapre kd rkd": "did you mean 'compare'?", "list": "did you mean 'recipes'?", "version": "did you mean '--version'?",
    "--verison": "did you mean '--version'?", "kd train.epochs=3": "did you mean 'basd train kd train.epochs=3'?",
    "train": "as in basd train quickstart", "train epochs=3": "as in basd train quickstart epochs=3",
    "compare train.epochs=3": "as in basd compare quickstart train.epochs=3",
    "train distill data.source=photos": "did you mean 'unlabeled'?", "train unlabelled": "did you mean 'unlabeled'?",
    "train " + "x"*300: "unknown recipe", "train kd about=" + "x"*300 + " train.epoch=3": "did you mean 'epochs'?",
    "train kd --on cifra10": "did you mean 'cifar10'?", "train kd@cifra10": "did you mean 'cifar10'?",
    "train kd --on cifar10 --epochs 3": "did you mean 'train.epochs=3'?", "train quikstart": "did you mean 'quickstart'?", "train hinton": "it is now 'kd'", "train KD": "did you mean 'kd'?",
    "train quikstart.yaml": "did you mean 'quickstart'?", "compare kd rdk": "did you mean 'rkd'?", "bench basd_cifar01": "did you mean 'basd_cifar10'?",
    "train kd rkd": "basd compare kd rkd", "train kd --epochs 3": "did you mean 'train.epochs=3'?",
    "train kd --lr=0.1": "did you mean 'train.lr=0.1'?", "train kd --batch-size 64": "did you mean 'data.batch_size=64'?",
    "train kd --learning-rate 0.1": "did you mean 'train.lr=0.1'?", "train kd --wd 0.05": "did you mean 'train.weight_decay=0.05'?",
    "train kd --temperature 4": "did you mean 'method.T=4'?", "train kd --clip 1": "did you mean 'train.clip_grad=1'?",
    "train kd --train.epochs 3": "did you mean 'train.epochs=3'?", "train kd --output-dir out": "did you mean '--run-dir out'?",
    "train kd --dry-run": "did you mean '--print'?", "train kd --res": "did you mean '--resume'?",
    "compare kd --seed 3": "did you mean '--seeds 3' or 'train.seed=3'?", "evaluate . --weight best": "did you mean '--weights best'?",
    "train kd train.epochs 3": "as in train.epochs=3", "train kd train.epoch=3": "did you mean 'epochs'?",
    "train kd epochs=3": "did you mean 'train.epochs'?", "train kd data.lr=0.1": "did you mean 'train.lr'?",
    "train kd views.crop=centre": "did you mean 'center'?", "train kd train.clip=1": "it is now 'clip_grad'",
    "train kd method.t=4": "did you mean 'method.T'?", "train kd stages.teachr.train.lr=1": "did you mean 'teacher'?",
    "train basd_cifar10 method.name=bsad": "did you mean 'basd'?", "train basd_cifar10 method.losses.rds={}": "did you mean 'rsd'?",
    "train basd_cifar10 method.selector.name=neerest": "did you mean 'nearest'?", "train kd --device gpu": "choose cpu, cuda or mps",
    "evaluate runs/kd-2": "did you mean 'runs/kd-1'?", "train runs/kd-1": "basd resume runs/kd-1", "runs/kd-1": "basd resume runs/kd-1",
    "resume runs/kd-1 train.epoch=3": "did you mean 'epochs'?", "evaluate runs/kd-1 --weights bset": "did you mean 'best'?",
    "analyze runs/kd-1 --metrics atention": "did you mean 'attention'?", "keys trian": "did you mean 'train'?", "keys train.epoch": "did you mean 'train.epochs'?", "recipes quikstart": "did you mean 'quickstart'?"}
RIGHT = ["--help", "--version", *(f"{c} --help" for c in ("train", "resume", "evaluate", "analyze", "export", "compare", "bench", "keys",
                                                          "completion", "recipes")),
         "keys", "keys basd", "keys train.lr", "keys --json-schema", "recipes", "recipes kd"]
HEAVY = ("torch", "timm", "torchvision", "sklearn", "matplotlib", "scipy", "numpy", "pydantic", "fastcore")

TYPED = """
import contextlib, io, json, sys, time
class Heavy:
    def find_spec(self, name, *rest):
        if name.partition('.')[0] in HEAVY: raise RuntimeError(f'{name} is imported')
sys.meta_path.insert(0, Heavy())
from basd.cli import main
for words in json.load(sys.stdin):
    out, begun = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try: status = main(words.split())
        except SystemExit as e: status = e.code or 0
        except RuntimeError as e: status = str(e)
    print(json.dumps([words, status, out.getvalue(), time.process_time() - begun]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "Words → exit status, output, seconds of processor time; in one process, in which nothing heavy can be imported"
    here = tmp_path_factory.mktemp("here")
    (here/"runs"/"kd-1").mkdir(parents=True)
    (here/"runs"/"kd-1"/"recipe.yaml").write_text("name: kd")
    done = subprocess.run([sys.executable, "-c", f"HEAVY = {HEAVY}" + TYPED], input=json.dumps([*WRONG, *RIGHT]), capture_output=True,
                          text=True, env={**os.environ, **ENVIRONMENT}, cwd=here)
    assert done.returncode == 0, done.stderr
    return {words: rest for words, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_is_answered_with_the_right_one(words, answers):
    status, output, seconds = answers[words]
    assert status == 2 and output.startswith("basd: ") and output.count("\n") == 1 and WRONG[words] in output, (status, output)
    assert len(output) < 500 and seconds < 1, (len(output), seconds)


@pytest.mark.parametrize("words", RIGHT)
def test_help_needs_nothing_heavy(words, answers):
    status, output, seconds = answers[words]
    assert status == 0 and output.strip() and seconds < 1, (status, output[-300:], seconds)


def test_every_command_is_in_the_list(answers):
    from basd.cli import parser
    assert set(parser().commands) == {w.split()[0] for w in RIGHT if w.endswith("--help") and " " in w}
    assert all(c in answers["--help"][1] for c in parser().commands)


def test_lines_of_keys_and_recipes_are_at_most_100_characters(answers):
    for words in ("keys", "keys basd", "keys train.lr", "recipes"): assert max(map(len, answers[words][1].splitlines())) <= 100
    assert "largest learning rate" in answers["keys train.lr"][1] and "(default 0.001)" in keys_text("train.lr")


def test_the_resolved_recipe_is_printed_and_nothing_written(tmp_path, monkeypatch, capsys):
    "`--print` shows what would run, overrides of stages included; read back it is the same recipe"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "kd", "train.epochs=3", "stages.teacher.train.epochs=5", "method.T=2", "--print"]) == 0
    out = capsys.readouterr().out
    stages = yaml.safe_load(out)["stages"]
    assert [s["train"]["epochs"] for s in stages.values()] == [5, 3] and stages["kd"]["method"]["T"] == 2
    assert stages["teacher"]["train"]["lr"] > 0 and not [*tmp_path.iterdir()]
    (tmp_path/"again.yaml").write_text(out)
    assert main(["train", "again.yaml", "--print"]) == 0 and yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(out) | {"name": "kd"}
    assert main(["train", "kd", "stages.teacher=null", "--print"]) == 2 and "earlier stage" in capsys.readouterr().err


def test_shells_complete_recipes_keys_and_options(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path/"c.bash").write_text(capsys.readouterr().out)
    for words, found in {"basd tr": "train", "basd train quick": "quickstart", "basd train kd train.ep": "train.epochs=",
                         "basd train kd --run": "--run-dir", "basd keys selector.ra": "selector.ramp"}.items():
        code = f". {tmp_path}/c.bash; COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _shtab_basd; echo ${{COMPREPLY[*]}}"
        assert subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout.strip() == found, words
    with contextlib.redirect_stdout(io.StringIO()) as out: assert main(["completion", "zsh"]) == 0
    assert "#compdef basd" in out.getvalue()
