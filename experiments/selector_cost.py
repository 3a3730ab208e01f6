"""Time of a BASD step with each selector, relative to one with the uniform layer map.

    python experiments/selector_cost.py [--rounds 15]

The frame of early_stop.py: a ViT-Tiny teacher of 12 blocks at 96 pixels, every second of which is tapped, a student of
four blocks at 32 pixels, 64 images per step, late in a run: selectors that choose once have chosen, and those that move
have arrived. All entries take turns in one process of one thread, and it is the time of the processor that counts, which a
busy machine disturbs little; reported are quartiles of the ratios of a round, with the teacher's pass and with its outputs
from a cache. Weights are random and images are noise. Written to experiments/results/selector_cost.json, after each round
anew.
"""
import argparse
import json
from pathlib import Path

import torch

from basd.benchmark.step_cost import StepCost
from basd.core.registry import SELECTORS
from basd.runs.recipes import build_recipe
from early_stop import quartiles, seconds, write

RESULTS = Path(__file__).parent/"results"/"selector_cost.json"


def bench(selector, cached):
    "BASD with a selector, or with the uniform map for None"
    method = dict(layer_map="uniform") if selector is None else dict(selector=dict(name=selector))
    made = StepCost(build_recipe(dict(
        data=dict(batch_size=64),
        student=dict(model="deit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, width=96, heads=3),
        teacher=dict(model="vit_tiny_patch16_224", untrained=True, img_size=96),
        method=dict(name="basd", student_layers=[0, 1, 2, 3], teacher_layers=[1, 3, 5, 7, 9, 11],
                    distill_weight=.3) | method)), cached=cached)
    made.trainer.step = made.trainer.data.total*19//20
    made.steady()
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    benches = {how: {n: bench(n, how == "cached") for n in (None, *SELECTORS)} for how in ("full", "cached")}
    ratios = {how: {n: [] for n in SELECTORS} for how in benches}
    for i in range(args.rounds + 1):        # the first warms up
        for how,of in benches.items():
            plain = seconds(of[None].full)
            for n in SELECTORS: ratios[how][n].append(seconds(of[n].full)/plain)
        if i > 1: write(RESULTS, dict(rounds=i) | {how: quartiles(of) for how,of in ratios.items()})
    found = json.loads(RESULTS.read_text())
    for how in benches: print(how, {n: v["ratio"] for n,v in found[how].items()})


if __name__ == "__main__": main()
