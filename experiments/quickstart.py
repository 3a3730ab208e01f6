"""Does the quickstart keep its promise? Five seeds, on one thread and on two.

    python experiments/quickstart.py [RUNS] [--seeds 5] [--threads 1] [--jobs 2]

A job is one seed on a number of threads: the quickstart as it is (teacher, labels alone, BASD), then BASD with the
uniform layer map by the same teacher. Writes experiments/results/quickstart.json after each seed and goes on where it
was interrupted.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[1]
OUT = ROOT/"experiments"/"results"/"quickstart.json"
UNIFORM = ["stages.ce=null", "stages.teacher=null", "stages.basd.method.rule=uniform", "stages.basd.method.selector=null"]


def one(seed, threads, folder):
    "Train all of one seed; accuracies in % on the test images, and seconds"
    import torch
    from basd.training.checkpoints import environment
    from basd.training.cli import train
    torch.set_num_threads(threads)
    read = lambda run: json.loads((folder/run/"result.json").read_text())
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    train("quickstart", f"train.seed={seed}", run_dir=str(folder/"run"), bars=False)
    cpu = spent()
    train("quickstart", f"train.seed={seed}", *UNIFORM, f"stages.basd.teacher.run={folder/'run'/'teacher'}",
          run_dir=str(folder/"uniform"), bars=False)
    runs = dict(teacher="run/teacher", ce="run/ce", basd="run/basd", uniform="uniform/basd")
    return dict(seed=seed, threads=threads, cpu_seconds=cpu, environment=environment(),
                top1={k: read(r)["test"]["best"]["top1"] for k, r in runs.items()},
                seconds={k: read(r)["seconds"] for k, r in runs.items()})


def job(seed, threads, folder):
    "One seed in a process of its own"
    where = folder/f"seed_{seed}_threads_{threads}"
    where.mkdir(parents=True, exist_ok=True)
    done = where/"outcome.json"
    if not done.is_file():
        env = os.environ | dict(OMP_NUM_THREADS=str(threads))
        subprocess.run([sys.executable, __file__, str(where), "--one", str(seed), str(threads)], env=env, check=True,
                       stdout=open(where/"log", "w"), stderr=subprocess.STDOUT)
    return json.loads(done.read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="?", default="runs/quickstart", type=Path)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        (a.runs/"outcome.json").write_text(json.dumps(one(*a.one, a.runs)))
        return
    lock = Lock()

    def noted(seed):
        row = job(seed, a.threads, a.runs.resolve())
        with lock:
            rows = json.loads(OUT.read_text())["runs"] if OUT.is_file() else []
            rows = [r for r in rows if (r["seed"], r["threads"]) != (seed, a.threads)] + [row]
            OUT.write_text(json.dumps(dict(runs=sorted(rows, key=lambda r: (r["threads"], r["seed"]))), indent=1) + "\n")
        print(seed, a.threads, row["top1"], flush=True)
    with ThreadPoolExecutor(a.jobs) as pool: list(pool.map(noted, range(a.seeds)))


if __name__ == "__main__": main()
