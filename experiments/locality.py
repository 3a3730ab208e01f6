"""The locality curse at the scale of two processor cores: the teacher, and the attention distance of its student.

    HF_HUB_OFFLINE=1 python experiments/locality.py CIFAR10_FOLDER VIT_TINY.safetensors [RUNS]

CIFAR10_FOLDER holds CIFAR-10 in the Hugging Face parquet layout. Every student has the same architecture, images,
views, schedule and selection rule; rows differ in what is listed in ROWS and in nothing else. Resumes where it was
interrupted; writes experiments/results/locality.json after every run. Then measures the attention distance of the students, trained
and untrained, and the k-NN and linear-probe accuracy of the ImageNet teacher's features (from the same
5,000 training images).
"""
import json
import sys
from pathlib import Path

from basd.analysis.attention_distance import attention_distance
from basd.analysis.evaluation import knn_accuracy, linear_probe, predict
from basd.analysis.compare_runs import open_run
from basd.runs.run_directory import environment
from basd.cli import train
from basd.runs.builders import input_size

REDUCED = ["data.download=false", "data.val_size=2000", "data.train_size=5000", "data.batch_size=128", "data.workers=0",
           "views.crop=center", "train.epochs=12", "train.warmup_epochs=1", "train.log_every=20"]
STUDENT = ["student.depth=6", "student.width=96", "student.heads=3", "student.drop_path=0"]
CNN = ["student.kwargs={channels: [16, 32, 64, 128]}", "views.mixup=0", "views.cutmix=0"]
VIT = ["teacher.model=vit_tiny_patch16_224", "teacher.pretrained=false", "teacher.img_size=128"]
SAMPLED = ["method.distill_weight=0.3", "method.selector.name=nearest", "method.selector.max_rows=1024", "method.losses.rsd.max_rows=1024",
           "method.losses.attn.rows=16", "method.losses.spectral.samples=32", "method.aligner.samples=32"]
ROWS = {
    "cnn": ("resnet18_cifar", CNN),
    "ce": ("deit_cifar", STUDENT),
    "cnn-taught": ("deit_cifar_distill", STUDENT),
    "cka-taught": ("deit_ss_distill_cka_cifar", [*STUDENT, *VIT, "method.teacher_layers=[2, 5, 8, 11]"]),
    # the default when the results were made
    "basd-taught": ("basd_study",
                    [*STUDENT, *VIT, "method.teacher_layers=[1, 3, 5, 7, 9, 11]", *SAMPLED, "method.balance.u_max=2"]),
}


def result(run, recipe, overrides):
    "Results of a run, which is trained or resumed if needed"
    if not (run/"result.json").is_file():
        train(recipe, *overrides, run_dir=str(run), resume=(run/"recipe.yaml").is_file(), bars=False)
    r = json.loads((run/"result.json").read_text())
    return dict(val=r["val_top1"], test=r["test"][r["exported"]]["top1"], seconds=r["seconds"])


def looks(run):
    ("Distance and entropy of attention of each layer and head of a run's student on 1,000 test images, "
     "and of the same student untrained")
    o = open_run(run, images=1000)
    keep = lambda r: {k: r[k] for k in ("distance", "entropy", "grid", "uniform", "n")}
    return dict(trained=keep(attention_distance(o.student, o.batches())),
                untrained=keep(attention_distance(o.untrained(), o.batches())))


def teacher_probe(run):
    "k-NN and linear-probe accuracy of the teacher's last layer"
    o = open_run(run)
    bank, test = (predict(o.teacher, images, which, input_size(o.teacher))
                  for images, which in ((o.train, o.fit), (o.test, None)))
    data = bank["features"], bank["labels"], test["features"], test["labels"]
    return dict(knn=knn_accuracy(*data)["top1"], linear_probe=linear_probe(*data)["top1"])


if __name__ == "__main__":
    data, weights, *rest = sys.argv[1:]
    folder, out = Path(rest[0] if rest else "runs/locality"), Path(__file__).parent/"results"/"locality.json"
    here = [f"data.source=hfds/{data}", f"data.root={folder}/images"]
    rows = []
    for seed in range(3):
        for name, (recipe, overrides) in ROWS.items():
            local = [f"train.seed={seed}", *here]
            if name == "cnn-taught": local.append(f"teacher.run={folder}/cnn-{seed}")
            if "teacher.img_size=128" in overrides:
                local += [f"teacher.checkpoint={weights}", f"teacher.cache={folder}/cache-{name}"]
            rows.append(dict(seed=seed, row=name)
                        | result(folder/f"{name}-{seed}", recipe, [*REDUCED, *overrides, *local]))
            print(rows[-1], flush=True)
            commands = {n: " ".join(["basd train", r, *REDUCED, *o]) for n, (r, o) in ROWS.items()}
            out.write_text(json.dumps(dict(rows=rows, commands=commands, environment=environment()), indent=1))
    found = json.loads(out.read_text())
    found["attention"] = {name: [looks(folder/f"{name}-{seed}") for seed in range(3)] for name in ROWS if name != "cnn"}
    found["teacher"] = teacher_probe(folder/"cka-taught-0")
    out.write_text(json.dumps(found, indent=1))
