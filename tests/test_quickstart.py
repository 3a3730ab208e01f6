"""The quickstart's recorded results: few points between seeds, a good teacher, a gain in each seed, little time. The figures
are those of experiments/quickstart.py; labels alone are trained again (slow)."""
import json
from pathlib import Path

import pytest
import torch

from basd.cli import train
from basd.runs.recipe_files import read_recipe

FOUND = json.loads((Path(__file__).parents[1]/"experiments"/"results"/"quickstart.json").read_text())
RUNS = [r for r in FOUND["runs"] if "basd" in r["top1"]]


def test_recorded_by_this_recipe(): assert FOUND["recipe"] == read_recipe("quickstart")


def test_promise():
    ce, basd, teacher = ([r["top1"][k] for r in RUNS] for k in ("ce", "basd", "teacher"))
    alone = [r["top1"]["ce"] for r in FOUND["runs"] if "ce" in r["top1"]]
    assert max(alone) - min(alone) <= 4
    assert min(teacher) > 95
    assert all(b > c for b, c in zip(basd, ce, strict=True))
    assert all(r["cpu_seconds"] < 180 for r in RUNS)


@pytest.mark.slow
def test_labels_alone_end_where_they_did(tmp_path):
    "Within four points, the spread that the seeds may have, since another processor rounds differently"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: result = train("quickstart", "stages.teacher=null", "stages.basd=null", run_dir=str(tmp_path/"run"), bars=False)
    finally: torch.set_num_threads(before)
    recorded = next(r["top1"]["ce"] for r in FOUND["runs"] if (r["seed"], r["threads"]) == (0, 1) and "ce" in r["top1"])
    assert abs(result["ce"]["test"]["best"]["top1"] - recorded) <= 4
