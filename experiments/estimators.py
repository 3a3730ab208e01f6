"""Accuracy of BASD with exact and with sampled losses. The recipe `digits` over three seeds: labels alone, BASD with exact
losses and with sampled ones.

    python experiments/estimators.py [RUNS]      # resumes where it was interrupted; experiments/results/estimators.json

The teacher and the student by labels alone are trained once per seed; the forms differ in nothing but the options below.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

from basd.runs.run_directory import environment
from basd.cli import train
from basd.runs.recipes import load_recipe, write_recipe

# the defaults when the results were made
FORMER = ["method.balance.u_max=2", "method.selector=null", "method.selector={name: nearest, dim: 48, rank: 8, max_rows: 1024}"]
FORMS = {
    "exact": FORMER,
    "sampled": [*FORMER, "method.selector.max_rows=256", "method.losses.rsd.max_rows=512", "method.losses.attn.rows=9",
                "method.losses.spectral.samples=16", "method.aligner.samples=16"],
}


def finished(run, recipe, *overrides):
    "Results of a run, which is trained or resumed if needed"
    if not (run/"result.json").is_file():
        train(recipe, *overrides, run_dir=str(run), resume=(run/"recipe.yaml").is_file(), bars=False)
    r = json.loads((run/"result.json").read_text())
    return dict(val=r["val_top1"], test=r["test"][r["exported"]]["top1"], seconds=r["seconds"])


if __name__ == "__main__":
    folder, rows = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/estimators"), []
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(3):
        stages = load_recipe("digits", [f"train.seed={seed}"])
        row = dict(seed=seed)
        for stage in ("teacher", "ce", "basd"):
            recipe = stages[stage]
            if recipe.teacher.run:
                recipe = replace(recipe, teacher=replace(recipe.teacher, run=str(folder/f"{seed}-teacher")))
            write_recipe(recipe, file := folder/f"{seed}-{stage}.yaml")
            if stage != "basd": row[stage] = finished(folder/f"{seed}-{stage}", str(file))
            else:
                row |= {form: finished(folder/f"{seed}-{form}", str(file), *overrides)
                        for form, overrides in FORMS.items()}
            out = dict(rows=[*rows, row], forms=FORMS, environment=environment())
            (Path(__file__).parent/"results"/"estimators.json").write_text(json.dumps(out, indent=1))
        rows.append(row)
        print(row, flush=True)
