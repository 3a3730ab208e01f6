"""Kill training runs with SIGKILL at 50 moments, resume each time, and compare what is left with undisturbed runs, \
bit for bit.

A run is killed again and again until it ends; then its weights, average, whole checkpoints (but for the clock), rows of
the log, exported student and result must be those of an undisturbed run with the same arguments. Moments are drawn from a
seed: at any time, and inside what is dangerous (tests/kills.py has the list).

    python experiments/kill.py [--seed 0] [--minutes 12] [--out experiments/results/kill.json]

With `--signals` it sends SIGTERM and SIGINT in turns to the whole process group of a run, its ranks and two workers each, at
twenty random moments on one rank and as many on two. Each time all ranks must end with status 0, having finished their step
and saved; the workers must be gone; and what is left in the end must be equal, too.

    python experiments/kill.py --signals [--minutes 15] [--out experiments/results/signals.json]
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
import kills
from conftest import TINY

from basd.core.files import write_atomic
from basd.runs.run_directory import environment

TRAIN = ["train", "basd_cifar10", *TINY, "data.train_size=128", "data.val_size=32", "train.epochs=4",
         "train.checkpoint_every=3", "train.precision=float32"]
CONFIGURATIONS = {                          # name → words, ranks
    "one process": ([], 1),
    "a reader process": (["data.workers=1"], 1),
    "two accumulation steps": (["train.grad_accum_steps=2"], 1),
    "reader and accumulation": (["data.workers=1", "train.grad_accum_steps=2"], 1),
    "two ranks": ([], 2),
    "two ranks, reader, accumulation": (["data.workers=1", "train.grad_accum_steps=2"], 2),
    "torchrun": ([], 2),
    "teacher cache": (["data.train_size=1100", "data.batch_size=256", "views.crop=center", "views.flip=0"], 1),
}
SHARES = {"any time": 12, "start": 2, "cache": 5, "step": 10, "checkpoint": 10, "epoch": 4, "evaluation": 4,
          "end": 3}    # 50 kills


def draw(chance):
    "Which configuration is killed at which moments, the early ones first"
    plan = {name: [] for name in CONFIGURATIONS}
    several = [n for n in plan if n not in ("torchrun", "teacher cache")]
    for kind, count in SHARES.items():
        moments = [m for m in kills.MOMENTS if m.startswith(kind)] or [kind]
        chosen = [m for _ in range(-(-count//len(moments))) for m in chance.sample(moments, len(moments))][:count]
        for i, m in enumerate(chosen):
            name = ("teacher cache" if kind == "cache"
                    else "torchrun" if kind in ("step", "checkpoint", "evaluation") and i == 0
                    else chance.choice(several))
            n = (chance.randint(1, 4) if kind == "step"
                 else chance.randint(1, 2) if kind in ("checkpoint", "evaluation") else 1)
            plan[name].append(dict(configuration=name, kind=kind, moment=m, n=n,    # the first rank writes
                                   rank=chance.randrange(CONFIGURATIONS[name][1])
                                   if kind == "step" and "row" not in m else 0))
    order = {"start": 0, "cache": 1, "end": 4}
    for rows in plan.values():
        chance.shuffle(rows)
        rows.sort(key=lambda r: order.get(r["kind"], 2 if "best" in r["moment"] else 3))
    return plan


class Race:
    "Rows of kills, written as they come"
    def __init__(self, out, seed, planned):
        self.out, self.began, self.about, self.rows, self.planned = (
            Path(out), time.time(), dict(seed=seed, **environment()), [], planned)

    def write(self):
        counts = {}
        for r in self.rows:
            c = counts.setdefault(r["kind"], dict(kills=0, equal=0))
            c["kills"] += 1; c["equal"] += bool(r.get("equal"))
        names = [r["configuration"] for r in self.rows]
        found = dict(planned=self.planned, kills=len(self.rows),
                     equal=sum(bool(r.get("equal")) for r in self.rows), seconds=round(time.time() - self.began),
                     kinds=counts, configurations={n: names.count(n) for n in dict.fromkeys(names)}, rows=self.rows,
                     environment=self.about)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out, lambda p: p.write_text(json.dumps(found, indent=1)))
        return found


def attempt(words, run, row, ranks, span, chance):
    "One start that should be killed; returns whether it was"
    out = run.parent/"out.txt"
    kill = None if row["kind"] == "any time" else (row["moment"], row["n"])
    wait = span*chance.uniform(.1, .6) if kill is None else None
    processes = kills.launch([*words, "--run-dir", run, "--resume"], out, kill, ranks, row["rank"])
    status = kills.end(processes, after=wait)
    row.update({} if wait is None else dict(after=round(wait, 2)), goes_on_from=kills.step(run), status=status)
    return -signal.SIGKILL in status


def finish(words, run, ranks, whole, rows, race, but=()):
    "Resume a run to its end, and compare"
    status = kills.end(kills.launch([*words, "--run-dir", run, "--resume"], run.parent/"out.txt", ranks=ranks))
    assert set(status) == {0}, (run.parent/"out.txt").read_text()
    settle(run, whole, rows, race, but)


def settle(run, whole, rows, race, but=()):
    "Compare a run that has ended with the undisturbed one, but for some files"
    wrong = [k for k in kills.different(run, whole) if k not in but]
    for r in rows: r.update(equal=not wrong) if not wrong else r.update(equal=False, different=wrong)
    race.write()
    if rows or wrong:
        print(f"{run.parent.parent.name}: {len(rows)} kills, "
              f"{'equal' if not wrong else 'NOT EQUAL: ' + ', '.join(wrong)}", flush=True)


SIGNALS = 20            # moments per number of ranks
SAVED = ("previous.pt",)    # the checkpoint before the last is one that a signal made, which an undisturbed run has not


def signals(race, chance, minutes, tmp, of=(1, 2)):
    "Stop runs at random moments by signals to their process group"
    for ranks in of:
        words, at = [*TRAIN, "data.workers=2"], lambda name: Path(tmp)/f"{ranks}-ranks"/str(name)/"run"
        calm, start = at("calm"), time.time()
        calm.mkdir(parents=True)
        status = kills.end(kills.launch([*words, "--run-dir", calm, "--resume"], calm.parent/"out.txt", ranks=ranks))
        assert set(status) == {0}, (calm.parent/"out.txt").read_text()
        whole, span = kills.left(calm), time.time() - start
        count, mine, done = 0, [], 0
        while done < SIGNALS and time.time() - race.began < 60*minutes:
            (run := at(count)).mkdir(parents=True, exist_ok=True)
            (out := run.parent/"out.txt").write_text("")
            number, wait = (signal.SIGTERM, signal.SIGINT)[done % 2], round(span*chance.uniform(0, .5), 2)
            processes = kills.launch([*words, "--run-dir", run, "--resume"], out, ranks=ranks, together=True)
            status, output = kills.stop_all(processes, number, wait), out.read_text()
            if "stopped on request" in output or any(status):
                done += 1
                mine.append(dict(kind=number.name, configuration=f"{ranks} rank{'s'*(ranks > 1)}, two readers each",
                                 after=wait, status=status, goes_on_from=kills.step(run), traceback="Traceback" in output))
                race.rows.append(mine[-1])
            else:       # it had come to its end
                settle(run, whole, mine, race, SAVED)
                count, mine = count + 1, []
        finish(words, at(count), ranks, whole, mine, race, SAVED)
    for r in race.rows: r["equal"] = r.get("equal", False) and not any(r["status"]) and not r["traceback"]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=12, help="no new kill after so long (default 12)")
    p.add_argument("--signals", action="store_true", help="SIGTERM and SIGINT to the process group instead")
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of the runs that get signals (default 1 2)")
    p.add_argument("--out")
    args = p.parse_args()
    out = args.out or ROOT/"experiments"/"results"/("signals.json" if args.signals else "kill.json")
    chance, race = random.Random(args.seed), Race(out, args.seed, len(args.ranks)*SIGNALS if args.signals else sum(SHARES.values()))
    if args.signals:
        with tempfile.TemporaryDirectory() as tmp: signals(race, chance, args.minutes, tmp, args.ranks)
        return report(race)
    with tempfile.TemporaryDirectory() as tmp:
        for name, plan in draw(chance).items():
            more, ranks = CONFIGURATIONS[name]
            fresh = lambda what: (folder := Path(tmp)/name.replace(" ", "-").replace(",", "")/what/"run").mkdir(
                parents=True) or folder
            words = lambda run: [*TRAIN, *more,
                                 *([f"teacher.cache={run.parent/'cache'}"] if name == "teacher cache" else [])]
            calm, start = fresh("calm"), time.time()
            status = kills.end(kills.launch([*words(calm), "--run-dir", calm, "--resume"], calm.parent/"out.txt",
                                            ranks=ranks))
            assert set(status) == {0}, (calm.parent/"out.txt").read_text()
            whole, span, count = kills.left(calm), time.time() - start, 0
            run, mine = fresh("0"), []
            if name == "torchrun":
                status = kills.torchrun([*words(run), "--run-dir", run, "--resume"],
                                        [[r["moment"], r["n"], r["rank"]] for r in plan], run.parent/"out.txt")
                assert status == 0, (run.parent/"out.txt").read_text()
                starts = (run.parent/"out.txt").read_text().count("exitcode: -9")
                race.rows += plan[:starts]
                settle(run, whole, plan[:starts], race)
                continue
            for row in plan:
                for _ in range(5):  # a run that ends before its moment comes is followed by another
                    if time.time() - race.began > 60*args.minutes: break
                    if attempt(words(run), run, row, ranks, span, chance):
                        race.rows.append(row); mine.append(row); race.write(); break
                    if set(row["status"]) != {0}: raise AssertionError((run.parent/"out.txt").read_text())
                    settle(run, whole, mine, race)
                    run, mine, count = fresh(str(count + 1)), [], count + 1
            finish(words(run), run, ranks, whole, mine, race)
    return report(race)


def report(race):
    "Print the outcome; returns whether it is wrong"
    found = race.write()
    print(f"{found['kills']} kills of {found['planned']} in {found['seconds']} s, {found['equal']} of them followed by "
          "an end equal to the undisturbed one")
    return found["equal"] != found["planned"]


if __name__ == "__main__":
    kills.begin_server()
    sys.exit(main())
