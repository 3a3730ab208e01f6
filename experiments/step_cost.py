"""Cost of a BASD step relative to a step by labels alone, in the CIFAR-10 frame of race.py: with the teacher, cached, sampled.

    python experiments/step_cost.py [REPS] [default] [sampled] [sampled_more]

Images are noise and weights are random, so no data is needed. Steps of both kinds take turns in one process on one
thread; ratios are medians of pairs, with quartiles. Writes experiments/results/step_cost.json.
"""
import json
import sys
from pathlib import Path

import torch

from basd.benchmark.step_cost import StepCost, last_stage
from basd.runs.run_directory import environment
from basd.runs.recipes import load_recipe
from race import RACES

# options that sample what a loss is computed from
SAMPLED = dict(
    default=[],
    sampled=["losses.rel.pairs=32", "losses.attn.rows=16", "losses.rsd.max_rows=1024", "losses.spectral.samples=16",
             "aligner.samples=16"],
    sampled_more=["losses.rel.pairs=32", "losses.attn.rows=8", "losses.rsd.max_rows=512", "losses.spectral.samples=8",
                  "aligner.samples=8", "selector.max_rows=512"])


def recipe(*options):
    "BASD in the frame, with the untuned teacher model of race.py"
    r = RACES["cifar10"]
    changes = [*r["frame"], *(f"stages.teacher.{t}" for t in r["teacher"]),
               *(s for s in r["stages"] if s.startswith("stages.basd.")), *(f"stages.basd.method.{o}" for o in options)]
    return last_stage(load_recipe("digits", changes))[1]


def cost(reps, *options):
    b = StepCost(recipe(*options))
    b.steady()
    return b.beside_labels(reps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    reps = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    out = Path(__file__).parent/"results"/"step_cost.json"
    found = json.loads(out.read_text()) if out.is_file() else {}
    for name in sys.argv[2:] or SAMPLED:
        found[name] = cost(reps, *SAMPLED[name]) | dict(options=SAMPLED[name], environment=environment())
        out.write_text(json.dumps(found, indent=1))
        print(name, {k: f"{found[name][k]['ratio']:.2f} ({found[name][k]['low']:.2f} to {found[name][k]['high']:.2f})"
                     for k in ("full", "cached")}, flush=True)
