"""The quickstart over three seeds: experiments/results/quickstart_seeds.json.

    python experiments/quickstart_seeds.py [OUT_FOLDER]      # resumes where it was interrupted
"""
import json
import sys
from pathlib import Path

from basd.training.cli import train

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds")
    rows = []
    for seed in range(3):
        run = folder/str(seed)
        results = train("quickstart", f"train.seed={seed}", run_dir=str(run), resume=run.exists(), bars=False)
        rows.append(dict(seed=seed) | {k: dict(top1=r["test"][r["headline"]]["top1"], seconds=r["seconds"]) for k, r in results.items()})
        environment = json.loads((run/"basd"/"environment.json").read_text())
        out = dict(rows=rows, headline="best", environment=environment)
        (Path(__file__).parent/"results"/"quickstart_seeds.json").write_text(json.dumps(out, indent=1))
    print(*rows, sep="\n")
