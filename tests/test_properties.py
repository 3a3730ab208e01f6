"""Whatever numbers come in, finite ones come out, or one sentence that says what is wrong. Hypothesis draws shapes, values and options of every piece that
a recipe can reach; losses and methods are found by their registries, so a new one is tested without being named. `BASD_PROPERTIES=long` draws twenty
times as many examples, and others at each run; a failure prints the example that shows it and how to draw it again."""
import inspect
import math
import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from basd.data.mixing import blend_labels, draw_blend
from basd.geometry.alignment import HeadAligner, InterpAligner, TokenAligner, target_health
from basd.geometry.features import Attention, Features
from basd.geometry.fixed_maps import FixedSelector
from basd.geometry.frequency import FrequencySelector
from basd.geometry.selector import GrassmannSelector
from basd.geometry.statistics import step_generator
from basd.losses.attention import AttentionKL, cut_attention, pseudo_attention
from basd.losses.balance import Balance
from basd.losses.fourier import Fourier
from basd.losses.paired import compares, feature_losses, find_feature_loss, made_for
from basd.losses.relational import Relational
from basd.losses.rsd import RSD
from basd.losses.spectral import Spectral
from basd.losses.temperature import Temperature
from basd.methods.distill import LogitLoss, LogitOptions
from basd.methods.exits import ofa
from basd.methods.conflict import binary_kl
from basd.methods.objective import Progress, Shapes, Target, find_objective, objectives

COMMON = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("short", max_examples=20, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=400, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("BASD_PROPERTIES", "short"))

for find in (find_feature_loss, find_objective):     # an unknown name makes both registries read all their pages
    with pytest.raises(ValueError): find("?")

CLASSES, HEADS_S, HEADS_T, STEEP = 5, 3, 2, 1e6
WIDTH_S, WIDTH_T = 12, 24                            # 12 relation heads divide both
PRECISIONS = dict(float32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
KINDS = ("spread", "constant", "still", "zero", "duplicated", "low", "repeated")


@dataclass
class Case:
    "Shapes and values of a batch of features"
    B: int; tokens_s: list; tokens_t: list; grid: bool
    kind_s: str; kind_t: str; size_s: float; size_t: float
    same: bool; precision: str; seed: int

    @property
    def plain(self): return self.size_s == self.size_t == 1


def powers(low, high): return st.one_of(st.just(1.), st.integers(low, high).map(lambda e: 10.**e))


@st.composite
def cases(draw, points=(1, 2), layers=(1, 3), precisions=tuple(PRECISIONS), kinds=KINDS):
    counts = st.sampled_from([1, 4, 9, 16, 2])
    precision = draw(st.sampled_from(precisions))
    sizes = powers(-3, 2) if precision == "fp16" else powers(-8, 4) # fp16 itself ends at 6e-8 and at 65504
    def side(low, high):
        n = draw(st.integers(low, high))
        return draw(st.lists(counts, min_size=n, max_size=n)) if draw(st.booleans()) else [draw(counts)]*n
    return Case(draw(st.integers(1, 5)), side(*points), side(*layers), draw(st.booleans()), draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds)), draw(sizes), draw(sizes),
                draw(st.booleans()), precision, draw(st.integers(0, 99)))


def values(kind, shape, size, g):
    "Tokens (B, N, D), or anything with images first, of one of the `KINDS`"
    x = torch.randn(shape, generator=g)
    if kind == "constant": x = x[:1, :1].expand(shape)                    # one token everywhere
    if kind == "still": x = x[:, :1].expand(shape)                        # one token an image
    if kind == "zero": x = torch.zeros(shape)
    if kind == "duplicated": x = x[:1].expand(shape)                      # one image
    if kind == "low": x = x[..., :1] * x[:1, :1]                          # rank one
    if kind == "repeated":                                                # orthonormal columns or rows: all eigenvalues alike
        u, _, v = torch.linalg.svd(x.reshape(-1, shape[-1]), full_matrices=False)
        x = (u @ v).reshape(shape) * math.sqrt(shape[-1])
    return (size * x).contiguous()


def leaf(x, case): return x.to(torch.float64 if case.precision == "float64" else torch.float32).clone().requires_grad_()


def grid_of(n, case): return (math.isqrt(n),)*2 if case.grid and math.isqrt(n)**2 == n else None


def autocast(case):
    if case.precision in ("float32", "float64"): return nullcontext()
    return torch.autocast("cpu", PRECISIONS[case.precision])


def as_model(x, case):
    "What a model under autocast hands over"
    return x.to(PRECISIONS[case.precision]) if case.precision in ("bf16", "fp16") else x


