"""A few steps of any recipe, small and in well under a second: its stages are built and trained as by `train`, but nothing is
validated, tested or logged, and of a run directory only what a later stage reads is written; equal trainings are made once"""
import math

from basd.benchmark.entries import _run_of, jobs_of
from basd.core.registry import METHODS
from basd.methods.base import Callback
from basd.models.students import save_student
from basd.runs.builders import input_size
from basd.runs.recipes import load_recipe, write_recipe
from basd.training import build
from basd.training.callbacks import Checkpoint, Diagnostics, MetricsLog, Progress, Refusals, StopRequests, Test, Validation
from basd.training.optimizers import create_optimizer
from basd.training.trainer import Trainer

DATA = ["data.source=digits", "data.test_split=test", "data.download=false", "data.batch_size=8", "data.workers=0", "data.train_size=24",
        "data.val_size=0.1", "train.epochs=1", "train.warmup_epochs=0", "train.lr_steps=null", "train.log_every=1", "train.precision=float32"]
OF_A_DIRECTORY = (Refusals, MetricsLog, StopRequests, Validation, Diagnostics, Checkpoint, Progress, Test)


def small(model, side, depth=4):
    "Changes that make a model of this name small and untrained, as student or as teacher, for images of 16 pixels"
    own = ["img_size=16", "pretrained=false"] + ["untrained=true"]*(side == "teacher")
    if model.startswith(("deit", "vit")):
        if side == "student":
            lifted = ["kwargs.last_width=24"]*model.endswith(("_lift", "_wide_last"))
            return [*own, *lifted, "patch_size=4", f"depth={depth}", "width=24", "heads=3", "drop_path=0"]
        return [*own, f"kwargs={{patch_size: 4, depth: {depth}, embed_dim: 24, num_heads: 3}}"]
    if model.startswith(("resnet56", "wrn")): return [*own, f"model={'resnet20' if model[0] == 'r' else 'wrn_16_2'}_cifar"]
    if model.startswith("convnextv2"): return [*own, "kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8]}"]
    return own if model in ("adaptive_cnn_mnist", "resnet20_cifar") else [*own, f"kwargs={{channels: [8, 8, 16, 16]{', num_classes: 10'*(side == 'teacher')}}}"]


def changes_of(name, *words):
    "Changes that put a recipe on 24 digits, with small models"
    words = [*DATA, *words]
    for stage, r in load_recipe(name, words).items():
        at = f"stages.{stage}."*bool(stage)
        words += [f"{at}student.{w}" for w in small(r.student.model, "student", r.student.depth or 4)]
        if r.teacher.model: words += [f"{at}teacher.{w}" for w in small(r.teacher.model, "teacher")]
    return words


class Steps(Callback):
    "Losses of the steps"
    order = 100
    def __init__(self): self.losses = []
    def after_step(self, t): self.losses.append(t.out["loss"].item())


def trained(recipe, place):
    "Trainer of a recipe after an epoch of three steps; none was skipped, and all losses were finite"
    data = build.TrainingData(recipe, None, METHODS.get(recipe.method.name).requires(recipe.method.options), "cpu")
    task = build.build_task(recipe, data.classes, data.names, "cpu", data.label_scale)
    build._set_views(recipe, data, task)
    optimizer, steps = create_optimizer(task, recipe.train), Steps()
    trainer = Trainer(task, data, optimizer, recipe.train)
    made = build._callbacks_of(recipe, place, data, task, optimizer, False, False)
    trainer.listen([cb for cb in made if not isinstance(cb, OF_A_DIRECTORY)] + [steps])
    data.start_readers(input_size(task.student))
    trainer.fit()
    assert len(steps.losses) == 3 and all(map(math.isfinite, steps.losses)) and trainer.skipped == 0, steps.losses
    return trainer


def keep(trainer, recipe, place):
    "Write what a later training reads of a run"
    place.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, place/"recipe.yaml")
    save_student(trainer.task.student, place)


def take_steps(name, folder, *words):
    "Train the stages of a recipe a few steps each; stage → directory of one that another stage reads, else None"
    jobs, ends = jobs_of(name, changes_of(name, *words))
    places, found = {job.place: job for job in jobs.values()}, {}
    for stage, job in jobs.items():
        run = _run_of(job, 0, folder, places)
        found[stage] = None if stage in ends else folder/run.name
        if found[stage] and (found[stage]/"student.json").is_file(): continue      # of another recipe, with the same content
        trainer = trained(run.recipe, folder/run.name)
        if found[stage]: keep(trainer, run.recipe, found[stage])
    return found
