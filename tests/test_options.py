"""An option that is accepted and then ignored is a wrong experiment. Every option of every method and of every loss is
moved from its default, alone and (slow) beside each choice of a form, and something must change, or it is refused by name."""
import copy
import re
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import zip_longest
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import timm
import torch
from pydantic import TypeAdapter

from basd.data.mixing import MixParams, sample_mix
from basd.core.features import Features
from basd.core.registry import LOSSES, METHODS, SELECTORS, options_from
from basd.core.sampling import step_generator
from basd.losses.base import SHAPE_ARGUMENTS
from basd.methods.basd import selector_options
from basd.methods.base import StepState, FeatureShapes, Target
from basd.models.taps import TappedModel
from basd.runs.recipes import build_recipe

B, C, STEPS = 8, 6, 4
LONGER = dict(pocl=6, complementary=6)      # steps where an option is read late
NO = object()

# values to try where the type does not determine them; the first option path that ends like it counts
TRY = {
    "student_layers": [[0, 2]], "teacher_layers": [[1, 2]], "layer_map": ["reversed"], "losses.kappa": ["1/D"],
    "kappa": [.1, "1/D"], "scores": [["margin"]], "temperatures": [(1., 3.)], "alphas": [(.5, 1.)],
    "ramp_starts": [dict(rsd=.5)], "weights": [dict(rsd=.1, rel=.2, attn=.3, spectral=.4), None], "relations": [("qk", "vv")],
    "temperature": [{}, 3.], "losses": [dict(token_cosine={})], "debias": [False, True], "images": [4], "max_rows": [16],
    "leap.limit": [1.], "warmup_steps": [2], "goal": ["last"], "share": [1e9], "fast": [.01], "until": [.9, .01], "batches": [1], "selector": [dict(name="ramp")],
}
# words that are checked where they are used
WORDS = {"rsd.reduction": ("dim", "sum", "mean"), "rsd.norm": ("layer", "batch"), "spectral.align": ("truncate", "pool"),
         "spectral.reduction": ("sum", "mean"), "rel.form": ("direction", "gram", "smooth_l1"),
         "spectral.form": ("svd", "batch", "moments"), "balance.form": ("uwso_ema", "equal", "uwso", "uwso_original", "fixed"),
         "gram.form": ("squared", "norm"), "cka.rows": ("token", "image", "within")}
# options that rightly change nothing in this short training, and why
EXPLAINED = {
    "init_from_teacher": "refused where the models differ in shape, as these do",
    ("match", "logits"): "is in the base already",
    # the teacher layers of the pairs are all there are, so "joint" and "all_layers" are one; "point" differs
    ("match", "losses.attn.scope"): "all pairs are compared in either",
    "losses.spectral.align": "both sides have as many singular values here, and nothing to cut or pool",
    "balance.floor": "acts when a loss has fallen to a quarter of its first level (page on balance)",
    **{(n, "selector.dim"): "is for layers of different widths, and these have one" for n in ("complementary", "arc_length")},
    **dict.fromkeys(("losses.leap.ahead", "selector.ahead"), "is what is run between two rows of the log, and here every step has one"),
    ("nearest_once", "selector.least"): "acts when the weights are settled, after more steps than these (page on maps measured once)",
    "balance.warmup_steps": "is how many steps that first level is a mean of",
}


def kinds(hint):
    "The types that a hint allows"
    if get_origin(hint) is Annotated: return kinds(get_args(hint)[0])
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return [k for h in get_args(hint) for k in kinds(h)]
    return [hint]


def leaves(kind, path=()):
    "Path, hint and default of each option below a class of options"
    hints = get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        default = f.default if f.default is not MISSING else f.default_factory()
        nested = [k for k in kinds(hints[f.name]) if is_dataclass(k)]
        if nested:
            if type(None) in kinds(hints[f.name]): yield (*path, f.name), hints[f.name], default
            yield from leaves(nested[0], (*path, f.name))
        else: yield (*path, f.name), hints[f.name], default


