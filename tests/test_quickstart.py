"""The quickstart's recorded results: few points between seeds, a good teacher, a gain in each seed, little time. The figures
are those of experiments/quickstart.py; labels alone are trained again (slow)."""
import json
from pathlib import Path

import pytest
import torch

from basd.cli import train
from basd.runs.recipe_files import read_recipe

RESULTS = Path(__file__).parents[1]/"experiments"/"results"
FOUND, BEFORE = (json.loads((RESULTS/f"{name}.json").read_text()) for name in ("quickstart", "quickstart_fifth"))
RUNS = [r for r in FOUND["runs"] if "basd" in r["top1"]]


def test_recorded_by_this_recipe():
    assert FOUND["recipe"] == read_recipe("quickstart") != BEFORE["recipe"]
    assert len({r["commit"] for r in RUNS}) == len({r["cpu"] for r in RUNS}) == 1 and len(RUNS) == 5


def test_promise():
    ce, basd, teacher = ([r["top1"][k] for r in RUNS] for k in ("ce", "basd", "teacher"))
    alone = [r["top1"]["ce"] for r in FOUND["runs"] if "ce" in r["top1"]]
    assert max(alone) - min(alone) <= 4
    assert min(teacher) > 95
    assert all(b > c for b, c in zip(basd, ce, strict=True))
    assert all(r["cpu_seconds"] < 180 for r in RUNS)


def test_the_frame_before():
    "A fifth of the labels, no crops: two sets of the same seeds, of which one keeps the promise"
    spread = lambda v: max(v) - min(v)
    gains, alone = ([[f(r["top1"]) for r in runs] for runs in BEFORE["sets"]]
                    for f in (lambda t: t["basd"] - t["ce"], lambda t: t["ce"]))
    assert len(gains[0]) == len(gains[1]) == 5 and min(gains[0]) > 0 > min(gains[1])
    assert abs(sum(gains[1])/5 - sum(gains[0])/5) < 2
    assert min(r["top1"]["teacher"] for runs in BEFORE["sets"] for r in runs) > 95
    assert spread(alone[0]) <= 4 < spread(alone[1])


@pytest.mark.slow
def test_labels_alone_end_where_they_did(tmp_path):
    "Within four points, the spread that the seeds may have, since another processor rounds differently"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: result = train("quickstart", "stages.teacher=null", "stages.basd=null", run_dir=str(tmp_path/"run"), bars=False)
    finally: torch.set_num_threads(before)
    recorded = next(r["top1"]["ce"] for r in FOUND["runs"] if (r["seed"], r["threads"]) == (0, 1) and "ce" in r["top1"])
    assert abs(result["ce"]["test"]["best"]["top1"] - recorded) <= 4
