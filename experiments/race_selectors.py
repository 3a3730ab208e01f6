"""Does selecting teacher layers pay? Selectors, fixed maps and other methods in the same frame.

    python experiments/race_selectors.py FRAME RUNS [--jobs N] [--seeds 0 1 2] [--only NAME …] [--plan]
    HF_HUB_OFFLINE=1 python experiments/race_selectors.py cifar10_8 CIFAR10_FOLDER VIT_TINY.safetensors RUNS …

FRAME is one of the names in FRAMES below, whose numbers stay what they are whatever the packaged recipes become. An
entry is a packaged recipe: every `select_NAME`, every `map_NAME`, the other methods in RIVALS, those with other options in VARIANTS,
and `ce`, labels alone; the recipe's student stage is merged into the frame. Where a frame says `as_long`, `ce_as_long` is labels
alone for the time that BASD takes there: its steps and the filling of its cache (AS_LONG). All seeds of a frame share one teacher where
`once` is set, and its outputs on eight views per image where `views` is set, so that a step costs no teacher pass.

One thread per run, --jobs runs at a time, seed by seed. Each run that ends is written to
experiments/results/selectors_FRAME.json at once; a script that was stopped or killed goes on from the checkpoints in
RUNS, which frames may share. A failed run stands in the file with its reason and is tried again by the next call.
"""
import argparse
import copy
import json
import os
import platform
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from basd.core.files import fingerprint, write_atomic
from basd.core.registry import METHODS
from basd.runs.run_directory import environment
from basd.benchmark.compare import recipe_file, run_parallel
from basd.runs.metrics import read_metrics
from basd.runs.recipe_files import merge_recipes, read_recipe, recipe_names
from basd.runs.recipes import build_recipe, write_recipe
from basd.benchmark.entries import Run
from basd.benchmark.results import result_of
from basd.training.callbacks import on_stop

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/"experiments"/"results"
# the order of work within a seed
FIRST = ["ce", "uniform", "nearest", "progressive", "complementary", "ramp", "leap", "final", "first"]
RIVALS = ["leap", "lift", "wide_last", "last_layer"]
POINTS, DEPTH = 4, 6                    # of the packaged recipes' student and teacher

# entry → packaged recipe with other options: what the moving targets make of more time; LEAP's loss on a target that never moves
# from the one of largest CKA at the start, on one that moves by the clock alone, and on the last layer
VARIANTS = dict(progressive_slow=("basd_select_progressive", dict(method=dict(selector=dict(share=.45, fast=.4, until=.9)))),
                ramp_slow=("basd_select_ramp", dict(method=dict(selector=dict(until=.9)))),
                leap_still=("leap", dict(method=dict(losses=dict(leap=dict(threshold=1., limit=1e9))))),
                leap_clock=("leap", dict(method=dict(losses=dict(leap=dict(threshold=1.))))),
                leap_last=("leap", dict(method=dict(teacher_layers=[5]))))

# steps of labels alone in one of BASD, its losses from samples and its teacher cached, and in one pass of the teacher
# (results/step_cost.json, "sampled_more": the cached ratio, and what the full one is above it)
AS_LONG = dict(step=1.90, teacher=1.61)

# the quickstart of November 2026, where labels alone are in the middle of their rise
DIGITS = dict(
    data=dict(source="digits", val_size=.15, batch_size=64, workers=0),
    views=dict(crop_scale=[.6, 1.], flip=0., mix_prob=.5),
    student=dict(model="deit_tiny_patch16_224", img_size=24, patch_size=4, depth=4, width=48, heads=3),
    train=dict(epochs=15, lr=2e-3, warmup_epochs=2, log_every=20, log_gradients=False))
PLAIN = dict(mixup=0., cutmix=0., color="none", random_erasing=0.)          # views of teachers
SMALL = dict(student=dict(depth=6, width=72), views=PLAIN, train=dict(epochs=20))
CNN = dict(student=dict(model="resnet18", img_size=48, patch_size=None, depth=None, width=None, heads=None,
                        kwargs=dict(channels=[24, 36, 48, 72])), views=PLAIN, train=dict(epochs=20))
