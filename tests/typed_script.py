"What a user's script may look like; `mypy --strict` accepts it, and knows these types"
from typing import Any

import torch
from typing_extensions import assert_type

import basd
from basd.core.features import Features
from basd.models.taps import TappedModel
from basd.models.teachers import FrozenTeacher
from basd.training.task import DistillationTask


def steps(task: DistillationTask, loader: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    losses: list[float] = []
    for step, (images, labels) in enumerate(loader):
        out = task(images, labels, step=step, total_steps=len(loader))
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.after_update()
        losses.append(out["loss"].item())
    return losses


def main() -> None:
    teacher = basd.create_teacher("vit_tiny_patch16_224", img_size=32, patch_size=8, untrained=True)
    student = basd.create_student("deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2)
    task = basd.create_task("basd", student, teacher, num_classes=10)
    assert_type(teacher, FrozenTeacher)
    assert_type(student, TappedModel)
    assert_type(task, DistillationTask)
    assert_type(student(torch.rand(1, 3, 32, 32)), Features)
    print(steps(task, [(torch.rand(4, 3, 32, 32), torch.arange(4))] * 2), sorted(basd.METHODS), "rkd" in basd.LOSSES)
    with basd.tap(student.model) as taps:
        student.model(torch.rand(1, 3, 32, 32))
        assert_type(taps.features(), Features)


def run(folder: str) -> dict[str, Any]:
    recipe = basd.load_recipe("digits", "train.epochs=1")["basd"]
    assert_type(recipe, basd.Recipe)
    recipe.train.epochs += recipe.data.batch_size
    done = basd.train("digits", "train.epochs=1", run_dir=folder, train={"lr": 1e-3})
    print(basd.evaluate(done["basd"]["run_dir"], weights="best"), basd.__version__)
    return basd.compare("kd@digits", "rkd@digits", seeds=1, overrides=["train.epochs=1"])


if __name__ == "__main__":
    main()
