"""Cost of a BASD step relative to its lower bound, for the settings of the page on speed.

Each row is `basd bench` with the recipe and overrides listed below: random weights, made-up images. A row with `--growth`
is followed by the same with other batch sizes, token counts, widths, layers and student layers, one of them at a time. On two CPU cores
all rows take about a quarter of an hour; `--rows gpu` is for a machine with a GPU and takes under eight minutes.

    python experiments/speed.py [--rows cpu|gpu] [--only NAME …] [--out experiments/results/speed_cpu.json]
"""
import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from basd.benchmark.step_cost import StepCost, overhead, last_stage
from basd.runs.recipes import load_recipe

ALL = "method.losses.spectral.samples=null"                             # spectra of all images
NEAREST = "method.selector.name=nearest"                                # which measures in every step
LARGE = ["basd_imagenet", NEAREST, "data.batch_size=16", "data.workers=2", ALL]  # 224 px, patch 16; teacher 224 px
SMALL = ["basd_cifar10", NEAREST, "data.batch_size=64", "data.workers=2", "teacher.img_size=98",
         "student.drop_path=0", ALL]                                    # 32 px, patch 4; teacher 98 px
SAMPLED = ["method.selector.max_rows=1024", "method.losses.rsd.max_rows=1024", "method.losses.attn.rows=16",
           "method.losses.spectral.samples=2", "method.aligner.samples=4"]
FP32, BF16 = "train.precision=float32", "train.precision=bf16"

CPU = {
    "large fp32 exact": [*LARGE, FP32],
    "large fp32 sampled": [*LARGE, FP32, *SAMPLED],
    "large bf16 exact": [*LARGE, BF16],
    "large bf16 sampled": [*LARGE, BF16, *SAMPLED],
    "small fp32 exact": [*SMALL, FP32],
    "small fp32 sampled": [*SMALL, FP32, *SAMPLED],
    "large fp32 exact cached": [*LARGE, FP32, "--cached"],
    "large fp32 sampled cached": [*LARGE, FP32, *SAMPLED, "--cached"],
    "small fp32 exact cached": [*SMALL, FP32, "--cached"],
    "small fp32 sampled cached": [*SMALL, FP32, *SAMPLED, "--cached"],
    "large bf16 sampled released": [*LARGE, BF16, *SAMPLED, "--release"],
    "small growth": [*SMALL, FP32, *SAMPLED, "--growth", "--reps", "3"],
}
LENT = ["data.batch_size=256", BF16]
FOLLOWED = ["method.selector.solver=tracking", "method.losses.spectral.form=moments", ALL]
GPU = {
    "gpu all spectra eager": ["basd_imagenet", NEAREST, *LENT, ALL],
    "gpu eager": ["basd_imagenet", NEAREST, *LENT],
    "gpu sampled": ["basd_imagenet_fast", "method.selector={name: nearest, solver: tracking, max_rows: 4096}", *LENT, "train.compile=true"],
    "gpu exact": ["basd_imagenet", NEAREST, *LENT, "train.compile=true", *FOLLOWED],
    "gpu exact eager": ["basd_imagenet", NEAREST, *LENT, *FOLLOWED],
}


def varied(recipe, what, value):
    """The recipe with one size changed: images ("B"), student tokens per side ("N"), student width, 64 per head ("D"),
    teacher layers ("L") or student layers ("P")"""
    s, depth = recipe.student, recipe.student.depth or 12
    options = lambda **kw: replace(recipe, method=replace(recipe.method, options=replace(recipe.method.options, **kw)))
    spread = lambda n, of: sorted({round((i + 1)*of/n) - 1 for i in range(n)})
    if what == "B": return replace(recipe, data=replace(recipe.data, batch_size=value))
    if what == "N": return replace(recipe, student=replace(s, img_size=value*(s.patch_size or 16)))
    if what == "D": return replace(recipe, student=replace(s, width=value, heads=max(1, value//64)))
    return options(teacher_layers=spread(value, 12)) if what == "L" else options(student_layers=spread(value, depth))


def growth(recipe, steps=2):
    "How each part of a step grows with each size, up to the recipe's own: seconds of `overhead` and of the bound"
    B, side = recipe.data.batch_size//recipe.train.grad_accum_steps, (recipe.student.img_size or 224)//(recipe.student.patch_size or 16)
    sizes = dict(B=[B//4, B//2, B], N=[side//2, 3*side//4, side], D=[64, 128, 192], L=[3, 6, 12], P=[1, 2, 4])
    out = {}
    for what, values in sizes.items():
        for value in values:
            b = StepCost(varied(recipe, what, value), "cpu")
            b.bound(); b.full()
            parts = b.parts(steps)
            out.setdefault(what, []).append(dict(value=value, bound=sum(v for k, v in parts.items() if k.startswith("bound/")),
                                                 **overhead(parts)))
    return out


def measure(words):
    "One row, in a process of its own"
    if "--growth" in words:
        words = [w for w in words if w != "--growth"]
        recipe = last_stage(load_recipe(words[0], [w for w in words[1:] if "=" in w]))[1]
        return measure(words) | dict(growth=growth(recipe))
    with tempfile.TemporaryDirectory() as tmp:
        done = subprocess.run([sys.executable, "-m", "basd", "bench", *words, "--out", tmp],
                              capture_output=True, text=True)
        if done.returncode: return dict(error=(done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
        print(done.stdout)
        return json.loads((Path(tmp)/"bench.json").read_text())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--rows", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--only", nargs="*", help="names of rows to measure anew; the others stay")
    p.add_argument("--out", default=None)
    args = p.parse_args()
    out = Path(args.out or f"experiments/results/speed_{args.rows}.json")
    rows = CPU if args.rows == "cpu" else GPU
    results = json.loads(out.read_text()) if out.is_file() else {}
    for name, words in rows.items():
        if args.only and name not in args.only: continue
        print(name, flush=True)
        results[name] = measure(words)
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__": main()
