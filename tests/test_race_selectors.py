"Settings that the selector benchmark merges into its frames, and what it records of a run"
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from basd.models.students import create_student, save_student
from basd.runs.builders import load_teacher_run
from basd.runs.recipe_files import read_recipe, recipe_keys

root = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("race_selectors", root/"experiments"/"race_selectors.py")
race = importlib.util.module_from_spec(spec)
spec.loader.exec_module(race)
photos = dict(data=dict(source="hfds/somewhere"))


@pytest.mark.parametrize("frame", race.FRAMES)
def test_every_entry_has_a_recipe_in_every_frame(frame):
    keys = {}
    for entry, name in race.entries().items():
        f = race.FRAMES[frame]
        if entry == "ce_as_long":
            if "as_long" not in f: continue
            f = race.merge_recipes(f, dict(base=dict(train=dict(epochs=f["as_long"]))))
        made = [race.recipe_of(f, entry, name, s, photos if "cifar" in frame else {}, Path("/runs/teachers/t-0")) for s in (0, 1)]
        assert made[0][1] == made[1][1] and [r.train.seed for r,_ in made] == [0, 1]
        recipe, keys[entry] = made[0]
        assert recipe.train.epochs == f["base"]["train"]["epochs"] and recipe.student.depth == f["base"]["student"]["depth"]
        assert (recipe.teacher.run is None) == (name is None) and bool(recipe.teacher.cache) == ("views" in f and name is not None)
    assert len({*keys.values()}) == len(keys)


@pytest.mark.parametrize("frame", race.FRAMES)
def test_the_teachers_of_a_frame_have_recipes(frame):
    f = race.FRAMES[frame]
    teachers = race.teacher_runs(f, [0, 1], Path("/runs"), photos if "cifar" in frame else {})
    assert len({t.name for t in teachers.values()}) == (1 if f.get("once") else 2)
    assert all(t.recipe.method.name == "ce" and t.recipe.views.mixup == 0 for t in teachers.values())


def test_keys_do_not_depend_on_the_place_of_the_data():
    f = race.FRAMES["cifar10_8"]
    keys = {race.recipe_of(f, "uniform", "basd_map_uniform", 0, dict(data=dict(source=f"hfds/{d}")), Path("/r/teachers/t"))[1]
            for d in "ab"}
    assert len(keys) == 1


def test_keys_do_not_depend_on_the_order_of_settings():
    assert race.digest(dict(a=1, b=[dict(c=2, d=3)])) == race.digest(dict(b=[dict(d=3, c=2)], a=1)) != race.digest(dict(a=1, b=[dict(c=3, d=2)]))


@pytest.mark.parametrize("file", sorted((root/"experiments"/"results").glob("selectors_*.json")), ids=lambda p: p.stem)
def test_recorded_rows_are_of_the_recipes_of_today(file):
    "The script would leave out rows of another recipe"
    frame = file.stem.removeprefix("selectors_")
    rows = json.loads(file.read_text())["runs"]
    keys = {e: race.recipe_of(race.FRAMES[frame], e, race.entries()[e], 0, photos if "cifar" in frame else {}, Path("/runs/teachers/t-0"))[1]
            for e in sorted({r["entry"] for r in rows})}
    assert [] == [(r["entry"], r["seed"]) for r in rows if r["key"] != keys[r["entry"]]]


def test_the_frames_token_by_token_are_the_packaged_recipe():
    packaged = read_recipe("basd_tokens@cifar10_dinov2")["method"]
    exact = race.TOKENS["aligner"] | dict(samples=None)                  # the sampled frames set it otherwise
    assert race.TOKENS["aligner"] == exact and packaged.pop("name") == "basd" and packaged.pop("selector") == {"name": "nearest_once"}
    packaged["aligner"]["samples"] = None
    assert packaged == race.TOKENS


def test_indices_keep_their_relative_depth():
    assert race.placed([5], list(range(12)), 6) == [11] and race.placed([0, 1, 2, 3], [1, 3, 5, 7], 4) == [1, 3, 5, 7]
    assert race.placed("all", [1, 3], 6) == [1, 3] and race.placed(["norm", -1], [1, 3], 6) == ["norm", -1]
    assert race.placed([2], None, 4) == [2]


