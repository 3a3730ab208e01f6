"""Can a layer selector find a planted layer among the real features of a vision transformer?

For each block `l` of a ViT-Tiny the student is that block's tokens in other channels (a random rotation) plus Gaussian
noise. Every form of the selector then has to find `l`. One JSON holds the distances of all forms.

The same under MixUp and CutMix, where the teacher sees the images whole. The student is then either the target of
training, the planted layer's tokens mixed as the images are, or what a model makes of mixed images, the
planted layer's tokens of the mixed images themselves. The selector mixes the teacher's rows, or takes them as they are.

    python experiments/planted_layers.py --data DIR_OF_PARQUET --weights vit_tiny_patch16_224.augreg.safetensors
"""
import argparse
import io
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image

from basd.data.mixing import MixParams, mix_images
from basd.geometry.selector import GrassmannSelector, mix_blended_tokens
from basd.core.numerics import effective_rank

FORMS = {
    "literal": dict(space="channel", mode="learned", normalize="none", tau=2.0, recon_form="mean", recon=.01, orth=.01),
    "channel": dict(space="channel"),
    "procrustes": dict(space="channel", procrustes=True),
    "sample": dict(),
}
# the image's own share, and the side of the box that comes in from the partner, relative to the image's
BLENDS = {"MixUp 0.2": (.2, None), "MixUp 0.5": (.5, None), "MixUp 0.8": (.8, None), "CutMix 0.5": (.5, .5**.5)}


def read_images(folder, count):
    "The first `count` test images of a parquet folder with an `img` column"
    file = sorted(Path(folder).rglob("test-*.parquet"))[0]
    table = next(pq.ParquetFile(file).iter_batches(batch_size=count, columns=["img"]))
    return [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table.column("img").to_pylist()]


def as_tensor(images):
    "Images as the model takes them, (B, 3, 224, 224)"
    x = torch.stack([torch.from_numpy(np.array(i.resize((224, 224), Image.BICUBIC))) for i in images])
    return x.permute(0, 3, 1, 2).float().div(255).sub(.5).div(.5)


@torch.no_grad()
def block_tokens(x, weights, batch=16):
    "Patch tokens after each block, L × (B, N, D), class token removed"
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=weights).eval()
    parts = [model.forward_intermediates(b, output_fmt="NLC", intermediates_only=True) for b in x.split(batch)]
    return [torch.cat(layer) for layer in zip(*parts)]


def turned(x, noise, generator):
    "`x` in other channels, plus noise relative to its own spread"
    Q = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], generator=generator))[0]
    return x @ Q + noise*(x - x.mean((0, 1))).square().mean().sqrt()*torch.randn(x.shape, generator=generator)


def measure(shown, xs, options, args, seed, blend=None, grid=(14, 14)):
    "Distances (L, L) and mean entropy: one row per planted layer as `shown`, one column per teacher layer"
    torch.manual_seed(seed)
    widths = [x.shape[-1] for x in xs]
    selector = GrassmannSelector(widths, widths, rank=args.rank, dim=args.dim, max_rows=args.rows, **options)
    generator = torch.Generator().manual_seed(1000 + seed)
    planted, grids = [turned(x, args.noise, generator) for x in shown], [grid]*len(xs)
    with torch.no_grad(): mix = selector(planted, xs, grids, grids, blend=blend)
    return mix.metrics["distances"], mix.metrics["entropy"].mean().item()


def hits(distances):
    "Number of planted layers whose nearest teacher layer is their own"
    return int((distances.argmin(1) == torch.arange(len(distances))).sum())


def nearest(d):
    "Distance of each planted layer to its own, and to the nearest other one, and which that is"
    other, which = d.clone().fill_diagonal_(torch.inf).min(1)
    rounded = lambda x: [round(v, 3) for v in x.tolist()]
    return dict(own=rounded(d.diagonal()), other=rounded(other), which=which.tolist())


def blends(images, xs, args):
    """Planted layers found under each kind of mixing, with mixed rows and with those of whole images, one number per seed; of
    the mixed images also with rows of a teacher that sees them, and the distance of each layer to its own and to the nearest other"""
    images, xs, out = as_tensor(images[:args.blended]), [x[:args.blended] for x in xs], {}
    partner = torch.arange(len(images)) ^ 1
    for name, (lam, side) in BLENDS.items():
        out[name] = {of: dict(blended=[], whole=[]) for of in ("blended tokens", "blended images")}
        for seed in range(args.seeds):
            corner = torch.rand(2, generator=torch.Generator().manual_seed(seed))*(1 - (side or 0))
            blend = MixParams(partner, torch.tensor(lam), None if side is None else torch.cat([corner, corner + side]))
            keep = blend.own_fraction(xs[0].shape[1], (14, 14))
            seen = block_tokens(mix_images(images, blend), args.weights)
            for of, shown in {"blended tokens": [mix_blended_tokens(x, blend, keep) for x in xs], "blended images": seen}.items():
                for rows, how in (("blended", blend), ("whole", None)):
                    d = measure(shown, xs, {}, args, seed, how)[0]
                    out[name][of][rows].append(hits(d))
                    if rows == "blended" and not seed: out[name][of] |= nearest(d)
            out[name]["blended images"].setdefault("seen", []).append(hits(measure(seen, seen, {}, args, seed)[0]))
        print(name, out[name], flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder of parquet files with an img column")
    parser.add_argument("--weights", required=True, help="safetensors of timm's vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--blended", type=int, default=64, help="images of the part with blends")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--noise", type=float, default=.3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-blends", action="store_true", help="make the part with blends again, and keep the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent/"results"/"planted_layers.json")
    args = parser.parse_args()

    start = time.time()
    images = read_images(args.data, args.images)
    xs = block_tokens(as_tensor(images), args.weights)
    if args.only_blends:
        found = json.loads(args.out.read_text()) | dict(blends=blends(images, xs, args))
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    forms = {}
    for name, options in FORMS.items():
        runs = [measure(xs, xs, options, args, seed) for seed in range(args.seeds)]
        by_seed = [hits(d) for d, _ in runs]
        forms[name] = dict(found=sum(by_seed), planted=len(xs)*args.seeds, found_by_seed=by_seed,
                           entropy=float(np.mean([e for _, e in runs])),
                           distances=[[round(v, 4) for v in row] for row in runs[0][0].tolist()])
        print(name, by_seed, f"entropy {forms[name]['entropy']:.4f}", flush=True)

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = dict(model="vit_tiny_patch16_224 (augreg, ImageNet)", data="first CIFAR-10 test images, 224 px bicubic",
                  images=args.images, rows=args.rows, rank=args.rank, dim=args.dim, noise=args.noise, seeds=args.seeds,
                  layers=len(xs), forms=forms, blended_images=args.blended, blends=blends(images, xs, args),
                  effective_rank=[round(effective_rank(x.flatten(0, 1)).item(), 1) for x in xs],
                  commit=git.stdout.strip(), torch=torch.__version__, timm=timm.__version__,
                  hardware=f"{platform.machine()} CPU, {os.cpu_count()} cores", seconds=round(time.time() - start, 1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