def values(path, hint, default):
    "Other values of an option"
    for i in range(len(path)):
        if (known := TRY.get(".".join(path[i:]))) is not None: return [v for v in known if v != default]
    out = choices(path, hint, default)
    for k in kinds(hint):
        if k is int: out += [2, 4] if default is None else [default + 1, max(default//2, 1)]
        elif k is float: out += [1.5, .5] if default is None else [default/2, 2*default, default + .25]
        elif is_dataclass(k): out += [{}] if default is None else [None]
    assert out, f"{'.'.join(path)}: {hint} has no values to try; name some in TRY"
    return [v for v in out if v != default]


def choices(path, hint, default):
    "The forms among an option's values"
    words = WORDS.get(".".join(path[-2:]), ())
    return [v for k in kinds(hint) for v in
            (([] if default is None else [not default]) if k is bool else get_args(k) if get_origin(k) is Literal else words if k is str else ())
            if v != default]


def put(words, path, value):
    "A copy of nested options with one of them set"
    head, *rest = path
    return words | {head: put(words.get(head) or {}, rest, value) if rest else value}


def models():
    torch.manual_seed(0)
    make = lambda **k: timm.create_model("vit_tiny_patch16_224", num_classes=C, img_size=16, patch_size=4, **k)
    return make(depth=4, embed_dim=32, num_heads=2), make(depth=5, embed_dim=48, num_heads=4)


IMAGES = torch.randn(max(STEPS, *LONGER.values()), B, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def tapped(student_layers, teacher_layers):
    "Student and teacher, with what they make of IMAGES before any training; the student's features of the first step alone"
    layers = lambda l: {"default": "all", None: []}.get(l, list(l) if isinstance(l, tuple) else l)
    student, teacher = (TappedModel(m, layers(l)) for m,l in zip(models(), (student_layers, teacher_layers)))
    with torch.no_grad(): return student, teacher, student(IMAGES[0]), [teacher(x) for x in IMAGES]


def frozen(layers): return tuple(layers) if isinstance(layers, list) else layers


def seen(x): # numbers of anything that is reported
    return [] if x is None else [float(v) for v in torch.as_tensor(x).detach().double().flatten()]


def trained(name, words):
    "The numbers that a short training with these options produces, a list for its start, each step and its end"
    cls = METHODS.get(name)
    options = TypeAdapter(cls.Options).validate_python(words)
    needs = cls.requires(options)
    yield [float(v) for v in (needs.attention, needs.views_per_image)]
    student, teacher, first, of_teacher = tapped(frozen(needs.student_layers), frozen(needs.teacher_layers))
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    g, steps = torch.Generator().manual_seed(1), LONGER.get(words.get("selector", {}).get("name", name), STEPS)
    f = first, of_teacher[0]
    of_two = lambda t: Features(t.tokens, t.attention, t.logits, t.grid_sizes, per_teacher=[t, Features(
        [y.flip(1) for y in t.tokens], t.attention, -t.logits, t.grid_sizes)])
    if name in ("amtml", "diverse"): f = f[0], of_two(f[1])
    torch.manual_seed(2)
    objective = cls(options, FeatureShapes.from_features(f[0]), FeatureShapes.from_features(f[1]) if needs.teacher else None, C)
    second = getattr(options, "head", None) == "dist"
    if second: student.model.head_dist, student.model.set_distilled_training = torch.nn.Identity(), lambda on: None
    objective.train(); objective.setup(student, teacher if needs.teacher else None)
    params = [p for m in (student, objective) for p in m.parameters() if p.requires_grad]
    opt = torch.optim.SGD(params, lr=.3)
    labels = torch.nn.functional.one_hot(torch.arange(B) % C, C).float()
    logits = dict(labels=torch.arange(40) % C, student=torch.randn(40, C, generator=g),
                  teacher=torch.randn(40, C, generator=g))
    for step in range(steps):
        out = seen(objective.plan(step, steps, lambda: logits)) if hasattr(objective, "plan") else []
        torch.manual_seed(10 + step)
        s = student(IMAGES[step])
        if second: s.dist_logits = s.logits.roll(1, 1) + .1*s.logits
        t = copy.deepcopy(of_teacher[step]) if needs.teacher else None
        if name in ("amtml", "diverse"): t = of_two(t)
        blend = sample_mix(step_generator(0, step), B, prob=.7)
        result = objective(s, t, Target(labels, blend), StepState(2*step, 60, 0, epoch=step/2, should_log=True))
        opt.zero_grad(); result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(params, 1.); opt.step(); objective.after_update(); objective.refresh()
        out += [v for values in (result["losses"], result["metrics"]) for k in sorted(values) for v in seen(values[k])]
        yield out + [p.grad.double().norm().item() for p in params if p.grad is not None]
    yield [p.detach().double().abs().sum().item() for p in params] + [float(len(objective.no_weight_decay()))]


def differ(a, b):
    "Whether two lists of numbers differ by more than rounding"
    if len(a) != len(b): return True
    a, b = torch.tensor(a), torch.tensor(b)
    return bool(((a - b).abs() > 1e-5*b.abs() + 1e-7).any())


def moves(name, words, before, option):
    "Whether a training with these options differs from the one `before`, until it does; or a sentence refuses the option"
    try: return any(differ(a, b) for a, b in zip_longest(trained(name, words), before, fillvalue=[]))
    except ValueError as e: return option in str(e)


ALONE = ("basd", "basd_literal")  # too many forms to move each option beside each of them
INHERITED = {"basd_literal": "basd"}    # what a method inherits is tried each week, and with its parent at each push
AT = dict(progressive=dict(share=1e-9)) # where an option is seen in a few steps: the frontier moves
NEEDED = dict(qkv_relations=dict(heads=2), rel=dict(form="gram"))  # options that a loss cannot be without here
CASES = [(n, {}) for n in METHODS if n not in ("ce", "match")] + [
    ("match", dict(losses={n: NEEDED.get(n, {})}, **({} if LOSSES.get(n).inputs == "all_layers" else {"layer_map": "uniform"})))
    for n in LOSSES] + [("match", dict(losses=dict(gram={}), logits={}))] + [
    ("basd", dict(selector=dict(name=n) | AT.get(n, {}))) for n in SELECTORS]


def of_selector(name):
    "The options of a selector, below the method"
    return [(("selector", *p), h, d) for p,h,d in leaves(selector_options(name)) if p != ("name",)]


@pytest.mark.parametrize("beside", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "beside"])
@pytest.mark.parametrize("name, base", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.get("losses", [v["selector"]["name"]] if "selector" in v else [])))
def test_every_option(name, base, beside):
    "Alone; `beside`: beside each choice of a form, and those that a method has from another"
    options = METHODS.get(name).Options
    own = list(leaves(options))
    if (parent := INHERITED.get(name)) and not beside: own = [o for o in own if o not in list(leaves(METHODS.get(parent).Options))]
    if "losses" in base:
        loss, = base["losses"]
        own = [(("losses", loss, *p), h, d) for p,h,d in leaves(options_from(LOSSES.get(loss), *SHAPE_ARGUMENTS))] + (
            own if "logits" in base else [])
    if "selector" in base: own = of_selector(base["selector"]["name"])
    silent = []
    contexts = [((), NO)]
    if beside: contexts = contexts*(name in INHERITED) + [(p, v) for p,h,d in own for v in choices(p, h, d) if name not in ALONE]
    for context, choice in contexts:
        words = base if choice is NO else put(base, context, choice)
        try: before = list(trained(name, words))
        except ValueError as refused:
            assert context and (context[-1] in str(refused) or context[-1] in EXPLAINED), f"{context}: {refused}"
            continue
        # with a choice, the options beside it
        here = own if choice is NO else [o for o in own if o[0][:-1] == context[:-1] and o[0] != context]
        for path, hint, default in here:
            key = ".".join(path)
            each = values(path, hint, default)
            forms = [v for v in choices(path, hint, default) if put(words, path, v) != words]
            read = (all if forms else any)(moves(name, put(words, path, v), before, path[-1]) for v in forms or each)
            why = EXPLAINED.get((base.get("selector", {}).get("name", name), key)) or EXPLAINED.get(key)
            if not read and not why: silent.append(key + ("" if choice is NO else f" beside {context[-1]}={choice}"))
    assert not silent, f"{name} {base}: nothing reads {', '.join(silent)}"


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ce"}))
def test_no_number_is_negative(name):
    "A recipe with a negative weight, temperature or count is refused in a sentence that names the key"
    cases = [((), METHODS.get(name).Options)]
    if name == "match": cases = [(("losses", n), options_from(f, *SHAPE_ARGUMENTS)) for n, f in sorted(LOSSES.load().items())] + cases
    if name == "basd": cases += [(("selector", n), selector_options(n)) for n in SELECTORS]
    for at, cls in cases:
        for path, hint, _ in leaves(cls):
            if path[0] in ("student_layers", "teacher_layers", "layer_map") or not {int, float} & set(kinds(hint)): continue
            path = (*at, *path)
            if at[:1] == ("selector",): words = dict(name=name, selector=dict(name=at[1]) | {path[-1]: -1})
            else:
                words = put(put(dict(losses=dict(cka={})) if name == "match" else {}, path, -1), ("name",), name)
            with pytest.raises(ValueError, match=path[-1]) as e: build_recipe(dict(method=words))
            assert "Traceback" not in str(e.value), e.value


def test_what_a_rule_leaves_unread():
    "Options of the selector beside a map that takes its place"
    rule = dict(name="basd", layer_map="uniform")
    for path, hint, default in of_selector("nearest"):
        for v in values(path, hint, default):
            with pytest.raises(ValueError, match=f"selector.{path[-1]}"): build_recipe(dict(method=put(rule, path, v)))


@pytest.mark.parametrize("name, base", CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.get("losses", [v["selector"]["name"]] if "selector" in v else [])))
def test_what_is_refused_is_named(name, base):
    "A sentence that refuses an option, or two that contradict each other, begins with the whole key of one of them"
    own = list(leaves(METHODS.get(name).Options))
    if "losses" in base:
        loss, = base["losses"]
        own = [(("losses", loss, *p), h, d) for p,h,d in leaves(options_from(LOSSES.get(loss), *SHAPE_ARGUMENTS))] + own
    if "selector" in base: own = of_selector(base["selector"]["name"])
    moved = [put(base, p, v) for p,h,d in own for v in values(p, h, d)]
    pairs = [put(put(base, p, v), q, w) for p,h,d in own for v in choices(p, h, d) for q,k,e in own for w in values(q, k, e)
             if q[:len(p)] != p and p[:len(q)] != q]
    wrong = [put(base, p, "no such word") for p,h,d in own]
    known, odd = {".".join(p[:i + 1]) for p,_,_ in own for i in range(len(p))}, set()
    for words in moved + pairs + wrong:
        try: build_recipe(dict(method=words | dict(name=name)))
        except ValueError as e:
            key = re.match(r"(?:unknown key )?method\.([\w.]+)(?<!\.)", str(e))
            if not key or key[1] not in known: odd.add(str(e)[:160])
    assert not odd, "\n".join(sorted(odd))


