"""Every packaged method in one race, on digits and on a part of CIFAR-10.

    python experiments/race.py digits [RUNS]
    HF_HUB_OFFLINE=1 python experiments/race.py cifar10 CIFAR10_FOLDER VIT_TINY.safetensors [RUNS]

CIFAR10_FOLDER holds CIFAR-10 in the Hugging Face parquet layout. Two runs at a time; three seeds; goes on where it was interrupted. Both
are `basd compare` with the changes below, and write experiments/results/race_digits.json or race_cifar10.json after they have ended.
On digits all recipes in the quickstart's frame take part, and BASD with fixed weights and in its literal form (experiments/digits). On CIFAR-10 eight of them do, with a teacher that is a ViT-Tiny with ImageNet
weights, tuned to the same images first.
"""
import json
import os
import sys
import time
from pathlib import Path

from basd.training.checkpoints import environment
from basd.training.compare import compare
from basd.training.recipes import read_recipe, recipe_names

ROOT = Path(__file__).parents[1]
CIFAR10 = ["quickstart", "hinton", "ctkd", "fitnets", "cka", "rsd", "vrm"]
FRAME = ["data.download=false", "data.val_size=1000", "data.train_size=2000", "data.batch_size=64", "views.flip=0.5",
         "student.img_size=32", "student.patch_size=4", "student.depth=4", "student.width=96", "student.heads=3",
         "train.epochs=4", "train.warmup_epochs=1"]
TEACHER = ["student.model=vit_tiny_patch16_224", "student.img_size=64", "student.patch_size=16", "student.depth=12", "student.width=192",
           "train.epochs=3", "train.lr=2e-4"]
LAYERS = ["stages.basd.method.layers=[1, 3, 5, 7, 9, 11]", "stages.fitnets.method.layers=[5]"]


def on_digits():
    "All recipes that extend the quickstart, the quickstart itself, and BASD with fixed weights and in its literal form"
    packaged = [n for n in recipe_names() if n == "quickstart" or "digits" in read_recipe(n)["about"] and "teacher" in read_recipe(n).get("stages", {})]
    return packaged + sorted(str(p.relative_to(ROOT)) for p in (ROOT/"experiments"/"digits").glob("*.yaml"))


def race(name, recipes, changes, folder):
    "Run it, and keep its results and how they were made"
    began, clock = time.time(), Path(folder)/"wall.json"            # seconds of all calls together
    before = json.loads(clock.read_text()) if clock.is_file() else 0
    try: results = compare(*recipes, folder=folder, overrides=changes, jobs=2)
    finally:
        wall = before + time.time() - began
        clock.parent.mkdir(parents=True, exist_ok=True)
        clock.write_text(json.dumps(wall))
    command = " ".join(["basd compare", *recipes, *(f"--set '{c}'" for c in changes if "=/" not in c and "//" not in c)])
    out = Path(__file__).parent/"results"/f"race_{name}.json"
    out.write_text(json.dumps(results | dict(command=command, wall=wall, environment=environment()), indent=1))


if __name__ == "__main__":
    os.chdir(ROOT)
    name, *rest = sys.argv[1:]
    if name == "digits": race(name, on_digits(), [], Path(rest[0] if rest else "runs/race_digits"))
    else:
        data, weights, *rest = rest
        folder = Path(rest[0] if rest else "runs/race_cifar10").resolve()
        local = [f"data.source=hfds/{data}", f"data.root={folder}/images", f"stages.teacher.student.checkpoint={weights}"]
        race(name, CIFAR10, [*FRAME, *(f"stages.teacher.{t}" for t in TEACHER), *LAYERS, *local], folder)
