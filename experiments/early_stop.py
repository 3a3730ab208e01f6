"""Time saved by a teacher that stops early: its forward pass and BASD's step at each depth, relative to the whole teacher.

    python experiments/early_stop.py [--rounds 15]

The frame of race.py for two cores: a ViT-Tiny teacher of 12 blocks at 96 pixels and a student of four blocks at 32 pixels, 64
images per step. A fixed map spreads the four student layers over the first n teacher layers. All depths take turns in one process of
one thread, and it is the time of the processor that counts, which a busy machine disturbs little; reported are medians of
the ratios of a round. Weights are random and images are noise. Written to experiments/results/early_stop.json, after each
round anew.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from basd.core.files import write_atomic
from basd.geometry.layer_maps import layer_map
from basd.benchmark.step_cost import StepCost
from basd.runs.run_directory import environment
from basd.runs.recipes import build_recipe

RESULTS = Path(__file__).parent/"results"/"early_stop.json"
DEPTHS = 1, 3, 6, 9, 12
STEPS = 1, 6                                # depths at which whole steps are timed, too


def bench(depth):
    "BASD with a fixed map that spreads four student layers over the first `depth` teacher layers"
    rule = [list(p) for p in layer_map("uniform", 4, depth)]
    return StepCost(build_recipe(dict(
        data=dict(batch_size=64),
        student=dict(model="deit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, width=96, heads=3),
        teacher=dict(model="vit_tiny_patch16_224", untrained=True, img_size=96),
        method=dict(name="basd", student_layers=[0, 1, 2, 3], layer_map=rule, distill_weight=.3))))


def seconds(f):
    "Processor time of one call"
    start = time.process_time(); f()
    return time.process_time() - start


def quartiles(ratios):
    "Name → median and quartiles of the ratios of all rounds but the first"
    return {n: dict(zip(("low", "ratio", "high"), (round(q, 4) for q in statistics.quantiles(x[1:], n=4)))) for n,x in ratios.items()}


def write(path, found):
    "Write what has been measured so far, with its date and environment"
    found = found | dict(date=time.strftime("%Y-%m-%d"), environment=environment())
    write_atomic(path, lambda p: p.write_text(json.dumps(found, indent=1) + "\n"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    benches = {n: bench(n) for n in STEPS}
    for n,b in benches.items(): b.steady(); assert b.task.method.teacher_depth() == n
    one, teacher, steps = benches[1], {n: [] for n in DEPTHS}, {n: [] for n in STEPS}
    for i in range(args.rounds + 1):        # the first warms up
        whole = seconds(one.run_teacher)
        for n in DEPTHS: teacher[n].append(seconds(lambda n=n: one.run_teacher(n))/whole)
        for n,b in benches.items():
            b.whole = True
            before = seconds(b.full)
            b.whole = False
            steps[n].append(seconds(b.full)/before)
        if i > 1: write(RESULTS, dict(rounds=i, layers=12, teacher=quartiles(teacher), step=quartiles(steps)))
    found = json.loads(RESULTS.read_text())
    for what in ("teacher", "step"): print(what, {n: v["ratio"] for n,v in found[what].items()})


if __name__ == "__main__": main()
