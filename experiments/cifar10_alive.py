"""Gather the runs of cifar10_alive.sh into experiments/results/cifar10_alive.json.

    python experiments/cifar10_alive.py OUT_FOLDER
"""
import json
import sys
from pathlib import Path

from basd.runs.run_directory import load_run_recipe
from basd.runs.metrics import read_metrics

KEEP = ("step", "loss_unweighted/", "loss_normalized/", "loss_weight/", "ramp/", "grad_norm/", "grad_ratio/", "grad_cosine", "selector/weights", "selector/distance",
        "selector/entropy", "target/", "loss", "loss/")


def rounded(x):
    if isinstance(x, dict): return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else float(f"{x:.5g}") if isinstance(x, float) else x


def gather(run):
    recipe = load_run_recipe(run)
    environment = json.loads((run/"environment.json").read_text())
    evaluation = run/"evaluation.json"
    return dict(seed=recipe.train.seed,
                steps=[{k: v for k, v in r.items() if k.startswith(KEEP)} for r in read_metrics(run, "step")],
                epochs=read_metrics(run, "epoch"), result=json.loads((run/"result.json").read_text()),
                evaluation=json.loads(evaluation.read_text()) if evaluation.is_file() else None,
                environment=environment, warmup=recipe.method.options.balance.fraction)


if __name__ == "__main__":
    out = Path(__file__).parent/"results"/"cifar10_alive.json"
    found = json.loads(out.read_text()) if out.is_file() else {}  # runs that are not in the folder stay as they were
    found |= {p.name: gather(p) for p in sorted(Path(sys.argv[1]).iterdir()) if (p/"result.json").is_file()}
    out.write_text(json.dumps(rounded(found)))
    print(out.name, {k: v["result"]["test"][v["result"]["exported"]]["top1"] for k, v in found.items()})
