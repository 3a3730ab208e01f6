"""Does the quickstart keep its promise? Five seeds, on one thread and on two.

    python experiments/quickstart.py [--seeds 0 1 2 3 4] [--threads 1 2] [--jobs 2] [--runs runs/quickstart]

Part `run` of a seed is the quickstart as it is (teacher, labels alone, BASD); part `uniform` is BASD with the uniform
layer map by the same teacher. Goes on where it was interrupted, and writes experiments/results/quickstart.json after each
part: test top-1 in %, wall seconds of the stages and processor seconds of the part, by the commit that trained it.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from basd.training.recipe_files import read_recipe

ROOT = Path(__file__).parents[1]
OUT = ROOT/"experiments"/"results"/"quickstart.json"
PARTS = ["run", "uniform"]
STAGES = dict(teacher="run/teacher", ce="run/ce", basd="run/basd", uniform="uniform/basd")
UNIFORM = ["stages.ce=null", "stages.teacher=null", "stages.basd.method.rule=uniform", "stages.basd.method.selector=null"]


def place(runs, seed, threads): return runs/f"seed_{seed}_threads_{threads}"


def one(runs, part, seed, threads):
    "Train one part of one seed, in this process"
    import torch
    from basd.training.cli import train
    torch.set_num_threads(threads)
    folder = place(runs, seed, threads)
    words = [*UNIFORM, f"stages.basd.teacher.run={folder/'run'/'teacher'}"] if part == "uniform" else []
    train("quickstart", f"train.seed={seed}", *words, run_dir=str(folder/part), resume=(folder/part).is_dir(), bars=False)
    if not all((folder/p/"result.json").is_file() for p in STAGES.values() if p.startswith(part)): sys.exit("stopped")
    (folder/f"{part}.json").write_text(json.dumps(dict(cpu_seconds=sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))))


def child(runs, part, seed, threads):
    "The same in a process of its own, unless it has been done"
    folder = place(runs, seed, threads)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder/f"{part}.json").is_file(): return
    with open(folder/f"{part}.log", "a") as log:
        subprocess.run([sys.executable, __file__, "--runs", str(runs), "--one", part, str(seed), str(threads)], check=True,
                       env=os.environ | dict(OMP_NUM_THREADS=str(threads)), stdout=log, stderr=subprocess.STDOUT)


def row(runs, seed, threads):
    "What is there of one seed"
    folder = place(runs, seed, threads)
    read = lambda path: json.loads((folder/path).read_text())
    done = {k: p for k,p in STAGES.items() if (folder/p/"result.json").is_file()}
    if not done: return None
    made = read(f"{next(iter(done.values()))}/environment.json")
    return dict(seed=seed, threads=threads, environment={k: made[k] for k in ("git", "versions", "machine", "cpus")},
                top1={k: read(f"{p}/result.json")["test"]["best"]["top1"] for k,p in done.items()},
                seconds={k: read(f"{p}/result.json")["seconds"] for k,p in done.items()},
                cpu_seconds={p: read(f"{p}.json")["cpu_seconds"] for p in PARTS if (folder/f"{p}.json").is_file()})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="runs/quickstart", type=Path)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    runs = a.runs.resolve()
    if a.one: return one(runs, a.one[0], *map(int, a.one[1:]))

    def write():
        rows = [r for t in (1, 2) for s in range(100) if (r := row(runs, s, t))]
        OUT.write_text(json.dumps(dict(recipe=read_recipe("quickstart"), runs=rows), indent=1) + "\n")
    for threads in a.threads:
        for part in PARTS:
            with ThreadPoolExecutor(a.jobs) as pool:
                for _ in pool.map(lambda s: child(runs, part, s, threads), a.seeds): write()


if __name__ == "__main__": main()
