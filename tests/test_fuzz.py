"""Recipes are mutated at random for BASD_FUZZ seconds of processor time (10 if it is not set; a minute before a release:
BASD_FUZZ=60 pytest -s tests/test_fuzz.py, with another BASD_FUZZ_SEED each time). Each is either a recipe or refused in
one sentence; some of the tiny ones are built, data, models and method, with the same outcome."""
import copy
import datetime
import os
import random
import time

import pytest
import yaml
from conftest import TINY

from basd.cli import resolve_stages, is_user_error
from basd.runs.recipe_files import (
    check_words, nearest_option, packaged_file, parse_override, read_recipe, recipe_names, stage_trees, takes_option)
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

SECONDS, SEED = float(os.environ.get("BASD_FUZZ", 10)), int(os.environ.get("BASD_FUZZ_SEED", 0))
JUNK = [None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.5, .999, 1e-320, 1e308, -1e308, float("nan"), float("inf"),
        10**20, -10**20, 2**31, "", "x", "3", "1e-3", "null", "\0", "é", "\ud800", "\u202e", "a"*300, "stage:teacher",
        "stage:", "../../x", "/etc/passwd", ".", "hf-hub:a/b", "local-dir:x", "ce", "basd", "distill", "match",
        "os:system", "digits", "torch/cifar10", "quickstart", "all", "default", [], {}, [1, [2]], [0, 1], [-1],
        {"a": {"b": 1}}, {"": 1}, {1: 2}, datetime.date(2020, 1, 1), b"bytes", {"x", "y"}, [None], ["x"]*50]
KEYS = ["", "x", "ñ", "日本", "\u202e", "name", "train", "data", "method", "kwargs", "stages", "extends", "run", "model",
        "losses", "others", "a.b", "../x", 1, None, True, 1.5]


def places(tree, path=()):
    "Every place in a tree: (container, key)"
    for k, v in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, k
        if isinstance(v, (dict, list)): yield from places(v)


def mutate(tree, chance):
    "One change somewhere"
    spots = list(places(tree))
    if not spots: return tree.update({chance.choice(KEYS): chance.choice(JUNK)})
    container, key = chance.choice(spots)
    other, there = chance.choice(spots)
    kind = chance.randrange(7)
    if kind == 0: del container[key]
    elif kind == 1: container[key] = copy.deepcopy(chance.choice(JUNK))
    elif kind == 2: container[key] = copy.deepcopy(other[there])
    elif kind == 3: container[key] = {chance.choice(KEYS): container[key]} if chance.random() < .5 else [container[key]]
    elif kind == 4 and isinstance(container, dict):
        container[chance.choice(KEYS) if chance.random() < .6 else "".join(
            chr(chance.choice([chance.randrange(32, 127), chance.randrange(160, 0xd000)]))
            for _ in range(5))] = copy.deepcopy(chance.choice(JUNK))
    elif kind == 5 and isinstance(container[key], (int, float)):
        container[key] = container[key]*chance.choice([-1, 0, 2, .5, 1e6, 1e300]) if container[key] < 1e6 else 0
    elif kind == 6 and isinstance(container[key], str) and container[key]:
        container[key] = container[key][:-1] if chance.random() < .5 else container[key]*2
    else: container[key] = str(container[key])


def scramble(text, chance):
    "A change to the file itself"
    i = chance.randrange(len(text) + 1)
    kind = chance.randrange(5)
    if kind == 0: return text[:i] + text[i + 1:]
    if kind == 1: return text[:i] + bytes([chance.randrange(256)]) + text[i:]
    if kind == 2: return text[:i]
    if kind == 3:
        return text[:i] + chance.choice([
            b"&a ", b"*a", b"!!python/object:os.x ", b"!!int ", b"!!timestamp ", b"<<: ", b"? ", b"---\n",
            b"%YAML 9\n", b"\t", b"[[", b"}}", b"\xff\xfe", b": ", b"!!set {a}"]) + text[i:]
    lines = text.splitlines(keepends=True) or [b""]
    return b"".join(lines + [chance.choice(lines)])


