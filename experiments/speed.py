"""What a BASD step costs beside its lower bound, for the settings of the page on speed.

Each row is `basd bench` with the recipe and overrides listed below: random weights, made-up images. On two CPU cores
all rows take about a quarter of an hour; `--rows gpu` is for a machine with a GPU and takes under eight minutes.

    python experiments/speed.py [--rows cpu|gpu] [--only NAME …] [--out experiments/results/speed_cpu.json]
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ALL = "method.losses.spectral.samples=null"                             # spectra of all images
LARGE = ["basd_imagenet", "data.batch_size=16", "data.workers=2", ALL]  # 224 px, patch 16; teacher 224 px
SMALL = ["basd_cifar10", "data.batch_size=64", "data.workers=2", "teacher.img_size=98",
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
FOLLOWED = ["method.selector.solver=track", "method.losses.spectral.form=moments", ALL]
GPU = {
    "gpu all spectra eager": ["basd_imagenet", *LENT, ALL],
    "gpu eager": ["basd_imagenet", *LENT],
    "gpu sampled": ["basd_imagenet_fast", *LENT, "train.compile=true"],
    "gpu exact": ["basd_imagenet", *LENT, "train.compile=true", *FOLLOWED],
    "gpu exact eager": ["basd_imagenet", *LENT, *FOLLOWED],
}


def measure(words):
    "One row, in a process of its own"
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