def test_copied_layers_change_nothing(tmp_path):
    torch.manual_seed(0)
    student = create_student(num_classes=4, img_size=16, patch_size=4, depth=3, width=24, heads=3)
    (tmp_path/"a").mkdir()
    save_student(student, tmp_path/"a")
    (tmp_path/"a"/"recipe.yaml").write_text("data: {source: digits}\n")
    order = [0, 1, 1, 1, 2]
    copied = race.with_copies(tmp_path/"a", order)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    one, many = (load_teacher_run(p)(x) for p in (tmp_path/"a", copied))
    assert torch.equal(one.logits, many.logits) and len(many.tokens) == 5
    assert all(torch.equal(many.tokens[i], one.tokens[o]) for i,o in enumerate(order))
    assert not torch.equal(one.tokens[1], one.tokens[2])


def test_weights_are_thinned_and_filled_up():
    rows = [{"step": s, "selector/weights": [[1.] if s < 50 else [1 - s/100, s/100]]} for s in range(100)] + [dict(step=100)]
    kept = race.thinned(rows)
    assert len(kept) == 40 and kept[0] == [0, [[1., 0.]]] and kept[-1] == [99, [[.01, .99]]]
    assert race.thinned([{"step": s, "selector/weights": [[0., 1.]]} for s in range(9)]) == [[8, [[0., 1.]]]] and race.thinned([]) == []


def test_rows_replace_their_elders(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "RESULTS", tmp_path)
    keep = lambda entry, seed, key, top1, cpu="A": race.keep(dict(entry=entry, seed=seed, key=key, top1=top1, cpu=cpu), "x", dict(teacher={str(seed): 90.}))
    for row in [("a", 0, "k", 1.), ("a", 1, "k", 2.), ("b", 0, "k", 3.), ("a", 1, "k", 4.)]: keep(*row)
    read = lambda: json.loads((tmp_path/"selectors_x.json").read_text())
    assert [(r["entry"], r["seed"], r["top1"]) for r in read()["runs"]] == [("a", 0, 1.), ("b", 0, 3.), ("a", 1, 4.)]
    keep("b", 0, "k", 6., "B")                          # runs of two processors are not compared, so both stay
    assert [r["top1"] for r in read()["runs"] if r["entry"] == "b"] == [3., 6.]
    race.keep(dict(entry="b", seed=1, key="k", failed="out of memory", cpu="A"), "x", dict(teacher={"1": 90.}))
    keep("b", 1, "k", 7., "B")                          # a failure does not stay beside a run that ended
    assert [r["top1"] for r in read()["runs"] if r["entry"] == "b"] == [3., 6., 7.]
    keep("a", 2, "other", 5.)                           # another recipe: the old rows of the entry are no longer its
    assert [(r["entry"], r["seed"]) for r in read()["runs"]] == [("b", 0), ("b", 0), ("b", 1), ("a", 2)]
    assert read()["teacher"] == {"0": 90., "1": 90., "2": 90.}


def test_the_changes_of_experiments_name_keys():
    "A recipe key that was renamed and stands in a script still fails here, not after an hour of training"
    keys, found = {k.key for k in recipe_keys()} | {"method.selector.name"}, {}
    for path in [*(root/"experiments").rglob("*.py"), *(root/"experiments").rglob("*.sh"), *(root/"tools").glob("*.sh")]:
        for key in re.findall(r"""['" ](?:stages\.\w+\.)?((?:data|views|student|teacher|train|method)\.[a-z0-9_.]+)=""",
                              path.read_text(encoding="utf-8")): found.setdefault(key, path.name)
    assert len(found) > 40 and {k: f for k, f in found.items() if k not in keys} == {}


@pytest.mark.parametrize("entry, depth", [("ramp", 6), ("progressive", 6), ("leap", 6), ("leap_still", None), ("first", 1)])
def test_steps_are_timed_where_targets_have_arrived(entry, depth, monkeypatch):
    "Not where they begin, with half of the teacher"
    monkeypatch.syspath_prepend(root/"experiments")
    method = importlib.import_module("entry_cost").bench("digits", entry, False).task.method
    assert method.teacher_depth() == depth or depth is None and method.teacher_depth() < 6
