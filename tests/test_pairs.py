"Every registered loss refuses layers and images that do not fit together; `zip` would cut them, and broadcasting would repeat them"
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from basd.core.features import Attention
from basd.core.registry import LOSSES, SELECTORS
from basd.core.sampling import step_generator
from basd.losses.base import Layers, build_loss
from basd.losses.mixed_targets import mixed_loss

P, B, GRID, WIDTH, HEADS = 3, 6, (3, 3), 12, 2
SHAPES = dict(widths_s=[WIDTH]*P, widths_t=[WIDTH]*P, heads_s=[HEADS]*P, heads_t=[HEADS]*P)


def side(layers, images, kind, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(images, *shape, generator=g)
    qkv = lambda: Attention(*(draw(HEADS, 9, WIDTH//HEADS) for _ in range(2)), v=draw(HEADS, 9, WIDTH//HEADS))
    return Layers([qkv() if kind == "attention" else draw(9, WIDTH) for _ in range(layers)], [GRID]*layers)


def value(name, student=(P, B), teacher=(P, B)):
    "The loss, made for three layers of each side, on these numbers of layers and images"
    torch.manual_seed(0)
    loss = build_loss(LOSSES.get(name), {}, SHAPES)
    model = SimpleNamespace(model=SimpleNamespace(head=nn.Linear(WIDTH, 5)))
    loss.setup(model, model)
    kind = "attention" if loss.inputs == "attention" else "tokens"
    sample = loss.sample([9]*P, B, step_generator(0, 0))
    return mixed_loss(loss, side(*student, kind, 1), side(*teacher, kind, 2), None, sample, torch.zeros(()))


@pytest.mark.parametrize("wrong", [dict(teacher=(P, 1)), dict(teacher=(P, B - 2)), dict(student=(P, 1)), dict(teacher=(P - 1, B)), dict(student=(1, B))])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_pair(name, wrong):
    assert value(name).isfinite()
    if LOSSES.get(name).moves and wrong.get("student", (0, 0))[1] == B: pytest.skip("it reads the last layer of the student")
    with pytest.raises(ValueError): value(name, **wrong)


@pytest.mark.parametrize("name", SELECTORS)
def test_too_few_teacher_layers(name):
    "A selector is given as many teacher layers as it reads: weights of the others would be lost, and the student matched to zero"
    torch.manual_seed(0)
    selector = SELECTORS.get(name)([WIDTH]*2, [WIDTH]*4, **({} if "dim" not in signature(SELECTORS.get(name)).parameters else dict(rank=2, dim=6)))
    student, teacher = side(2, B, "tokens", 1), side(4, B, "tokens", 2)
    assert selector(student, teacher, [GRID]*2, [GRID]*4).weights.sum(1).allclose(torch.ones(2))
    with pytest.raises(ValueError): selector(student, teacher[:selector.depth - 1], [GRID]*2, [GRID]*(selector.depth - 1))
