"""Time of a step with each entry of race_selectors.py, relative to one with the uniform map.

    python experiments/entry_cost.py [--frames cifar10_34 digits …] [--rounds 9]

The runs of a comparison share their machine with each other and with other work, so the time of their steps says little. Here
all entries of a frame take turns in one process of one thread, and it is the time of the processor that counts, which a busy
machine disturbs little; reported are quartiles of the ratios of a round. Late in a run: selectors that
choose once have chosen, and targets that move have arrived at the last layer, so that the whole teacher is run (earlier in a run
it is not). Weights are random and images are noise, so `nearest_once` is given the weights that it had in the frame's first run.
A frame whose runs read the teacher's outputs from a cache is timed twice: with the cache, and with the teacher's pass (`full`).
Written to experiments/results/entry_cost.json, after each round anew.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from basd.benchmark.selector_results import _weights_of
from basd.benchmark.step_cost import StepCost
from basd.geometry.schedule import Frontier
from basd.losses.leap import LayerLadder
from basd.runs.recipes import build_recipe
from early_stop import quartiles, seconds, write
from race_selectors import FRAMES, RESULTS as RECORDED, entries, recipe_of

RESULTS = RECORDED/"entry_cost.json"
MEASURED = ["cifar10_34", "cifar10_34_tokens", "digits", "digits_redundant", "digits_deeper", "digits_cnn"]


def teacher_of(frame):
    "The frame's teacher with random weights"
    s = frame["base"]["student"] | frame["teacher"]["student"]
    size = dict(patch_size=s["patch_size"], depth=len(frame.get("copies", range(s["depth"] or 0))), embed_dim=s["width"], num_heads=s["heads"])
    return dict(model=s["model"], untrained=True, img_size=s["img_size"],
                kwargs={k: v for k,v in size.items() if v} | s.get("kwargs", {}) | dict(num_classes=10))


def weights_in(name, entry):
    "Layer weights at the end of a frame's first run of `entry`, (P, L)"
    path = RECORDED/f"selectors_{name}.json"
    found = _weights_of(json.loads(path.read_text()), entry) if path.is_file() else []
    if not found: raise ValueError("no run has recorded its weights")
    return torch.tensor(found[-1][1])


def arrive(method):
    "Bring what moves over a run to where it is at the end"
    for part in [getattr(method, "selector", None), *getattr(method, "losses", {}).values()]:
        if isinstance(part, LayerLadder) and part.limit < 1e9: part.current.fill_(len(part.widths_t) - 1)       # not LEAP on its first target
        elif isinstance(part, Frontier): part.frontier.copy_(part.goal)
    method.refresh()


def bench(name, entry, cached):
    "A step of `entry` in a frame of race_selectors.py"
    recipe, _ = recipe_of(FRAMES[name], entry, entries()[entry], 0, {}, None)
    if entry != "ce": recipe = replace(recipe, teacher=build_recipe(dict(teacher=teacher_of(FRAMES[name]))).teacher)
    made = StepCost(recipe, cached=cached and entry != "ce")
    made.trainer.step = made.trainer.data.total*19//20
    if entry == "nearest_once":
        selector = made.task.method.selector
        selector.mean_weights.copy_(weights_in(name, entry))
        selector.seen.fill_(selector.batches)
        made.task.method.refresh()
    made.steady()
    arrive(made.task.method)
    return made


def steps(made, count=3):
    for _ in range(count): made.full()


def measure(name, rounds, found):
    "Ratios of a frame's entries, written after each round"
    ways, benches = ["cached", "full"] if "views" in FRAMES[name] else ["full"], {}
    for entry in entries():
        if entry == "ce_as_long" or entry.endswith("_slow"): continue           # steps of `ce` and of the selector without `_slow`
        try: benches[entry] = {way: bench(name, entry, way == "cached") for way in ways}
        except ValueError as e: print(f"{name}: {entry} left out, {e}", flush=True)
    uniform, ratios = benches.pop("uniform"), {way: {n: [] for n in benches} for way in ways}
    for i in range(rounds + 1):             # the first warms up
        for way in ways:
            plain = seconds(lambda: steps(uniform[way]))
            for n,b in benches.items(): ratios[way][n].append(seconds(lambda b=b[way]: steps(b))/plain)
        main, *rest = ways
        if i > 1: write(RESULTS, found | {name: quartiles(ratios[main]) | {way: quartiles(ratios[way]) for way in rest} | dict(rounds=i)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.rounds < 2: parser.error(f"--rounds {args.rounds}: quartiles need two rounds")
    torch.set_num_threads(1)
    for name in args.frames:
        measure(name, args.rounds, {k: v for k,v in json.loads(RESULTS.read_text()).items() if k in FRAMES} if RESULTS.is_file() else {})
        timed = json.loads(RESULTS.read_text())[name]
        for of in filter(None, (timed, timed.get("full"))):       # as the runs are, and, where that is from a cache, with the teacher's pass
            print(name, {n: v["ratio"] for n,v in of.items() if isinstance(v, dict) and "ratio" in v}, flush=True)
