"""Accuracy and time of the quickstart and its controls over five seeds, on one thread and on two.

    python experiments/quickstart.py [--seeds 0 1 2 3 4] [--threads 1 2] [--jobs 2] [--runs runs/quickstart] [--out FILE]

The parts of a seed are `alone` (the quickstart's labels alone), `taught` (its teacher and BASD), `uniform` (BASD with the
uniform layer map by the same teacher), `logits` (the teacher's logits alone, Hinton's) and `longer` (labels alone for as
long as BASD takes); a part is done for all seeds before the next. Goes on where it was interrupted,
and writes FILE, experiments/results/quickstart.json if none is given, after each part: test top-1 in %, wall seconds of the
stages, and processor seconds of the quickstart (the first two parts). results/quickstart_fifth.json holds two
sets of the frame that the quickstart had until December 2026.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from basd.runs.recipe_files import read_recipe

from race_selectors import processor

ROOT = Path(__file__).parents[1]
OUT = ROOT/"experiments"/"results"/"quickstart.json"
STAGES = dict(teacher="taught/teacher", ce="alone/ce", basd="taught/basd", uniform="uniform/basd", logits="logits/basd",
              longer="longer/ce")
CE, BY_TEACHER = ["stages.teacher=null", "stages.basd=null"], ["stages.ce=null", "stages.teacher=null",
                                                               "stages.basd.teacher.run={folder}/taught/teacher"]
PARTS = dict(alone=CE, taught=["stages.ce=null"],
             uniform=[*BY_TEACHER, "stages.basd.method.layer_map=uniform", "stages.basd.method.selector=null"],
             logits=[*BY_TEACHER, "stages.basd.method={{name: distill, alpha: 0.9, T: 4.0}}"],
             longer=[*CE, "train.epochs=65"])


def place(runs, seed, threads): return runs/f"seed_{seed}_threads_{threads}"


def one(runs, part, seed, threads):
    "Train one part of one seed, in this process"
    import torch
    from basd.cli import train
    torch.set_num_threads(threads)
    folder = place(runs, seed, threads)
    words = [w.format(folder=folder) for w in PARTS[part]]
    train("quickstart", f"train.seed={seed}", *words, run_dir=str(folder/part), resume=(folder/part).is_dir(), bars=False)
    if not all((folder/p/"result.json").is_file() for p in STAGES.values() if p.startswith(part)): sys.exit("stopped")
    (folder/f"{part}.json").write_text(json.dumps(dict(cpu_seconds=sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))))


def child(runs, part, seed, threads):
    "The same in a process of its own, unless its result exists"
    folder = place(runs, seed, threads)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder/f"{part}.json").is_file(): return
    with open(folder/f"{part}.log", "a") as log:
        subprocess.run([sys.executable, __file__, "--runs", str(runs), "--one", part, str(seed), str(threads)], check=True,
                       env=os.environ | dict(OMP_NUM_THREADS=str(threads)), stdout=log, stderr=subprocess.STDOUT)


def row(runs, seed, threads):
    "Results of one seed so far"
    folder = place(runs, seed, threads)
    read = lambda path: json.loads((folder/path).read_text())
    done = {k: p for k,p in STAGES.items() if (folder/p/"result.json").is_file()}
    if not done: return None
    made = read(f"{next(iter(done.values()))}/environment.json")
    commits = dict.fromkeys(read(f"{p}/environment.json")["git"]["commit"] for p in done.values())     # of parts made later, too
    return dict(seed=seed, threads=threads, commit=", ".join(commits), cpu=processor(), environment={k: made[k] for k in ("versions", "machine", "cpus")},
                top1={k: read(f"{p}/result.json")["test"]["best"]["top1"] for k,p in done.items()},
                seconds={k: read(f"{p}/result.json")["seconds"] for k,p in done.items()},
                cpu_seconds=sum(read(f"{p}.json")["cpu_seconds"] for p in ("alone", "taught"))
                            if (folder/"taught.json").is_file() else None)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="runs/quickstart", type=Path)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    p.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--out", default=OUT, type=Path)
    p.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    runs = a.runs.resolve()
    if a.one: return one(runs, a.one[0], *map(int, a.one[1:]))

    def write():
        rows = [r for t in (1, 2) for s in range(100) if (r := row(runs, s, t))]
        a.out.write_text(json.dumps(dict(recipe=read_recipe("quickstart"), runs=rows), indent=1) + "\n")
    for threads in a.threads:
        for part in PARTS:
            with ThreadPoolExecutor(a.jobs) as pool:
                for _ in pool.map(lambda s: child(runs, part, s, threads), a.seeds): write()


if __name__ == "__main__": main()
