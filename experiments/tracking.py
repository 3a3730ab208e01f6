"""Largest angle between the tracked and the exact subspaces of the selector, step by step
of a real run.

    python experiments/tracking.py CIFAR10_FOLDER VIT_TINY.safetensors [STEPS]      # experiments/results/tracking.json

A student of depth 6 and width 96 learns from an ImageNet-pretrained ViT-Tiny/16 at 128 pixels on real CIFAR-10 (folder
in the Hugging Face parquet layout). At each step the tracked basis is compared with a decomposition of the same
running covariance.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch

from basd.geometry.grassmann import principal_angles
from basd.runs.run_directory import environment
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

if __name__ == "__main__":
    data, weights, steps = sys.argv[1], sys.argv[2], int(sys.argv[3] if len(sys.argv) > 3 else 160)
    overrides = [f"data.source=hfds/{data}", "data.root=runs/cache", "data.download=false", "data.val_size=1000",
                 f"data.train_size={64*steps}", "data.batch_size=64", "data.workers=0",
                 "teacher.model=vit_tiny_patch16_224", "teacher.pretrained=false", f"teacher.checkpoint={weights}",
                 "teacher.img_size=128", "student.depth=6", "student.width=96", "student.heads=3",
                 "student.drop_path=0", "method.student_layers=[1, 2, 4, 5]", "method.selector.name=nearest",
                 "method.selector.solver=tracking", "train.epochs=1",
                 "train.warmup_epochs=0.1", "train.precision=float32", "train.ema=null", "train.log_gradients=false"]
    trainer = build_trainer(load_recipe("basd_cifar10", overrides)[""], tempfile.mkdtemp() + "/run", bars=False)
    selector, rows, after = trainer.task.method.selector, [], trainer.task.method.after_update
    def watch():
        k, exact = selector.rank, torch.linalg.eigh(selector.running.double())[1].flip(-1)
        lam = torch.linalg.eigvalsh(selector.running.double()).flip(-1)
        rows.append(dict(settled=selector.warmed_up,
                         angle=principal_angles(selector.basis[..., :k].double(),
                                                exact[..., :k]).max(-1).values.tolist(),
                         gap=((lam[:, k - 1] - lam[:, k])/lam[:, k - 1]).tolist()))
        after()
    trainer.task.method.after_update = watch
    trainer.fit()
    out = Path(__file__).parent/"results"/"tracking.json"
    short = [r | {n: [float(f"{x:.4g}") for x in r[n]] for n in ("angle", "gap")} for r in rows]
    out.write_text(json.dumps(dict(rows=short, rank=selector.rank, points=len(selector.widths_s),
                                   environment=environment())))
    late = torch.tensor([r["angle"] for r in rows if r["settled"]][1:])
    print(f"{len(late)} steps: median {late.median():.2g}, 99 % {late.quantile(.99):.2g}, largest {late.max():.2g} rad")
