"Every registered loss refuses layers and images that do not fit together; `zip` would cut them, and broadcasting would repeat them"
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from basd.core.features import Attention
from basd.core.registry import LOSSES, SELECTORS
from basd.core.sampling import step_generator
from basd.losses.attention import AttentionKLLoss
from basd.losses.base import Layers, build_loss, pair_layers
from basd.losses.mixed_targets import mixed_loss

P, B, GRID, WIDTH, HEADS = 3, 6, (3, 3), 12, 2
SHAPES = dict(widths_s=[WIDTH]*P, widths_t=[WIDTH]*P, heads_s=[HEADS]*P, heads_t=[HEADS]*P)


def side(layers, images, kind, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(images, *shape, generator=g)
    qkv = lambda: Attention(*(draw(HEADS, 9, WIDTH//HEADS) for _ in range(2)), v=draw(HEADS, 9, WIDTH//HEADS))
    return Layers([qkv() if kind == "attention" else draw(9, WIDTH) for _ in range(layers)], [GRID]*layers)


def made(name):
    "The loss, made for three layers of each side, and the samples of a step"
    torch.manual_seed(0)
    loss = build_loss(LOSSES.get(name), {}, SHAPES)
    model = SimpleNamespace(model=SimpleNamespace(head=nn.Linear(WIDTH, 5)))
    loss.setup(model, model)
    return loss, loss.sample([9]*P, B, step_generator(0, 0))


def value(name, student=(P, B), teacher=(P, B), mixed=True):
    "The loss on so many layers and images, as methods call it, or called directly"
    loss, sample = made(name)
    kind = "attention" if loss.inputs == "attention" else "tokens"
    xs, ys = side(*student, kind, 1), side(*teacher, kind, 2)
    if mixed or loss.moves: return mixed_loss(loss, xs, ys, None, sample, torch.zeros(()))
    more = () if sample is None else (sample,)
    return loss(xs, loss.target(ys, xs, *more), *more)


@pytest.mark.parametrize("wrong", [dict(teacher=(P, 1)), dict(teacher=(P, B - 2)), dict(student=(P, 1)), dict(teacher=(P - 1, B)), dict(student=(1, B))])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_pair(name, wrong):
    if LOSSES.get(name).moves and wrong.get("student", (0, 0))[1] == B: pytest.skip("it reads the last layer of the student")
    for mixed in (True, False):
        assert value(name, mixed=mixed).isfinite()
        with pytest.raises(ValueError): value(name, mixed=mixed, **wrong)


def test_all_layers_need_no_partner():
    "Where every teacher layer is imitated, there may be other numbers of layers than the student's"
    loss = AttentionKLLoss([HEADS]*2, [HEADS]*3, scope="all_layers")
    xs, ys = side(2, B, "attention", 1), side(3, B, "attention", 2)
    assert loss(xs, loss.target(ys, xs)) > 0


def test_batches_of_any_size_are_compiled_once():
    "Sizes are compared without being looked up: a compiled step would be compiled again for each of them"
    counter = CompileCounter()
    step = torch.compile(lambda x, y: pair_layers([x], [y])[0].teacher.sum(), backend=counter, dynamic=None)
    for n in (4, 6, 8, 10, 12): step(torch.rand(n, 9, 8), torch.rand(n, 9, 8))
    assert counter.frame_count == 2                            # for the first, and for any


@pytest.mark.parametrize("name", SELECTORS)
def test_too_few_teacher_layers(name):
    "A selector is given as many teacher layers as it reads: weights of the others would be lost, and the student matched to zero"
    torch.manual_seed(0)
    selector = SELECTORS.get(name)([WIDTH]*2, [WIDTH]*4, **({} if "dim" not in signature(SELECTORS.get(name)).parameters else dict(rank=2, dim=6)))
    student, teacher = side(2, B, "tokens", 1), side(4, B, "tokens", 2)
    assert selector(student, teacher, [GRID]*2, [GRID]*4).weights.sum(1).allclose(torch.ones(2))
    with pytest.raises(ValueError): selector(student, teacher[:selector.depth - 1], [GRID]*2, [GRID]*(selector.depth - 1))