@pytest.mark.parametrize("method", ["basd", "match"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_in_both_methods(method, loss):
    "A registered loss is finite and reaches the student, under MixUp, under CutMix and on whole images"
    own = dict(trajectory=dict(space="cka"))              # aligned targets are no layers that the teacher's head reads
    cls, more = METHODS.get(method), {loss: NEEDED.get(loss, {}) if method == "match" else NEEDED.get(loss, {}) | own.get(loss, {})}
    words = dict.fromkeys(("rsd", "rel", "attn", "spectral")) | more if method == "basd" else more
    options = TypeAdapter(cls.Options).validate_python(dict(losses=words))
    needs, (plain_s, plain_t) = cls.requires(options), models()
    layers = lambda l: "all" if l == "default" else l
    student, teacher = TappedModel(plain_s, layers(needs.student_layers)), TappedModel(plain_t, layers(needs.teacher_layers))
    x, pairs = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(B) ^ 1
    s, t = student(x), teacher(x.flip(0))
    objective = cls(options, FeatureShapes.from_features(s), FeatureShapes.from_features(t), C)
    objective.setup(student, teacher)
    labels = torch.nn.functional.one_hot(torch.arange(B) % C, C).float()
    for blend in (None, MixParams(pairs, torch.tensor(.7)), MixParams(pairs, torch.tensor(.75), torch.tensor([0., 0., .5, .5]))):
        part = objective(s, t, Target(labels, blend), StepState(59, 60))["losses"][loss]
        gradients = torch.autograd.grad(part, list(student.parameters()), retain_graph=True, allow_unused=True)
        reach = sum(g.abs().sum() for g in gradients if g is not None)
        assert part.isfinite() and reach.isfinite()
        cut = blend is not None and blend.box is not None
        assert reach > 0 or cut and loss in ("attention_scores", "qkv_relations"), "a loss without a target under CutMix is zero, others are not"
        assert not any(g is not None and g.any() for g in torch.autograd.grad(
            part, list(teacher.parameters()), retain_graph=True, allow_unused=True)), "the teacher has a gradient"
