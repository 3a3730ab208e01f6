"""Whatever numbers come in, finite ones come out, or one sentence that states what is wrong. Hypothesis draws shapes,
values and options of every piece that a recipe can reach; losses and methods are found by their registries, so a new
one is tested without being named. `BASD_PROPERTIES=long` draws twenty times as many examples, and others at each run; a
failure prints the example that shows it and how to draw it again."""
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
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from basd.data.mixing import mix_labels, sample_mix
from basd.geometry.alignment import HeadAligner, InterpolationAligner, TokenAligner, target_statistics
from basd.core.features import Attention, Features, AttentionMap
from basd.geometry.layer_maps import FixedSelector
from basd.geometry.frequency_selector import FrequencySelector
from basd.core.registry import LOSSES, METHODS, SELECTORS
from basd.core.sampling import step_generator
from basd.losses.attention import AttentionKLLoss, cutmix_attention, self_similarity
from basd.losses.balance import LossBalancer
from basd.losses.fourier import FourierLoss
from basd.losses.base import Layers, build_loss
from basd.losses.mixed_targets import mixed_loss
from basd.losses.token_relations import TokenRelationLoss
from basd.losses.rsd import RSDLoss
from basd.losses.spectral import SpectralLoss
from basd.losses.temperature import LearnedTemperature
from basd.methods.basd import selector_options
from basd.methods.logit_distillation import LogitDistillationLoss, LogitOptions
from basd.methods.early_exits import ofa_loss
from basd.methods.dual_head import bce_kl
from basd.methods.base import StepState, FeatureShapes, Target

