"""Time of a step with each entry of race_selectors.py, relative to one with the uniform map.

    python experiments/entry_cost.py [--frames cifar10_34 digits …] [--rounds 12]

The runs of a comparison share their machine with each other and with other work, so the time of their steps says little. Here
all entries of a frame take turns in one process of one thread, and it is the time of the processor that counts; reported are
quartiles of the ratios of a round. Late in a run: selectors that choose once have chosen, and those that move have arrived.
Teacher outputs come from a cache where those of the frame do. Weights are random and images are noise. Written to
experiments/results/entry_cost.json, after each round anew.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from basd.benchmark.step_cost import StepCost
from basd.runs.recipes import build_recipe
from early_stop import quartiles, seconds, write
from race_selectors import FRAMES, entries, recipe_of

RESULTS = Path(__file__).parent/"results"/"entry_cost.json"
MEASURED = ["cifar10_34", "cifar10_34_tokens", "digits", "digits_redundant", "digits_deeper", "digits_cnn"]


def teacher_of(frame):
    "The frame's teacher with random weights"
    s = frame["base"]["student"] | frame["teacher"]["student"]
    size = dict(patch_size=s["patch_size"], depth=len(frame.get("copies", range(s["depth"] or 0))), embed_dim=s["width"], num_heads=s["heads"])
    return dict(model=s["model"], untrained=True, img_size=s["img_size"],
                kwargs={k: v for k,v in size.items() if v} | s.get("kwargs", {}) | dict(num_classes=10))


def bench(frame, entry):
    "A step of `entry` in a frame of race_selectors.py"
    recipe, _ = recipe_of(frame, entry, entries()[entry], 0, {}, None)
    if entry != "ce": recipe = replace(recipe, teacher=build_recipe(dict(teacher=teacher_of(frame))).teacher)
    made = StepCost(recipe, cached="views" in frame and entry != "ce")
    made.trainer.step = made.trainer.data.total*19//20
    made.steady()
    return made


def steps(made, count=3):
    for _ in range(count): made.full()


def measure(name, rounds, found):
    "Ratios of a frame's entries, written after each round"
    frame = FRAMES[name]
    benches = {}
    for entry in entries():
        if entry == "ce_as_long" or entry.endswith("_slow"): continue           # steps of `ce` and of the selector without `_slow`
        try: benches[entry] = bench(frame, entry)
        except ValueError as e: print(f"{name}: {entry} left out, {e}", flush=True)
    uniform, ratios = benches.pop("uniform"), {n: [] for n in benches}
    for i in range(rounds + 1):             # the first warms up
        plain = seconds(lambda: steps(uniform))
        for n,b in benches.items(): ratios[n].append(seconds(lambda b=b: steps(b))/plain)
        if i > 1: write(RESULTS, found | {name: quartiles(ratios) | dict(rounds=i)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.frames:
        measure(name, args.rounds, {k: v for k,v in json.loads(RESULTS.read_text()).items() if k in FRAMES} if RESULTS.is_file() else {})
        print(name, {n: v["ratio"] for n,v in json.loads(RESULTS.read_text())[name].items() if n != "rounds"}, flush=True)
