"""Cost of waiting threads: steps with two threads on an idle machine and beside two busy processes, by how long a thread spins
before it sleeps.

GNU's OpenMP, which torch's own builds use, reads GOMP_SPINCOUNT before torch is imported; the package sets it to the number
below (`basd/__init__.py`). Settings take turns, each in a process of its own; times are medians over rounds. Needs a machine
on which nothing else runs. `--whole` trains all of the recipe
`digits` instead, idle and beside the busy processes; that recipe was the quickstart when this was measured, and its selector `nearest`.

    python experiments/threads.py [--rounds 3] [--out experiments/results/threads.json]     # about five minutes
    python experiments/threads.py --whole           # some ten minutes
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SETTINGS = {"spins long (OpenMP's default)": None, "spins 10,000 times": "10000", "spins 1,000 times": "1000",
            "sleeps at once": "0"}
OURS = "spins 10,000 times"
LARGER = ["data={source: digits, val_size: 0.15, batch_size: 64, workers: 0}", "student.img_size=32",
          "student.patch_size=4", "student.depth=6", "student.width=192", "student.heads=3"]
WORK = {                                # name → recipe, overrides, stage, steps on an idle machine
    "quickstart's teacher": ("digits", [], "teacher", 20),
    "quickstart's teacher, bf16": ("digits", ["train.precision=bf16"], "teacher", 20),
    "a DeiT of 192 channels": ("deit_cifar", [*LARGER, "train.precision=float32"], "", 4),
    "a DeiT of 192 channels, bf16": ("deit_cifar", [*LARGER, "train.precision=bf16"], "", 4),
}


def timed(name, steps):
    "Seconds per step of one kind of work, in this process"
    from basd.runs.recipes import load_recipe
    from basd.training.build import build_trainer
    recipe, overrides, stage, _ = WORK[name]
    with tempfile.TemporaryDirectory() as run:
        trainer = build_trainer(load_recipe(recipe, overrides)[stage], run, "cpu", bars=False)
        trainer.task.train()
        batches = [b for b, _ in zip(trainer.data.read(0, 0, trainer.data.per_epoch), range(steps))]
        for b in batches[:2]: trainer.run_step([b])
        start = time.perf_counter()
        for i in range(steps): trainer.run_step([batches[i % len(batches)]])
        return (time.perf_counter() - start)/steps


def child(work, setting, steps=None):
    "The same in a process of its own, of two threads: name → seconds per step"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    env = clean | dict(OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT), GOMP_SPINCOUNT=SETTINGS[setting] or "300000")
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps({n: steps or WORK[n][3] for n in work})],
                          env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy(n=2):
    "`n` busy processes beside"
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try: yield
    finally:
        for p in others: p.kill(); p.wait()


def medians(rounds): return {n: statistics.median(r[n] for r in rounds) for n in rounds[0]}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--whole", action="store_true", help="train the recipe `digits` instead")
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--out", default=str(ROOT/"experiments"/"results"/"threads.json"))
    args = p.parse_args()
    if args.child: return print(json.dumps({n: timed(n, k) for n, k in json.loads(args.child).items()}))
    from basd.core.files import write_atomic
    from basd.runs.run_directory import environment
    found = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
    load = os.getloadavg()[0]
    if args.whole: found["quickstart"] = whole() | dict(load=load)
    else: found |= steps(args.rounds) | dict(load=load, ours=OURS, environment=environment())
    write_atomic(args.out, lambda p: p.write_text(json.dumps(found, indent=1)))


def steps(rounds):
    "Each kind of step under each setting"
    quick = next(iter(WORK))
    idle = {s: [] for s in SETTINGS}
    for _ in range(rounds):
        for s in SETTINGS: idle[s].append(child(WORK, s))
    idle = {s: medians(r) for s, r in idle.items()}
    default = next(iter(SETTINGS))
    for s, seconds in idle.items():
        print(f"idle, {s}: " + ", ".join(f"{n} {1000*t:.0f} ms ({t/idle[default][n]:.2f})" for n, t in seconds.items()),
              flush=True)
    with busy():            # the default takes some twenty times as long
        beside = {s: medians([child([quick], s, 2 if s == default else 20) for _ in range(1 if s == default else 3)])
                  for s in SETTINGS}
    for s, seconds in beside.items():
        print(f"beside two busy processes, {s}: {1000*seconds[quick]:.0f} ms a step, "
              f"{seconds[quick]/idle[s][quick]:.1f} times the idle one", flush=True)
    return dict(idle=idle, busy=beside)


def whole():
    "Seconds of the recipe `digits`, as the package sets things, idle and beside two busy processes"
    def run():
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "basd", "train", "digits", "--run-dir", f"{folder}/run"], check=True,
                           env=clean | dict(OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
            return time.perf_counter() - start
    idle = run()
    with busy(): beside = run()
    print(f"the recipe takes {idle:.0f} s idle and {beside:.0f} s beside two busy processes, {beside/idle:.2f} times")
    return dict(idle=idle, busy=beside, ratio=beside/idle)


if __name__ == "__main__": sys.exit(main())