class Batch:
    "Leaves of both sides, and the features that they make"
    def __init__(self, case, width_s=WIDTH_S, width_t=WIDTH_T):
        g = torch.Generator().manual_seed(case.seed)
        make = lambda kind, size, n, *rest: leaf(values(kind, (case.B, n, *rest), size, g), case)
        self.case = case
        self.student = [make(case.kind_s, case.size_s, n, width_s) for n in case.tokens_s]
        self.teacher = [make(case.kind_t, case.size_t, n, width_t) for n in case.tokens_t]
        if case.same and width_s == width_t: self.student = [leaf(t.detach(), case) for t in self.teacher[:len(self.student)]]*(len(self.student))
        del self.student[len(case.tokens_s):]
        qk = lambda kind, size, n, heads, width: [make(kind, size, n + 1, heads, width//heads).transpose(1, 2).detach().requires_grad_() for _ in range(3)]
        self.qkv_s = [qk(case.kind_s, case.size_s, x.shape[1], HEADS_S, width_s) for x in self.student]
        self.qkv_t = [qk(case.kind_t, case.size_t, x.shape[1], HEADS_T, width_t) for x in self.teacher]
        self.logits_s, self.logits_t = (leaf(values(kind, (case.B, 1, CLASSES), size, g)[:, 0], case) for kind, size in ((case.kind_s, case.size_s), (case.kind_t, case.size_t)))
        self.distilled = leaf(self.logits_s.detach(), case)
        labels = torch.randint(CLASSES, (case.B,), generator=g)
        self.blend = draw_blend(step_generator(case.seed, 0), case.B)
        self.target = Target(blend_labels(labels, CLASSES, self.blend, .1), self.blend)

    def features(self, side, images=None):
        "`Features` of one side"
        student, case = side == "student", self.case
        cast = lambda x: as_model(x if images is None else x[images], case)
        xs, qkv = (self.student, self.qkv_s) if student else (self.teacher, self.qkv_t)
        attention = [Attention(cast(q), cast(k), None, 1, cast(v)) for q, k, v in qkv]
        return Features([cast(x) for x in xs], attention, cast(self.logits_s if student else self.logits_t), [grid_of(x.shape[1], case) for x in xs],
                        cast(self.distilled) if student else None)

    @property
    def of_student(self): return [*self.student, *(t for a in self.qkv_s for t in a), self.logits_s, self.distilled]

    @property
    def of_teacher(self): return [*self.teacher, *(t for a in self.qkv_t for t in a), self.logits_t]


def attempt(f, tally, what=""):
    "The result of `f`, or None where it refuses in one sentence"
    try: out = f()
    except ValueError as e:
        assert 20 < len(str(e)) < 400 and "\n" not in str(e) and type(e) is ValueError, f"{type(e).__name__} is no clear refusal: {e}"
        note(f"refused: {e}")
        tally["refused " + what] += 1
        tally[str(e)] += 1
        return None
    tally["finite " + what] += 1
    return out


def finite(x, what):
    assert x.isfinite().all(), f"{what} is not finite: {x}"
    return x


def sound(loss, case, learners=(), constants=(), least=None):
    "Finite value and gradients, none of them steep at magnitude 1, and none for what is constant"
    assert loss.shape == () and loss.dtype in (torch.float32, torch.float64), loss
    finite(loss, "the loss")
    if least is not None: assert loss >= least - 1e-4*max(1, abs(loss.item())), f"the loss is {loss}, below {least}"
    if loss.requires_grad: loss.backward()
    for x in learners:
        if x.grad is None: continue
        finite(x.grad, f"a gradient of shape {tuple(x.shape)}")
        assert not case.plain or x.grad.abs().max() < STEEP, f"a gradient of shape {tuple(x.shape)} reaches {x.grad.abs().max():g}"
    for x in constants: assert x.grad is None or not x.grad.any(), "the teacher has a gradient"


def choices(cls, p):
    "What an option may be, as its annotation says, or as `cls` does when it is asked for nonsense"
    if get_origin(p.annotation) is Literal: return list(get_args(p.annotation))
    if isinstance(p.default, bool): return [True, False]
    if p.annotation == (int | None): return [p.default, None, 4]
    if p.annotation is not str: return [p.default]
    given = {n: [4] for n, q in inspect.signature(cls).parameters.items() if q.default is q.empty}
    try: cls(**given, **{p.name: "?"})
    except ValueError as e: return [w for w in re.findall(r"'([^']*)'", str(e).split(";", 1)[-1]) if w != "?"] or [p.default]
    return [p.default]


def options(cls, *skip):
    "A strategy of keyword arguments of `cls`"
    ps = [p for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty and n not in skip]
    return st.fixed_dictionaries({p.name: st.sampled_from(choices(cls, p)) for p in ps})


def check(tally, most=.5):
    "Most of what was drawn was computed, not refused"
    done, refused = (sum(n for k, n in tally.items() if k.startswith(w + " ")) for w in ("finite", "refused"))
    assert done and refused <= most*(done + refused), tally


def head(width): return SimpleNamespace(model=SimpleNamespace(head=nn.Linear(width, CLASSES)))


def loss_of(name, given, P):
    "A registered loss for `P` pairs of layers"
    torch.manual_seed(0)
    loss = made_for(find_feature_loss(name), given, dict(widths_s=[WIDTH_S]*P, widths_t=[WIDTH_T]*P, heads_s=[HEADS_S]*P, heads_t=[HEADS_T]*P))
    if hasattr(loss, "meet"): loss.meet(head(WIDTH_S), head(WIDTH_T))
    return loss


TOLD = ("widths_s", "widths_t", "heads_s", "heads_t")


def of_pairs(loss, student, teacher):
    "A registered loss on the features of both sides"
    of, P = compares(loss), len(student.tokens)
    return loss(getattr(student, of), getattr(teacher, of)[:P], step_generator(0, 0), student.grids, teacher.grids[:P])


@pytest.mark.parametrize("name", sorted(feature_losses))
def test_losses_on_pairs(name):
    tally = Counter()
    @given(case=cases(layers=(2, 2)), given=options(feature_losses[name], *TOLD))
    def holds(case, given):
        if compares(feature_losses[name]) == "attention": case.tokens_t = [case.tokens_s[0]]*2; case.tokens_s = case.tokens_s[:1]*len(case.tokens_s)
        batch = Batch(case)
        loss = attempt(lambda: loss_of(name, given, len(batch.student)), tally, "options")
        if loss is None: return
        def run():
            with autocast(case): return of_pairs(loss, batch.features("student"), batch.features("teacher"))
        out = attempt(run, tally)
        if out is not None: sound(out, case, [*batch.of_student, *loss.parameters()], batch.of_teacher, least=0)
    holds()
    check(tally)