COMMON = dict(deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
settings.register_profile("short", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=800, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("BASD_PROPERTIES", "short"))

CLASSES, HEADS_S, HEADS_T = 5, 3, 2
# else 1e6: where a direction is undefined, a slope is one over a floor, and RSD has two floors in a row
STEEP = dict(rsd=1e8, basd=1e8, match=1e8)
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

    @property
    def scale(self): # fp16 ends at 65504; a scale as `torch.amp.GradScaler` finds it
        return 2**-12 if self.precision == "fp16" else 1.


def powers(low, high): return st.one_of(st.just(1.), st.integers(low, high).map(lambda e: 10.**e))


@st.composite
def cases(draw, points=(1, 2), layers=(1, 3), precisions=tuple(PRECISIONS), kinds=KINDS):
    counts = st.sampled_from([1, 4, 9, 16, 2])
    precision = draw(st.sampled_from(precisions))
    sizes = powers(-3, 2) if precision == "fp16" else powers(-8, 4) # fp16 itself ends at 6e-8 and at 65504
    def side(low, high):
        n = draw(st.integers(low, high))
        return draw(st.lists(counts, min_size=n, max_size=n)) if draw(st.booleans()) else [draw(counts)]*n
    return Case(draw(st.integers(1, 5)), side(*points), side(*layers), draw(st.integers(0, 3)) < 3,
                draw(st.sampled_from(kinds)), draw(st.sampled_from(kinds)), draw(sizes), draw(sizes),
                draw(st.booleans()), precision, draw(st.integers(0, 99)))


def values(kind, shape, size, g):
    "Tokens (B, N, D), or anything with images first, of one of the `KINDS`"
    x = torch.randn(shape, generator=g)
    if kind == "constant": x = x[:1, :1].expand(shape)                    # one token everywhere
    if kind == "still": x = x[:, :1].expand(shape)                        # one token per image
    if kind == "zero": x = torch.zeros(shape)
    if kind == "duplicated": x = x[:1].expand(shape)                      # one image
    if kind == "low": x = x[..., :1] * x[:1, :1]                          # rank one
    if kind == "repeated":  # orthonormal columns or rows: all eigenvalues alike
        u, _, v = torch.linalg.svd(x.reshape(-1, shape[-1]), full_matrices=False)
        x = (u @ v).reshape(shape) * math.sqrt(shape[-1])
    return (size * x).contiguous()


def leaf(x, case): return x.to(torch.float64 if case.precision == "float64" else torch.float32).clone().requires_grad_()


def grid_of(n, case): return (1, 2) if n == 2 and case.grid else (math.isqrt(n),)*2 if case.grid else None


def autocast(case):
    if case.precision in ("float32", "float64"): return nullcontext()
    return torch.autocast("cpu", PRECISIONS[case.precision])


def as_model(x, case):
    "Features as a model under autocast returns them"
    return x.to(PRECISIONS[case.precision]) if case.precision in ("bf16", "fp16") else x


class Batch:
    "Leaves of both sides, and the features that they make; the same numbers on both if the case sets it"
    def __init__(self, case):
        self.case, (self.width_t, self.heads_t) = case, (WIDTH_S, HEADS_S) if case.same else (WIDTH_T, HEADS_T)
        g = torch.Generator().manual_seed(case.seed)
        def side(kind, size, tokens, width, heads):
            make = lambda *shape: leaf(values(kind, (case.B, *shape), size, g), case)
            return ([make(n, width) for n in tokens],
                    [[make(n + 1, heads, width//heads) for _ in range(3)] for n in tokens], make(1, CLASSES))
        self.teacher, self.qkv_t, self.logits_t = side(
            case.kind_t, case.size_t, case.tokens_t, self.width_t, self.heads_t)
        self.student, self.qkv_s, self.logits_s = side(case.kind_s, case.size_s, case.tokens_s, WIDTH_S, HEADS_S)
        if case.same:
            again = lambda x: leaf(x.detach(), case)
            P, L = len(self.student), len(self.teacher)
            self.student, self.qkv_s = ([again(self.teacher[p % L]) for p in range(P)],
                                        [[again(t) for t in self.qkv_t[p % L]] for p in range(P)])
            self.logits_s = again(self.logits_t)
        self.distilled = leaf(self.logits_s.detach(), case)
        labels = torch.randint(CLASSES, (case.B,), generator=g)
        self.blend = sample_mix(step_generator(case.seed, 0), case.B, prob=.7)
        self.target = Target(mix_labels(labels, CLASSES, self.blend, .1), self.blend)

    def features(self, side, images=None):
        "`Features` of one side"
        student, case = side == "student", self.case
        cast = lambda x: as_model(x if images is None else x[images], case)
        turned = lambda x: cast(x).transpose(1, 2)
        xs, qkv = (self.student, self.qkv_s) if student else (self.teacher, self.qkv_t)
        attention = [Attention(turned(q), turned(k), None, 1, turned(v)) for q, k, v in qkv]
        return Features([cast(x) for x in xs], attention, cast(self.logits_s if student else self.logits_t)[:, 0],
                        [grid_of(x.shape[1], case) for x in xs], cast(self.distilled)[:, 0] if student else None)

    @property
    def of_student(self): return [*self.student, *(t for a in self.qkv_s for t in a), self.logits_s, self.distilled]

    @property
    def of_teacher(self): return [*self.teacher, *(t for a in self.qkv_t for t in a), self.logits_t]


def attempt(f, tally, what=""):
    "The result of `f`, or None where it refuses in one sentence"
    try: out = f()
    except ValueError as e:
        assert (20 < len(str(e)) < 400 and "\n" not in str(e)
                and type(e) is ValueError), f"{type(e).__name__} is no clear refusal: {e}"
        note(f"refused: {e}")
        tally["refused " + what] += 1
        tally[str(e)] += 1
        return None
    tally["finite " + what] += 1
    return out


def finite(x, what):
    assert x.isfinite().all(), f"{what} is not finite: {x}"
    return x


def sound(loss, case, learners=(), constants=(), least=None, name=None):
    "Finite value and gradients, none of them steep at magnitude 1, and none for what is constant"
    steep = STEEP.get(name, 1e6)*case.scale
    assert loss.shape == () and loss.dtype in (torch.float32, torch.float64), loss
    finite(loss, "the loss")
    if least is not None: assert loss >= least - 1e-4*max(1, abs(loss.item())), f"the loss is {loss}, below {least}"
    if loss.requires_grad: (loss*case.scale).backward()
    for x in learners:
        if x.grad is None: continue
        finite(x.grad, f"a gradient of shape {tuple(x.shape)}")
        assert not case.plain or x.grad.abs().max() < steep, (
            f"a gradient of shape {tuple(x.shape)} reaches {x.grad.abs().max()/case.scale:g}")
    for x in constants: assert x.grad is None or not x.grad.any(), "the teacher has a gradient"


def choices(cls, p):
    "Allowed values of an option, from its annotation or from the error of `cls` for an invalid value"
    if get_origin(p.annotation) is Literal: return list(get_args(p.annotation))
    if isinstance(p.default, bool): return [True, False]
    if p.annotation == (int | None): return [p.default, None, 4]
    if p.annotation is not str: return [p.default]
    given = {n: [4] for n, q in inspect.signature(cls).parameters.items() if q.default is q.empty}
    try: cls(**given, **{p.name: "?"})
    except ValueError as e:
        return [w for w in re.findall(r"'([^']*)'", str(e).split(";", 1)[-1]) if w != "?"] or [p.default]
    return [p.default]


def settled(make, forget):
    "The result of `make` without options that belong to another form (their refusal is tested elsewhere)"
    for _ in range(20):
        try: return make()
        except ValueError as e:
            if not (found := re.match(r"(selector)?(?:\w*\.)*(\w+)=.* belongs to ", str(e), re.DOTALL)): raise
            forget(found[1] or found[2])
    return make()


def options(cls, *skip):
    "A strategy of keyword arguments of `cls`"
    ps = [p for n, p in inspect.signature(cls).parameters.items() if p.default is not p.empty and n not in skip]
    return st.fixed_dictionaries({p.name: st.sampled_from(choices(cls, p)) for p in ps})


def check(tally, most=.5):
    "Most of what was drawn was computed, not refused"
    done, refused = (sum(n for k, n in tally.items() if k.startswith(w + " ")) for w in ("finite", "refused"))
    assert done and refused <= most*(done + refused), tally


def tapped(width, case):
    "A stand-in for a tapped model, with the head that a classifier readout uses"
    return SimpleNamespace(model=SimpleNamespace(head=nn.Linear(
        width, CLASSES, dtype=torch.float64 if case.precision == "float64" else torch.float32)))


def loss_of(name, given, batch):
    "A registered loss for the layers of a batch"
    cls, P = LOSSES.get(name), len(batch.student)
    L = len(batch.teacher) if cls.inputs == "all_layers" else P
    torch.manual_seed(0)
    shapes = dict(widths_s=[WIDTH_S]*P, widths_t=[batch.width_t]*L, heads_s=[HEADS_S]*P, heads_t=[batch.heads_t]*L)
    loss = settled(lambda: build_loss(cls, given, shapes), given.pop)
    teacher = tapped(batch.width_t, batch.case)
    loss.setup(teacher if batch.case.same else tapped(WIDTH_S, batch.case), teacher)
    return loss


TOLD = ("widths_s", "widths_t", "heads_s", "heads_t")


def of_pairs(loss, student, teacher):
    "A registered loss on the features of both sides"
    L = len(teacher.tokens if loss.inputs == "all_layers" else student.tokens)
    kind = "attention" if loss.inputs == "attention" else "tokens"
    xs, ys = Layers(getattr(student, kind), student.grid_sizes), Layers(getattr(teacher, kind)[:L], teacher.grid_sizes[:L])
    if loss.superposed: ys = Layers([y.detach() for y in ys], ys.grid_sizes) # a method may train such targets
    tokens = [x.shape[1] for x in student.tokens]
    return mixed_loss(loss, xs, ys, None, loss.sample(tokens, len(student.tokens[0]), step_generator(0, 0)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_pairs(name):
    tally, cls = Counter(), LOSSES.get(name)
    @given(case=cases(layers=(2, 2)), given=options(cls, *TOLD))
    def holds(case, given):
        if cls.inputs == "attention":  # place by place
            case.tokens_t, case.tokens_s = [case.tokens_s[0]]*2, case.tokens_s[:1]*len(case.tokens_s)
        batch = Batch(case)
        loss = attempt(lambda: loss_of(name, given, batch), tally, "options")
        if loss is None: return
        def run():
            with autocast(case): return of_pairs(loss, batch.features("student"), batch.features("teacher"))
        out = attempt(run, tally)
        if out is None: return
        sound(out, case, [*batch.of_student, *loss.parameters()], batch.of_teacher, least=0, name=name)
        if (case.same and case.plain and case.kind_t == "spread" and case.precision == "float32"
                and case.B*min(case.tokens_t) > 4 and not list(loss.parameters())):
            assert out.abs() < 1e-5, f"a student that is the teacher costs {out}"
    holds()
    check(tally)


@pytest.mark.parametrize("name", LOSSES)
def test_order_and_layout(name):
    "Neither the order of the images nor how they lie in memory changes a loss"
    cls = LOSSES.get(name)
    @settings(max_examples=max(5, settings().max_examples//4))
    @given(case=cases(layers=(2, 2), precisions=("float64",), kinds=("spread", "low", "still", "duplicated")),
           given=options(cls, *TOLD))
    def holds(case, given):
        case.same, case.size_s, case.size_t, case.grid = False, 1., 1., True
        for k in {"images", "samples"} & set(given): given[k] = None         # sampling images depends on their order
        if cls.inputs == "attention":
            case.tokens_t, case.tokens_s = [case.tokens_s[0]]*2, case.tokens_s[:1]*len(case.tokens_s)
        batch = Batch(case)
        loss = attempt(lambda: loss_of(name, given, batch).double(), Counter())
        if loss is None: return
        s, t = batch.features("student"), batch.features("teacher")
        first = attempt(lambda: of_pairs(loss, s, t), Counter())
        if first is None: return
        order = torch.randperm(case.B, generator=torch.Generator().manual_seed(case.seed))
        assert_close(of_pairs(loss, *(batch.features(side, order) for side in ("student", "teacher"))), first,
                     rtol=1e-6, atol=1e-7)
        for f in (s, t): f.tokens = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in f.tokens]
        assert_close(of_pairs(loss, s, t), first, rtol=1e-6, atol=1e-7)
    holds()


STRUCTURE = dict(rsd=RSDLoss, rel=TokenRelationLoss, attn=AttentionKLLoss, spectral=SpectralLoss)


def structural(name, given, batch, order=None):
    ("One of BASD's four losses, as BASD calls it, without selector and aligner; "
     "in a given order of the images, unblended")
    xs, ys, n = batch.student, batch.teacher, [x.shape[1] for x in batch.student]
    torch.manual_seed(0)
    mixed = torch.full((len(xs), len(ys)), 1/len(ys))
    arguments = dict(rsd=([WIDTH_S]*len(xs), [WIDTH_S]*len(xs)),
                attn=([HEADS_S]*len(xs),
                      [batch.heads_t]*len(ys) if given.get("scope") == "all_layers" else batch.heads_t)).get(name, ())
    loss, g, blend = (settled(lambda: STRUCTURE[name](*arguments, **given), given.pop).to(xs[0].dtype),
                      step_generator(0, 0), batch.blend if order is None else None)
    aligned = [values(batch.case.kind_t, x.shape, batch.case.size_t, g).to(x.dtype) for x in xs]
    if order is not None: aligned, ys = [y[order] for y in aligned], [y[order] for y in ys]
    blended = lambda t: t if blend is None else t.lerp(t[blend.partner], 1 - blend.lam)
    def run():
        s, t = batch.features("student", order), batch.features("teacher", order)
        if name == "rsd": return loss(s.tokens, loss.target(aligned, s.tokens), [loss.draw(m, batch.case.B, g) for m in n])
        if name == "rel":
            pairs = loss.draw(min(n), g, "cpu")
            return loss(s.tokens, [blended(u) for u in loss.relations_of(aligned, pairs)], pairs)
        if name == "attn":
            rows = loss.draw(n[0], g)
            if batch.case.seed % 2: t.attention = [AttentionMap(a.probs()) for a in t.attention]
            maps = loss.maps(t.attention, mixed, n, t.grid_sizes, s.grid_sizes, rows)
            if blend is not None and blend.box is not None:
                maps = [cutmix_attention(A, A[blend.partner], blend.own_fraction(m, a), rows) for A, m, a in zip(maps, n, s.grid_sizes)]
            return loss(s.attention, maps, rows)
        images = loss.sample(n, batch.case.B, g)
        source = [y.detach() if images is None else y.detach()[images] for y in ys]
        target = loss.spectra([source[0]]*len(xs), [min(*x.shape[1:], *ys[0].shape[1:]) for x in xs])
        return loss(s.tokens, target, images)
    return loss, run


@pytest.mark.parametrize("name", STRUCTURE)
def test_losses_of_basd(name):
    tally = Counter()
    @given(case=cases(), given=options(STRUCTURE[name], "widths_s", "widths_t", "heads_s", "heads_t"))
    def holds(case, given):
        if name == "attn": case.tokens_t = case.tokens_t[:1]*len(case.tokens_t)
        batch = Batch(case)
        made = attempt(lambda: structural(name, given, batch), tally, "options")
        if made is None: return
        def run():
            with autocast(case): return made[1]()
        out = attempt(run, tally)
        if out is not None:
            sound(out, case, [*batch.of_student, *made[0].parameters()], batch.of_teacher, least=0, name=name)
    holds()
    check(tally, .6)


@pytest.mark.parametrize("name", STRUCTURE)
def test_order_of_basd(name):
    "The four losses do not depend on the order of the images"
    @settings(max_examples=max(5, settings().max_examples//4))
    @given(case=cases(precisions=("float64",), kinds=("spread", "low", "still", "duplicated")),
           given=options(STRUCTURE[name], "widths_s", "widths_t", "heads_s", "heads_t"))
    def holds(case, given):
        case.size_s = case.size_t = 1.
        if name == "attn": case.tokens_t = case.tokens_t[:1]*len(case.tokens_t)
        if "samples" in given: given["samples"] = None                      # sampling images depends on their order
        batch, order = Batch(case), torch.randperm(case.B, generator=torch.Generator().manual_seed(case.seed))
        values = [attempt(lambda: structural(name, given, batch, o)[1](), Counter())
                  for o in (torch.arange(case.B), order)]
        if values[0] is not None: assert_close(*values, rtol=1e-6, atol=1e-7)
    holds()


EDGES = ("spread", "zero", "sure", "wrong", "duplicated", "constant")


def predictions(kind, B, size, g):
    "Logits (B, CLASSES)"
    z = torch.randn(B, CLASSES, generator=g)
    if kind == "zero": z = torch.zeros_like(z)
    if kind in ("sure", "wrong"):  # one-hot at 1e4
        z = torch.eye(CLASSES)[torch.arange(B) % CLASSES]*(1 if kind == "sure" else -1)
    if kind == "duplicated": z = z[:1].expand_as(z)
    if kind == "constant": z = z[:, :1].expand_as(z)
    return (size*z).contiguous()


@st.composite
def logit_cases(draw):
    precision = draw(st.sampled_from(tuple(PRECISIONS)))
    sizes = powers(-3, 4) if precision == "fp16" else powers(-8, 4)
    return Case(draw(st.integers(1, 5)), [], [], False, draw(st.sampled_from(EDGES)), draw(st.sampled_from(EDGES)),
                draw(sizes), draw(sizes), draw(st.booleans()), precision, draw(st.integers(0, 99)))


def of_logits(name, given, case):
    "A loss on logits, with what it learns"
    if name == "ofa": return lambda s, t, target, epoch: ofa_loss(s, t.softmax(-1), target.labels), []
    if name == "dual_head": return lambda s, t, target, epoch: bce_kl(s, t), []
    torch.manual_seed(0)
    forget = lambda n: given.pop(n) if n in given else delattr(given["temperature"], n)
    loss = settled(lambda: LogitDistillationLoss(LogitOptions(**given), CLASSES), forget)
    def run(s, t, target, epoch):
        raw, tau, anchor = loss(s, t, target, epoch)
        return raw if tau is None else raw + anchor
    return run, list(loss.parameters())


@st.composite
def logit_losses(draw):
    name = draw(st.sampled_from(("kl", "dkd", "hard", "vrm", "temperature", "ofa", "dual_head")))
    given = dict(loss="kl" if name == "temperature" else name,
                 direction=draw(st.sampled_from(("forward", "reverse")))) if name not in ("ofa", "dual_head") else {}
    if name == "temperature":
        words = draw(options(LearnedTemperature, "classes"))
        given["temperature"] = SimpleNamespace(**words | dict(
            kind=draw(st.sampled_from(("global", "sample"))), anchor=draw(st.sampled_from((0., .1)))))
    return name, given


def test_losses_on_logits():
    tally = Counter()
    @settings(max_examples=4*settings().max_examples)
    @given(case=logit_cases(), named=logit_losses(), epoch=st.sampled_from((0., .5, 20.)))
    def holds(case, named, epoch):
        g = torch.Generator().manual_seed(case.seed)
        t = leaf(predictions(case.kind_t, case.B, case.size_t, g), case)
        s = leaf(t.detach() if case.same else predictions(case.kind_s, case.B, case.size_s, g), case)
        blend = sample_mix(step_generator(case.seed, 0), case.B, prob=.5)
        target = Target(mix_labels(torch.arange(case.B) % CLASSES, CLASSES, blend, .1*(case.seed % 2)), blend)
        run, learners = of_logits(*named, case)
        def value():
            with autocast(case): return run(as_model(s, case), as_model(t, case), target, torch.tensor(epoch))
        out = attempt(value, tally, named[0])
        if out is None: return
        sound(out, case, [s, *learners], [t], least=None if named[0] == "ofa" else 0)
        if case.same and named[0] == "kl" and blend is None:
            assert out.abs() < 1e-4 and s.grad.abs().max() < 1e-2*case.scale, (
                "a student that says what the teacher says has nothing to learn")
    holds()
    check(tally, .2)


ALL_SELECTORS = dict(frequency=FrequencySelector, fixed=FixedSelector) | SELECTORS.load()
RULES = ("uniform", "first_to_last", "skip", "last", "final", "first", "reversed", "random", "mean", [[0, 0]])


@pytest.mark.parametrize("name", ALL_SELECTORS)
def test_selectors(name):
    tally = Counter()
    @given(case=cases(), given=options(ALL_SELECTORS[name], "rule", "rank", "dim", "tau"), rank=st.integers(1, 7),
           rule=st.sampled_from(RULES), wide=st.booleans(), tau=st.sampled_from((.06, 1., 9.9)), training=st.booleans(),
           drawn=st.booleans())
    def holds(case, given, rank, rule, wide, tau, training, drawn):
        batch = Batch(case)
        P, L = len(batch.student), len(batch.teacher)
        torch.manual_seed(0)
        parameters = inspect.signature(ALL_SELECTORS[name]).parameters
        if given.get("procrustes"): given["procrustes"] = given["space"] == "channel"    # refused elsewhere
        own = {k: v for k, v in dict(rank=rank, dim=16 if wide else 8, tau=tau, rule=rule).items() if k in parameters}
        widths = [x.shape[-1] for x in batch.student], [x.shape[-1] for x in batch.teacher]
        selector = attempt(lambda: ALL_SELECTORS[name](*widths, **given | own), tally, "options")
        if selector is None: return
        selector.train(training)
        def run():
            s, t = batch.features("student"), batch.features("teacher")
            n = [x.shape[1] for x in s.tokens]
            places = selector.sample(n, s.grid_sizes, case.B, step_generator(0, 0) if drawn else None)
            with autocast(case):
                mix = selector(s.tokens, t.tokens, s.grid_sizes, t.grid_sizes, places, time=torch.tensor(step/2))
                return mix, selector.mix(mix.weights, t.tokens, n, t.grid_sizes, s.grid_sizes)
        for step in range(2):                                             # the second after an update
            known = selector.mixed_layers
            out = attempt(run, tally)
            if out is None: return
            mix, mixed = out
            assert known is None or not mix.weights[:, [l for l in range(L) if l not in known]].any()
            assert mix.weights.shape == (P, L) and (mix.weights >= 0).all()
            assert_close(mix.weights.float().sum(-1), torch.ones(P), rtol=1e-5, atol=1e-5)
            for k, v in mix.metrics.items(): finite(v, f"report of {k}")
            assert all((v >= 0).all() for k, v in mix.metrics.items() if k in ("distances", "temperatures", "entropy"))
            assert name not in ("nearest", "learning_progress") or (mix.metrics["entropy"] <= 1.0001).all()
            for x in mixed: finite(x, "mixed tokens")
            selector.zero_grad()
            sound(mix.regularizer, case, selector.parameters(), [*batch.of_student, *batch.of_teacher])
            with torch.no_grad():
                for q in selector.parameters():
                    if q.grad is not None: q -= 1e-3*q.grad/case.scale/max(1., (q.grad/case.scale).norm())
            selector.after_update()
            getattr(selector, "refresh", int)()
            assert 1 <= selector.depth <= L and (mix.weights[:, selector.depth:] == 0).all() or "tau" in parameters
            for q in selector.parameters(): finite(q, "a parameter after a step")
    holds()
    check(tally, .6)


def test_aligners():
    tally = Counter()
    @given(case=cases(points=(1, 1), layers=(1, 1)), kind=st.sampled_from((TokenAligner, InterpolationAligner)),
           codes=st.booleans(), blank=st.booleans())
    def holds(case, kind, codes, blank):
        batch = Batch(case)
        x, n = batch.teacher[0], case.tokens_s[0]
        torch.manual_seed(0)
        aligner = attempt(lambda: kind(n, batch.width_t, WIDTH_S, grid_out=grid_of(n, case),
                                       **dict(pos_embed=codes) if kind is TokenAligner else {}), tally, "options")
        if aligner is None: return
        if blank:                                                         # all queries alike
            for q in aligner.parameters(): nn.init.zeros_(q) if q.shape == (n, WIDTH_S) else None
        def run():
            with autocast(case):
                y = aligner(as_model(x, case), grid_of(x.shape[1], case))
                return y, aligner.reconstruction(y, as_model(x, case), grid_of(x.shape[1], case))
        y, loss = run()
        assert y.shape == (case.B, n, WIDTH_S)
        for k, v in target_statistics(y).items(): finite(v, k)
        finite(y, "the target")
        sound(loss, case, aligner.parameters(), least=0)
        again = aligner(x[:1], grid_of(x.shape[1], case))
        if case.precision == "float32":  # an image does not depend on its batch
            assert_close(again, y[:1], rtol=1e-3, atol=1e-3*max(1., case.size_t))
    holds()
    check(tally)


def test_maps_of_heads():
    @given(case=cases(points=(1, 1), layers=(1, 1)), heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
           bias=st.booleans(), tau=st.sampled_from((.01, .1, 1.)))
    def holds(case, heads, bias, tau):
        g = torch.Generator().manual_seed(case.seed)
        scores = leaf(values(case.kind_s, (case.B, heads[0], case.tokens_s[0], case.tokens_s[0]), case.size_s, g), case)
        torch.manual_seed(0)
        aligner = HeadAligner(*heads, bias=bias)
        with autocast(case): y = aligner(as_model(scores, case))
        sound(finite(y, "scores").softmax(-1).square().sum(), case, [scores, *aligner.parameters()])
        x = leaf(values(case.kind_t, (case.B, case.tokens_t[0], WIDTH_T), case.size_t, g), case)
        with autocast(case): A = self_similarity(as_model(x, case), tau).probs()
        assert_close(A.sum(-1), torch.ones_like(A[..., 0]), rtol=1e-4, atol=1e-4)
        sound(A.square().sum(), case, [x])
    holds()


def test_balance():
    "Weights that sum to one over what is active, whatever the losses are: zero, all alike, or twelve orders apart"
    @given(losses=st.lists(st.lists(st.one_of(st.just(0.), st.floats(-8, 4).map(lambda e: 10**e)),
                                    min_size=4, max_size=4), min_size=1, max_size=5),
           words=options(LossBalancer, "names", "starts"),
           starts=st.lists(st.sampled_from((0., .25, .9)), min_size=4, max_size=4), step=st.integers(0, 20),
           bad=st.sampled_from((None, None, math.nan, math.inf)))
    def holds(losses, words, starts, step, bad):
        names = list("abcd")
        balance = LossBalancer(names, dict(zip(names, starts)), **words | dict(fraction=.5))
        case = Case(1, [], [], False, "", "", 0, 0, False, "float32", 0)
        number = lambda v: torch.tensor(float(v))
        for i, row in enumerate(losses):
            x = torch.tensor(row, requires_grad=True)
            total, report = balance(x, number(step + i), number(40))
            sound(total, case, [x], least=0)
            for k, v in report.items(): finite(v, k)
            assert (report["weights"] >= 0).all() and (report["ramps"] >= 0).all() and (report["ramps"] <= 1).all()
            if words["form"] in ("uwso_ema", "uwso", "fixed"): assert_close(report["weights"].sum(), torch.tensor(1.))
            assert not x.grad[report["ramps"] == 0].any(), "a loss that is ramped to zero pulls"
        if bad is not None:  # a bad step is named by the sentinel; it must not spoil the next
            balance(torch.tensor([bad, 1., 1., 1.]), number(step), number(40))
            for k, v in balance.state_dict().items(): finite(v, k)
            total, _ = balance(torch.ones(4), number(40), number(40))
            finite(total, "the sum after a bad step")
    holds()


# which class checks an option that is a string
SAID = {f"{c.__name__}Options": c
        for c in (*ALL_SELECTORS.values(), LossBalancer, FourierLoss, LearnedTemperature, *STRUCTURE.values())}
SMALL = dict(rank=2, dim=8, max_rows=32, warmup_steps=1, init_from_teacher=False)
LACKING = dict(match=lambda: st.lists(st.sampled_from(list(LOSSES)), min_size=1, max_size=3, unique=True).map(
                   lambda names: dict(losses={n: {} for n in names})))     # what a method's options cannot be without


@dataclass
class Drawn:
    "Options of a method, to be made where a refusal is waited for"
    cls: type; given: dict

    def forget(self, name):
        self.given.pop(name, None)
        for v in self.given.values():
            if isinstance(v, Drawn): v.forget(name)

    def __call__(self): return self.cls(**{k: v() if isinstance(v, Drawn) else v for k, v in self.given.items()})


@st.composite
def settings_of(draw, cls):
    "Options of a method: switches and choices drawn, numbers as they are"
    given, chooser = {}, SAID.get(cls.__name__)
    for f in fields(cls):
        nested = [t for t in (f.type, *get_args(f.type)) if is_dataclass(t)]
        default = f.default if f.default is not MISSING else f.default_factory()
        if nested: given[f.name] = draw(settings_of(nested[0])) if draw(st.integers(0, 3)) else default
        elif f.name in SMALL: given[f.name] = SMALL[f.name]
        elif f.name == "selector":
            if draw(st.integers(0, 3)): given[f.name] = draw(settings_of(selector_options(draw(st.sampled_from(list(SELECTORS))))))
        elif f.name in ("layer_map",): given[f.name] = draw(st.sampled_from([default, "uniform", "reversed"]))
        elif get_origin(f.type) is Literal or isinstance(default, bool):
            given[f.name] = draw(st.sampled_from(list(get_args(f.type)) or [True, False]))
        elif f.type is str and chooser:
            given[f.name] = draw(st.sampled_from(choices(chooser, inspect.signature(chooser).parameters[f.name])))
        elif f.type == (int | None): given[f.name] = draw(st.sampled_from([default, 4]))
    return Drawn(cls, given)


@pytest.mark.filterwarnings("ignore:L_attn is left out")
@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    "Two steps of every method, at any moment of a run, with and without mixing"
    tally, cls = Counter(), METHODS.get(name)
    @given(case=cases(), drawn=settings_of(cls.Options), lacking=LACKING.get(name, lambda: st.just({}))(),
           teachers=st.integers(1, 2), step=st.sampled_from((0, 1, 50, 99)))
    def holds(case, drawn, lacking, teachers, step):
        batch = Batch(case)
        drawn.given |= lacking
        torch.manual_seed(0)
        def teacher_features():
            one = batch.features("teacher")
            return one if teachers == 1 or name not in ("amtml", "diverse") else Features(
                one.tokens, one.attention, one.logits, one.grid_sizes, per_teacher=[one, one])
        def make():
            objective = cls(drawn(), FeatureShapes.from_features(batch.features("student")), FeatureShapes.from_features(teacher_features()), CLASSES)
            student = tapped(WIDTH_S, case)
            if getattr(objective.options, "head", None) == "dist":
                vars(student.model).update(head_dist=student.model.head, set_distilled_training=lambda on: None)
            objective.setup(student, tapped(batch.width_t, case))
            return objective
        objective = attempt(lambda: settled(make, drawn.forget), tally, "options")
        if objective is None: return
        def run(i):
            with autocast(case):
                progress = StepState(step + i, 100, case.seed, (step + i)/10, True)
                return objective(batch.features("student"), teacher_features(), batch.target,
                                 objective.sample(progress, case.B, "cpu"))
        for i in range(2):                                                # the second with what the first has left
            out = attempt(lambda: run(i), tally)
            if out is None: return
            for k, v in {**out["losses"], **out["metrics"]}.items(): finite(v, k)
            objective.zero_grad()
            for x in batch.of_student: x.grad = None
            live = getattr(objective.options, "targets", "constant") == "live"
            sound(out["loss"], case, [*batch.of_student, *objective.parameters()], [] if live else batch.of_teacher,
                  name=name)
            with torch.no_grad():
                for q in objective.parameters():
                    if q.grad is not None: q -= 1e-3*q.grad/case.scale/max(1., (q.grad/case.scale).norm())
            objective.after_update()
            for k, v in objective.state_dict().items():
                if isinstance(v, torch.Tensor) and v.is_floating_point() and k != "best": finite(v, k)
    holds()
    check(tally, .6)