# race.py's frame for two cores
CIFAR10 = dict(
    data=dict(download=False, val_size=1000, train_size=4000, batch_size=64, workers=0),
    views=dict(crop_scale=[.6, 1.], flip=.5, mix_prob=.5),
    student=dict(model="deit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, width=96, heads=3),
    train=dict(lr=2e-3, warmup_epochs=1, log_every=20, log_gradients=False))
VIT_TINY = dict(student=dict(model="vit_tiny_patch16_224", img_size=96, patch_size=16, depth=12, width=192),
                views=PLAIN, train=dict(epochs=3, lr=2e-4))
LAYERS = [1, 3, 5, 7, 9, 11]
# what BASD's losses are computed from, drawn anew each step: `sampled_more` of step_cost.py
SAMPLED = dict(losses=dict(rel=dict(pairs=32), attn=dict(rows=8), rsd=dict(max_rows=512), spectral=dict(samples=8)),
               aligner=dict(samples=8))

# one loss alone, which compares token by token: the mean squared error between the tokens behind the student's final norm, mapped
# linearly, and the selected teacher tokens at the student's places, all of their channels
TOKENS = dict(student_layers=["norm"], aligner=dict(kind="interp", width="teacher", samples=None), distill_weight=3., balance=dict(form="fixed", fraction=0.),
              losses=dict(rsd=None, rel=None, attn=None, spectral=None, hidden_states=dict(normalize="layer", bias=True)))


def digits(about, changes=None, teacher=SMALL, **more):
    "A frame on digits"
    return dict(about=about, base=merge_recipes(DIGITS, changes or {}), teacher=teacher, seeds=list(range(10))) | more


def cifar10(epochs, sampled=False, tokens=False):
    "A frame on CIFAR-10; with sampled losses a step costs half as much"
    return dict(about=f"CIFAR-10, 4,000 images, {epochs} epochs of 62 steps, a tuned ViT-Tiny of 12 layers as teacher"
                      + sampled*", BASD's losses from samples" + tokens*", BASD with one loss, the error of each token of the student's last layer",
                base=merge_recipes(CIFAR10, dict(train=dict(epochs=epochs))), teacher=VIT_TINY, layers=LAYERS, once=True, views=8,
                sampled=sampled, tokens=tokens, seeds=[0, 1, 2])


FRAMES = dict(
    digits=digits("digits, 15 epochs of 19 steps, a teacher of 6 layers"),
    digits_redundant=digits("digits, the same teacher with seven copies of its third layer among twelve layers",
                            copies=[0, 1, *[2]*7, 3, 4, 5]),
    digits_deeper=digits("digits, a student of 8 layers and a teacher of 4", dict(student=dict(depth=8)),
                         merge_recipes(SMALL, dict(student=dict(depth=4))), points=[1, 3, 5, 7], depth=4),
    digits_cnn=digits("digits, a small ResNet-18 as teacher of a ViT", teacher=CNN, depth=4),
    cifar10_8=cifar10(8), cifar10_8_sampled=cifar10(8, sampled=True), cifar10_8_tokens=cifar10(8, tokens=True),
    cifar10_34_tokens=cifar10(34, tokens=True),
    cifar10_34=cifar10(34, sampled=True) | dict(as_long=round(34*AS_LONG["step"] + 8*AS_LONG["teacher"])))      # 77 epochs


def entries():
    "entry → packaged recipe, in the order of work"
    names = recipe_names()
    found = {"ce": None} | {n: n for n in RIVALS if n in names} | {n.removeprefix("basd_map_"): n for n in names if n.startswith("basd_map_")}
    for n in (n for n in names if n.startswith("basd_select_")):         # another method's rule as BASD's selector keeps its long name
        found[n.removeprefix("basd_") if n.removeprefix("basd_select_") in found else n.removeprefix("basd_select_")] = n
    found |= {"ce_as_long": None}
    found |= {n: recipe for n, (recipe, _) in VARIANTS.items()}
    return dict(sorted(found.items(), key=lambda e: FIRST.index(e[0]) if e[0] in FIRST else len(FIRST)))


def stage_of(recipe):
    "The student stage of a packaged recipe, without the teacher's path"
    stages = {k: v for k,v in read_recipe(recipe)["stages"].items() if v is not None and k not in ("teacher", "ce")}
    if len(stages) != 1: raise ValueError(f"{recipe} has the stages {', '.join(stages)} besides its teacher; leave one")
    stage = copy.deepcopy(*stages.values())
    stage.get("teacher", {}).pop("run", None)
    return stage


def placed(given, all_of, count):
    "Indices that a recipe gives for a model of `count` layers, in the frame's; `all_of` None: the frame has the same"
    if all_of is None or given == "default": return given
    if given == "all": return all_of
    return [all_of[(i + 1)*len(all_of)//count - 1] if isinstance(i, int) and i >= 0 else i for i in given]


def digest(tree):
    "Eight digits that depend on nested settings and not on the order of their keys"
    ordered = lambda x: ({k: ordered(x[k]) for k in sorted(x)} if isinstance(x, dict) else
                         [*map(ordered, x)] if isinstance(x, (list, tuple)) else x)
    return fingerprint(ordered(tree))[:8]


def recipe_of(frame, entry, recipe, seed, local, teacher):
    "The recipe of a run, and what distinguishes it from other runs of its seed"
    if entry == "ce_as_long" and "as_long" not in frame: raise ValueError("what a step costs has not been measured in this frame")
    stage = dict(method=dict(name="ce")) if recipe is None else merge_recipes(stage_of(recipe), VARIANTS.get(entry, (0, {}))[1])
    tree = merge_recipes(merge_recipes(frame["base"], local), stage)
    if entry == "ce_as_long": tree = merge_recipes(tree, dict(train=dict(epochs=frame["as_long"])))
    objective = METHODS.get(tree["method"]["name"])
    options = build_recipe({k: v for k,v in tree.items() if k != "teacher"}).method.options
    if "last_width" in tree["student"].get("kwargs", {}):           # as wide as the teacher
        tree["student"]["kwargs"] = tree["student"]["kwargs"] | dict(last_width=frame["teacher"]["student"]["width"] or 72)
    if hasattr(options, "student_layers"):
        tree["method"]["student_layers"] = placed(options.student_layers, frame.get("points"), POINTS)
    if hasattr(options, "teacher_layers"):
        every = frame.get("layers") or (range(len(frame["copies"])) if "copies" in frame else
                                        frame.get("depth") and range(frame["depth"]))
        given = options.teacher_layers
        tree["method"]["teacher_layers"] = given if given == "all" and "layers" not in frame else placed(given, every and list(every), DEPTH)
    if tree["method"]["name"] == "basd": tree["method"] = merge_recipes(tree["method"], dict(distill_weight=.3) | (SAMPLED if frame.get("sampled") else TOKENS if frame.get("tokens") else {}))
    content = {k: v for k,v in tree.items() if k != "data"} | dict(images=frame["base"]["data"])
    key = digest([content, merge_recipes(frame["teacher"], dict(student=dict(checkpoint=None))), frame.get("copies")])
    if recipe is not None and teacher:
        needs = objective.requires(build_recipe({k: v for k,v in tree.items() if k != "teacher"}).method.options)
        tree["teacher"] = tree.get("teacher", {}) | dict(run=str(teacher))
        if "views" in frame:
            what = digest([needs.teacher_layers, needs.attention, tree["views"]["crop_scale"], tree["views"]["flip"]])
            tree["teacher"] |= dict(cache=str(teacher.parents[1]/"caches"/f"{teacher.name}-{what}"),
                                    cache_views=frame["views"])
    else: tree.pop("teacher", None)
    return build_recipe(merge_recipes(tree, dict(train=dict(seed=seed)))), key


def teacher_runs(frame, seeds, folder, local):
    "seed → the run of its teacher"
    tree = merge_recipes(merge_recipes(frame["base"], local), frame["teacher"])
    tree = merge_recipes(tree, dict(train=dict(log_gradients=True))) | dict(method=dict(name="ce"))
    key = digest([merge_recipes(tree, dict(student=dict(checkpoint=None))) | dict(data=frame["base"]["data"])])
    out = {}
    for seed in seeds:
        s = 0 if frame.get("once") else seed
        out[seed] = Run(f"teachers/{key}-{s}", build_recipe(merge_recipes(tree, dict(name="teacher", train=dict(seed=s)))), [])
    return out


def with_copies(teacher, order):
    "A run directory beside a ViT teacher's, of the same function: block `i` of `order` the first time, then idle blocks"
    out = teacher.with_name(f"{teacher.name}-{fingerprint(order)[:4]}")
    if (out/"student.safetensors").is_file(): return out
    weights, about = load_file(teacher/"student.safetensors"), json.loads((teacher/"student.json").read_text())
    new = {k: v for k,v in weights.items() if not k.startswith("blocks.")}
    for i,block in enumerate(order):
        start, idle = f"blocks.{block}.", block in order[:i]        # an idle block adds nothing to what it is given
        for k,v in weights.items():
            if k.startswith(start):
                silent = idle and k.split(".")[-2] in ("proj", "fc2")
                new[f"blocks.{i}.{k.removeprefix(start)}"] = torch.zeros_like(v) if silent else v.clone()
    about["model_args"]["depth"] = len(order)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.yaml", "classes.json"):
        if (teacher/name).is_file(): (out/name).write_text((teacher/name).read_text())
    (out/"student.json").write_text(json.dumps(about))
    write_atomic(out/"student.safetensors", lambda p: save_file(new, str(p)))
    return out


def processor():
    "The CPU's model and, as two generations may share a name, its number"
    try: lines = dict(l.split(":", 1) for l in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in l)
    except OSError: return platform.processor()
    cpu = {k.strip(): v.strip() for k,v in lines.items()}
    return f"{cpu.get('model name', platform.machine())}, family {cpu.get('cpu family')}, model {cpu.get('model')}"


def thinned(rows, count=40):
    "[step, weights (P, L)] of about `count` logged steps, first and last among them"
    rows = [r for r in rows if isinstance(r.get("selector/weights"), list)]
    if not rows: return []
    width = max(len(w) for r in rows for w in r["selector/weights"])          # a teacher that stops early has fewer columns
    full = lambda r: [[round(x, 3) for x in w] + [0.]*(width - len(w)) for w in r["selector/weights"]]
    if all(full(r) == full(rows[0]) for r in rows): return [[rows[-1]["step"], full(rows[-1])]]      # a fixed map
    keep = sorted({round(i*(len(rows) - 1)/(count - 1)) for i in range(count)})
    return [[rows[i]["step"], full(rows[i])] for i in keep]


def commit_of(at):
    "Commit of the code with which a run began"
    path = at/"environment.json"
    return (json.loads(path.read_text()).get("git") or {}).get("commit") if path.is_file() else None


def row_of(run, folder, cpu, jobs):
    "The recorded row of a run"
    at, (_, entry, seed) = folder/run.name, run.name.split("/")
    entry, _, key = entry.rpartition("-")
    found = result_of(at) or dict(failed="it has no result")
    row = dict(entry=entry, seed=int(seed), key=key, method=run.recipe.method.name, cpu=cpu, jobs=jobs,
               commit=commit_of(at), steps=0)
    if "failed" in found: return row | dict(failed=found["failed"])
    log = read_metrics(at, "step")
    weights = thinned(log) if int(seed) < 3 else []
    return row | {k: found[k] for k in ("top1", "val_top1", "best_epoch", "images", "step", "seconds", "extra")} | dict(
        steps=log[-1]["step"], weights=weights)


def keep(row, name, about):
    "Put a row into the frame's file, in place of an older one of the same processor; rows of the entry from another recipe go"
    path = RESULTS/f"selectors_{name}.json"
    old = json.loads(path.read_text()) if path.is_file() else dict(runs=[])
    there, about = old["runs"], about | dict(teacher=old.get("teacher", {}) | about["teacher"])
    stay = [r for r in there if r["entry"] != row["entry"] or (r["key"] == row["key"] and (r["seed"] != row["seed"] or r["cpu"] != row["cpu"] and "failed" not in r))]
    if gone := [r for r in there if r["entry"] == row["entry"] and r["key"] != row["key"]]:
        print(f"{row['entry']}: {len(gone)} rows of another recipe are left out from here on", flush=True)
    rows = sorted([*stay, row], key=lambda r: (r["seed"], r["entry"], r["cpu"]))
    lines = ",\n".join("  " + json.dumps(r, separators=(",", ":")) for r in rows)
    head = json.dumps(about | dict(environment={k: v for k,v in environment().items() if k != "git"}))
    write_atomic(path, lambda p: p.write_text(f'{head[:-1]},\n "runs": [\n{lines}\n]}}\n'))


def all_cpus(folder):
    "Processors of earlier calls on this folder, and of this one at the end"
    note = folder/"processors.json"
    names = [c for c in (json.loads(note.read_text()) if note.is_file() else []) if c != processor()] + [processor()]
    write_atomic(note, lambda p: p.write_text(json.dumps(names)))
    return names


def settle_all(runs, folder, jobs, ended):
    "Write the recipes of the runs that have no result, and settle these"
    left = [r for r in runs if not (folder/r.name/"result.json").is_file()]
    for r in left:
        recipe_file(folder, r).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe_file(folder, r), lambda p, r=r: write_recipe(r.recipe, p))
    run_parallel(left, folder, "cpu", ended, jobs)


def race(name, folder, local, seeds, only, jobs, plan=False):
    "Run what is missing of a frame"
    frame, names = FRAMES[name], entries()
    if wrong := [n for n in only if n not in names]:
        raise SystemExit(f"no entry {wrong[0]!r}; there are {', '.join(names)}")
    chosen, seeds = [n for n in names if n in (only or names)], seeds or frame["seeds"]
    teachers = teacher_runs(frame, seeds, folder, local)
    once = list({t.name: t for t in teachers.values()}.values())
    if plan: print(f"{name}: {len(chosen)} entries ({', '.join(chosen)}) × {len(seeds)} seeds"); return
    cpus, interrupt = all_cpus(folder), lambda: (_ for _ in ()).throw(KeyboardInterrupt("stopped on request"))
    with on_stop(interrupt):
        for t in once: (folder/t.name/"failed.txt").unlink(missing_ok=True)                         # tried again
        settle_all(once, folder, jobs, lambda r: print(f"{r.name}: {result_of(folder/r.name)}", flush=True))
        at = {s: folder/t.name for s,t in teachers.items()}
        top1 = {s: (result_of(p) or {}).get("top1") for s,p in at.items()}
        if "copies" in frame: at = {s: with_copies(p, frame["copies"]) for s,p in at.items()}
        runs = []
        for seed in seeds:
            for entry in chosen:
                try: recipe, key = recipe_of(frame, entry, names[entry], seed, local, at[seed])
                except ValueError as e: print(f"{entry}: left out, {e}", flush=True); continue
                runs.append(Run(f"{name}/{entry}-{key}/{seed}", recipe, []))
        began = {r.name for r in runs if (folder/r.name/"recipe.yaml").is_file()}
        about = dict(frame=name, about=frame["about"], epochs=frame["base"]["train"]["epochs"], cached="views" in frame,
                     teacher={str(s): t for s,t in top1.items()})
        def ended(run):
            row = row_of(run, folder, " + ".join(cpus) if run.name in began else cpus[-1], jobs)
            keep(row, name, about)
            print(f"{run.name}: {row.get('failed') or format(row['top1'], '.2f') + ' %'}", flush=True)
        path = RESULTS/f"selectors_{name}.json"
        written = {(r["entry"], r["key"], r["seed"]) for r in (json.loads(path.read_text())["runs"] if path.is_file() else [])
                   if "failed" not in r and cpus[-1] in r["cpu"].split(" + ")}
        for r in runs: (folder/r.name/"failed.txt").unlink(missing_ok=True)               # tried again
        for r in runs:                      # ended, but the script was killed before it was written
            entry, _, k = r.name.split("/")[1].rpartition("-")
            if (folder/r.name/"result.json").is_file() and (entry, k, int(r.name.split("/")[2])) not in written: ended(r)
        settle_all(runs, folder, jobs, ended)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("frame", choices=FRAMES)
    p.add_argument("paths", nargs="+", help="RUNS, or DATA WEIGHTS RUNS for CIFAR-10")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--seeds", type=int, nargs="+", default=[])
    p.add_argument("--only", nargs="+", default=[], help="entries; all if left out")
    p.add_argument("--plan", action="store_true", help="say what would be run, and run nothing")
    args = p.parse_args()
    photos = args.frame.startswith("cifar10")
    if len(args.paths) != (3 if photos else 1): p.error("give DATA WEIGHTS RUNS" if photos else "give RUNS")
    folder, local = Path(args.paths[-1]).resolve(), {}
    folder.mkdir(parents=True, exist_ok=True)
    if photos:
        data, weights = (Path(x).resolve() for x in args.paths[:2])
        local = dict(data=dict(source=f"hfds/{data}", root=str(folder/"images")))
        FRAMES[args.frame]["teacher"] = merge_recipes(VIT_TINY, dict(student=dict(checkpoint=str(weights))))
    torch.set_num_threads(args.jobs)        # one for each run
    os.chdir(ROOT)
    try: race(args.frame, folder, local, args.seeds, args.only, args.jobs, args.plan)
    except KeyboardInterrupt as e: sys.exit(f"{e or 'interrupted'}; the same command goes on")
