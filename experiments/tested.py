"""Results of the tests in numbers: every file of tests/ and the fuzz test for longer, into \
experiments/results/tested.json.

    python experiments/tested.py [--only FILE …] [--fuzz 60] [--seeds 3]

Tests leave figures of their own by `record_property` (the largest difference between ranks, for example); they are kept
by test. Results are written as they come, and files that are named are run anew. `experiments/kill.py` is the long form
of one of them.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]

from basd.runs.run_directory import environment


def pytest(*words, **more):
    "Run pytest; every test case as (name, outcome, seconds, figures)"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp)/"report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1",
                        f"--junitxml={report}", *words], cwd=ROOT, env=os.environ | more)
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcome = lambda c: next((kind for kind in ("failure", "error", "skipped") if c.find(kind) is not None), "passed")
    return [(c.get("name"), outcome(c), float(c.get("time")),
             {p.get("name"): p.get("value") for p in c.iter("property")}) for c in cases]


def summary(cases):
    "Counts, seconds and figures of a file's cases"
    count = lambda kind: sum(c[1] == kind for c in cases)
    return dict(cases=len(cases), passed=count("passed"), skipped=count("skipped"),
                failed=count("failure") + count("error"), seconds=round(sum(c[2] for c in cases), 1),
                figures={c[0]: c[3] for c in cases if c[3]})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", nargs="*", help="names of files below tests/")
    p.add_argument("--fuzz", type=float, default=60, help="seconds of the fuzz test, for each seed")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--out", default=str(ROOT/"experiments"/"results"/"tested.json"))
    args = p.parse_args()
    out = Path(args.out)
    found = json.loads(out.read_text()) if out.is_file() else dict(files={}, fuzz=[])
    def keep():
        out.write_text(json.dumps(found | dict(environment=environment(), date=time.strftime("%Y-%m-%d")), indent=1))
    for file in sorted((ROOT/"tests").glob("test_*.py")):
        if args.only is not None and file.name not in args.only: continue
        found["files"][file.name] = summary(pytest(f"tests/{file.name}"))
        keep()
    if args.only is None or "fuzz" in args.only:
        found["fuzz"] = []
        for seed in range(args.seeds):
            found["fuzz"] += [dict(seed=seed, outcome=c[1], **c[3])
                              for c in pytest("tests/test_fuzz.py", BASD_FUZZ=str(args.fuzz), BASD_FUZZ_SEED=str(seed))]
            keep()


if __name__ == "__main__": main()
