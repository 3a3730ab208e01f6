"""Every packaged method in one benchmark, on digits and on a subset of CIFAR-10.

    python experiments/race.py digits [RUNS]
    HF_HUB_OFFLINE=1 python experiments/race.py cifar10 CIFAR10_FOLDER VIT_TINY.safetensors [RUNS]
    HF_HUB_OFFLINE=1 python experiments/race.py cifar10_gpu CIFAR10_FOLDER VIT_TINY.safetensors [RUNS]

CIFAR10_FOLDER holds CIFAR-10 in the Hugging Face parquet layout. Three seeds, several runs at a time; goes on where
it was interrupted. All are `basd compare` with the changes below, and write experiments/results/race_NAME.json after
they have ended. On digits the entries are the recipe `digits` and all that extend it; on CIFAR-10 some of them, with a teacher
that is a ViT-Tiny with ImageNet weights, tuned to the same images first: 4,000 images and a small student for two CPU
cores, 10,000 and a larger one for a GPU. After them, off the clock, come the controls in experiments/NAME: BASD with
fixed weights and in its literal form on digits; on CIFAR-10 labels alone for the time that BASD takes, BASD for as many
steps as those, and labels alone for the time of that.
"""
import json
import os
import sys
import time
from pathlib import Path

from basd.runs.run_directory import environment
from basd.benchmark.compare import compare
from basd.runs.recipe_files import read_recipe, recipe_names

ROOT = Path(__file__).parents[1]
RIVALS = ["digits", "kd", "ctkd", "fitnets", "cka", "rsd", "vrm", "basd_map_uniform"]
PHOTOS = ["data.download=false", "views.flip=0.5", "student.img_size=32", "student.patch_size=4"]
TEACHER = ["student.model=vit_tiny_patch16_224", "student.patch_size=16", "student.depth=12", "student.width=192",
           "train.lr=2e-4"]
POINTS = ["basd", "basd_map_uniform", "cka", "rsd"]          # stages that compare several layers
NEAREST = [f"stages.basd.method.selector.{o}" for o in ("name=nearest", "dim=48")]      # the default when these were run
RACES = {
    "cifar10": dict(
        jobs=2, recipes=RIVALS, teacher=[*TEACHER, "student.img_size=96", "train.epochs=3"],
        frame=[*PHOTOS, "data.val_size=1000", "data.train_size=4000", "data.batch_size=64", "student.depth=4",
               "student.width=96", "student.heads=3", "train.epochs=8", "train.warmup_epochs=1"],
        stages=["stages.fitnets.method.teacher_layers=[5]",
                *NEAREST, *(f"stages.{s}.method.teacher_layers=[1, 3, 5, 7, 9, 11]" for s in ("basd", "basd_map_uniform"))],
        controls_only=["stages.ce_as_long.train.epochs=34", "stages.basd_longer.train.epochs=34",
                       "stages.ce_longest.train.epochs=150", "stages.basd_longer.method.teacher_layers=[1, 3, 5, 7, 9, 11]"]),
    "cifar10_gpu": dict(
        jobs=8, recipes=RIVALS, teacher=[*TEACHER, "student.img_size=128", "train.epochs=4"],
        frame=[*PHOTOS, "data.train_split=train[:12000]", "data.val_size=2000", "data.batch_size=128", "data.workers=2",
               "student.depth=6", "student.width=192", "student.heads=3", "train.epochs=10", "train.warmup_epochs=1",
               "train.lr=1e-3", "train.precision=bf16"],
        stages=["stages.fitnets.method.student_layers=[2]", "stages.fitnets.method.teacher_layers=[5]",
                *(f"stages.{s}.method.student_layers=[1, 2, 4, 5]" for s in POINTS),
                *NEAREST, *(f"stages.basd.method.selector.{o}" for o in ("dim=96", "rank=16", "max_rows=4096"))]),
}


def on_digits():
    "The frame and all recipes that extend it"
    return [n for n in recipe_names()
            if n not in ("quickstart", "basd") and read_recipe(n).get("data", {}).get("source") == "digits" and "teacher" in read_recipe(n).get("stages", {})]


def race(name, recipes, changes, folder, jobs=2, controls_only=()):
    "Run it, then its controls off the clock; keep results, how they were made and how long that took"
    began, clock = time.time(), Path(folder)/"wall.json"            # seconds of all calls together
    before = json.loads(clock.read_text()) if clock.is_file() else 0
    try: results = compare(*recipes, folder=folder, overrides=changes, jobs=jobs)
    finally:
        wall = before + time.time() - began
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(json.dumps(wall))
    on_the_clock = len(results["entries"])
    controls = sorted(str(p.relative_to(ROOT)) for p in (ROOT/"experiments"/name).glob("*.yaml"))
    if controls:
        changes = [*changes, *controls_only]
        results = compare(*recipes, *controls, folder=folder, overrides=changes, jobs=jobs)
    command = " ".join(["basd compare", *recipes, *controls,
                        *(f"'{c}'" for c in changes if "=/" not in c and "//" not in c)])
    out = Path(__file__).parent/"results"/f"race_{name}.json"
    made = dict(command=command, wall=wall, on_the_clock=on_the_clock, environment=environment())
    out.write_text(json.dumps(results | made, indent=1))


if __name__ == "__main__":
    os.chdir(ROOT)
    name, *rest = sys.argv[1:]
    if name == "digits":
        race(name, on_digits(), NEAREST, Path(rest[0] if rest else "runs/race_digits"))
    else:
        data, weights, *rest = rest
        r, folder = RACES[name], Path(rest[0] if rest else f"runs/race_{name}").resolve()
        local = [f"data.source=hfds/{data}", f"data.root={folder}/images",
                 f"stages.teacher.student.checkpoint={weights}"]
        changes = [*r["frame"], *(f"stages.teacher.{t}" for t in r["teacher"]), *r["stages"], *local]
        race(name, r["recipes"], changes, folder, r["jobs"], r.get("controls_only", ()))
