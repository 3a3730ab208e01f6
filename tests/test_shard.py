"A frozen teacher whose weights are divided among two ranks (FSDP2) gives what the whole one gives, to the last bit"
import pytest
import torch
from conftest import TINY
from forks import on_ranks

from basd.core.registry import METHODS
from basd.runs.recipes import load_recipe, teachers_of
from basd.training import build
from basd.training.optimizers import create_optimizer
from basd.training.trainer import Trainer


def trained(shard):
    "Features of the teacher's first layer, the student after an epoch without validation, and the numbers that the teacher's weights are on this rank"
    recipe = load_recipe("basd_cifar10", [*TINY, "train.epochs=1", "train.warmup_epochs=0", "data.train_size=128", f"teacher.shard={shard}"])[""]
    data = build.TrainingData(recipe, None, METHODS.get("basd").requires(recipe.method.options), "cpu")
    task = build.build_task(recipe, data.classes, data.names, "cpu", data.label_scale)
    build._set_views(recipe, data, task)
    trainer = Trainer(task, data, create_optimizer(task, recipe.train), recipe.train)
    build.shard_teacher(task, [*teachers_of(recipe).values()], "cpu")
    build.compile_model(trainer, torch.device("cpu"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): f = task.teacher_fn(x, depth=1)
    features = [(t.clone(), a.probs()) for t, a in zip(f.tokens, f.attention)]
    data.start_readers(16)
    trainer.fit()
    model = task.teacher.model
    if shard: model.reshard()
    share = sum((p.to_local() if shard else p).numel() for p in model.parameters())
    return features, {k: v.clone() for k, v in task.student.state_dict().items()}, share


def both():
    (a, student_a, whole), (b, student_b, share) = trained(False), trained(True)
    return dict(layers=[len(a), len(b)], features=[(u - v).abs().max().item() for x, y in zip(a, b) for u, v in zip(x, y)],
                student=max((student_a[k].float() - student_b[k].float()).abs().max().item() for k in student_a), share=share/whole)


def test_two_ranks(tmp_path):
    "Features, attention, and the student after an epoch of steps"
    found = on_ranks(both, ranks=2, folder=tmp_path)
    assert found["layers"] == [1, 1] and max(found["features"]) == 0 and found["student"] == 0 and .45 < found["share"] < .55, found


@pytest.mark.parametrize("words, sentence", [(["teacher.cache=there"], "outputs in teacher.cache are read"), (["train.compile=true"], "were not tried together")])
def test_what_contradicts_it(words, sentence):
    with pytest.raises(ValueError, match=sentence): load_recipe("basd_cifar10", ["teacher.shard=true", *words])