def attempt(what, f, *args):
    ("The result of `f`, or None where it refuses in one sentence; anything else is a fault, "
     "and shown with what brought it about")
    try: return f(*args)
    except (ValueError, FileNotFoundError) as e:
        if is_user_error(e) and str(e).strip(): return None
        pytest.fail(f"{type(e).__name__} from elsewhere: {e}\n{what}")
    except Exception as e: raise AssertionError(f"{type(e).__name__}: {e}\n{what}") from e


def sized(x):
    return (all(map(sized, x.values())) if isinstance(x, dict) else all(map(sized, x)) if isinstance(x, (list, tuple))
            else not isinstance(x, (int, float)) or abs(x) <= 1000)


def small(r):
    "Whether this recipe may be built here: no large model, no network, no other processes"
    s, t = r.student, r.teacher
    sizes = [s.img_size, s.patch_size, s.depth, s.width, s.heads, t.img_size, r.data.batch_size]
    return (all(x is not None and x <= 128 for x in sizes[:5]) and (t.img_size or 999) <= 64 and s.patch_size > 1
            and r.data.workers < 3 and r.data.source == "digits"
            and not (s.pretrained or t.pretrained or any(o.get("pretrained") for o in t.extra_teachers))
            and all(map(sized, (s.kwargs, t.kwargs, t.extra_teachers, vars(r.method.options) if all(
                isinstance(v, (int, float, str, list, dict, type(None)))
                for v in vars(r.method.options).values()) else {})))
            and ("depth" in t.kwargs or t.model is None) and s.model.startswith(("deit_tiny", "vit_tiny", "resnet18"))
            and (t.model or "vit_tiny").startswith(("vit_tiny", "resnet18")))


def spelled(name, words):
    "The command's check of keys and words, without the classes"
    for tree in stage_trees(name, read_recipe(name), words, takes_option, nearest_option).values(): check_words(tree)
    return True


def test_mutated_recipes(tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    chance, began, counts = random.Random(SEED), time.process_time(), dict(tried=0, loaded=0, built=0, refused=0)
    sources = {n: yaml.safe_load(packaged_file(n).read_text()) for n in recipe_names()}
    tiny = {}
    for word in [*TINY, "method.name=basd", "train.warmup_epochs=0"]:
        section, rest = next(iter(parse_override(word).items()))
        merged = tiny.setdefault(section, {})
        for k, v in rest.items():
            merged[k] = merged[k] | v if isinstance(v, dict) and isinstance(merged.get(k), dict) else v
    while time.process_time() - began < SECONDS:
        counts["tried"] += 1
        build = chance.random() < .5
        tree = copy.deepcopy(tiny if build else chance.choice(list(sources.values())))
        for _ in range(chance.choice([1, 1, 2, 3, 5])): mutate(tree, chance)
        text = yaml.safe_dump(tree, sort_keys=False).encode()
        if chance.random() < .2: text = scramble(text, chance)
        (tmp_path/"r.yaml").write_bytes(text)
        words = [f"{chance.choice(['train', 'data', 'student', 'method', 'stages', 'teacher', '', 'x'])}."
                 f"{chance.choice(KEYS)}={chance.choice(JUNK)!r}" for _ in range(chance.choice([0, 0, 0, 1]))]
        what = f"mutant {counts['tried']} {words}\n{text.decode(errors='replace')}"
        stages, known = attempt(what, load_recipe, "r.yaml", words), attempt(what, spelled, "r.yaml", words)
        assert known or stages is None, f"the schema refuses what the classes accept\n{what}"
        if stages is None: counts["refused"] += 1; continue
        counts["loaded"] += 1
        def joined():
            for stage in stages: resolve_stages(stages, stage, tmp_path)
            return True
        if (build and len(stages) == 1 and attempt(what, joined)
                and small(stages.get("") or next(iter(stages.values())))):
            r, run = next(iter(stages.values())), tmp_path/f"run{counts['tried']}"
            counts["built"] += attempt(what, lambda: bool(build_trainer(r, run, bars=False))) is not None
    print(f"\n{counts['tried']} mutants: {counts['refused']} refused, {counts['loaded']} loaded, "
          f"{counts['built']} of them built, in {SECONDS:.0f} s")
    for k, v in (counts | dict(seconds=SECONDS)).items(): record_property(k, v)
    assert counts["tried"] > 5*SECONDS and counts["refused"] and counts["loaded"]
