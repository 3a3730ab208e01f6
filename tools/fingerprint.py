"""Do the numbers stay what they are? Tiny runs of every part of the engine, hashed value by value

    python tools/fingerprint.py [CASE …] > before.txt       # and again after a change: diff must print nothing
    python tools/fingerprint.py --stopped                   # each stopped after its third step and resumed: the same

Hashed are the weights of student and method, the averaged weights, the state of the optimizer, the rows of the log and
the result: numbers in their order, without names and times. So renaming a key changes nothing, and a constraint that is no longer applied does.
The processor rounds: compare on one machine, on one thread, which this script sees to.
"""
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg")

import argparse
import hashlib
import io
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

FRAME = ["data.source=digits", "data.train_size=128", "data.val_size=64", "data.batch_size=32", "data.workers=0", "views.flip=0",
         "student.img_size=16", "student.patch_size=4", "student.depth=2", "student.width=32", "student.heads=2",
         "student.drop_path=0.1", "train.epochs=2", "train.warmup_epochs=1", "train.log_every=2", "train.ema=0.9"]
MODEL = ["teacher.model=vit_tiny_patch16_224", "teacher.pretrained=false", "teacher.untrained=true", "teacher.img_size=32",
         "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3}"]
LOGITS = [*MODEL[:-1], "teacher.kwargs={patch_size: 8, depth: 3, embed_dim: 48, num_heads: 3, num_classes: 10}"]
TEACHER = ["method.student_layers=[0, 1]", *MODEL]
SMALL = ["method.selector.name=nearest", "method.selector.dim=24", "method.selector.rank=4"]
BASD = ("basd_cifar10", [*FRAME, *TEACHER, *SMALL])
STEPS = 8

plain = lambda *words: ("basd_cifar10", [*FRAME, *words])
basd = lambda *words: (BASD[0], [*BASD[1], *words])
distill = lambda *words: plain(*LOGITS, *words)
CASES = dict(
    ce=plain("method={name: ce}", "teacher.model=null"),
    basd=basd(),
    basd_accumulated_bf16=basd("train.grad_accum_steps=2", "train.precision=bf16"),
    basd_tracked=basd("method.selector.solver=tracking", "method.selector.warmup_steps=2", "method.selector.max_rows=64"),
    basd_progressive=basd("method.selector={name: progressive, dim: 24, rank: 4}"),
    basd_complementary=basd("method.selector={name: complementary, dim: 24, rank: 4, batches: 2}"),
    basd_labeled=basd("data.labeled=0.25"),
    basd_cached=basd("teacher.cache=CACHE", "teacher.cache_views=2"),
    literal=("basd_literal", [*FRAME, *TEACHER, "method.selector.dim=24", "method.selector.rank=4"]),
    kd=distill("method={name: distill, alpha: 0.5, T: 4.0}"),
    dot=distill("method={name: distill, alpha: 0.5, T: 4.0}", "train.optimizer=dot"),
    dot_accumulated=distill("method={name: distill, alpha: 0.5, T: 4.0}", "train.optimizer=dot",
                            "train.grad_accum_steps=2"),
    pocl=distill("method={name: pocl}"),
    vrm_two_views=distill("method={name: distill, loss: vrm, alpha: 0.5, two_views: true}"),
    match=distill("method={name: match, losses: {hidden_states: {weight: 1.0}}, logits: {weight: 0.5}, student_layers: [0, 1]}"),
    leap=plain(*MODEL, "method={name: match, losses: {leap: {weight: 1.0}}, student_layers: [1]}"),
    sgd=basd("train.optimizer=sgd"),
)


def digest(x, h):
    "Feed the numbers in `x` to the hash, in their order"
    if isinstance(x, torch.Tensor):
        h.update(f"{x.dtype}{tuple(x.shape)}".encode())
        if x.numel(): h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(x, dict):
        for v in x.values(): digest(v, h)
    elif isinstance(x, (list, tuple)):
        for v in x: digest(v, h)
    elif not isinstance(x, str): h.update(repr(x).encode())


def train(recipe, run, stop=None):
    "Train a run to its end, stopped and resumed after step `stop` if given"
    if stop is not None:
        half = build_trainer(recipe, run, bars=False)
        half.agreed_to_stop = lambda: half.step >= stop
        assert half.fit() is None and half.step == stop
    t = build_trainer(recipe, run, resume=stop is not None, bars=False)
    t.fit()
    return t


def average(t):
    "State of the averaged weights"
    return next(cb.state_dict() for cb in t.callbacks if type(cb).__name__ == "EMA")


def fingerprint(case, run, stop=None):
    "Hash of all numbers that a run leaves behind"
    name, words = CASES[case]
    t = train(load_recipe(name, [w.replace("CACHE", str(run/"cache")) for w in words])[""], run/"run", stop)
    assert t.step == STEPS, t.step
    h, timeless = hashlib.sha256(), lambda row: [v for k,v in row.items() if k not in ("seconds", "offset") and not k.startswith("time/")]
    for x in (t.task.state_dict(), average(t), t.optimizer.state_dict()): digest(x, h)
    digest([timeless(r) for r in read_metrics(run/"run")], h)
    digest(timeless(json.loads((run/"run"/"result.json").read_text())), h)
    return h.hexdigest()[:16]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", nargs="*", choices=[[], *CASES], help="all if left out")
    p.add_argument("--stopped", action="store_true", help="stop each run after step 3 and resume it")
    args = p.parse_args()
    torch.set_num_threads(1)
    import basd.training.callbacks as callbacks
    callbacks.plot_run = lambda run: None                             # a figure has no numbers
    for case in args.cases or CASES:
        with tempfile.TemporaryDirectory() as tmp:
            with redirect_stdout(io.StringIO()): found = fingerprint(case, Path(tmp), 3 if args.stopped else None)
        print(f"{case:24}{found}", flush=True)


if __name__ == "__main__": main()
