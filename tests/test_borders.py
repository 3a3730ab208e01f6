"""What Python hands to the public classes and functions, and fits nothing, is refused in a sentence where it was taken in silence: shapes
that broadcast, floats cut to integers, masks read as positions, other scales, negative weights. And state that has to follow its owner does."""
import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from basd import create_student, create_task, create_teacher
from basd.data.mixing import MixParams, mix_labels
from basd.data.sources import ImageDataset, Source, stratified_split
from basd.data.views import DualViewTransform, ViewDataset
from basd.geometry.grassmann import principal_angles
from basd.geometry.learning_progress import LearningProgressSelector
from basd.geometry.neighbors import knn_predict
from basd.geometry.projections import SharedProjection
from basd.geometry.selector import GrassmannSelector
from basd.losses.attention import self_similarity
from basd.losses.balance import LossBalancer
from basd.losses.base import Layers
from basd.losses.cka import CKALoss, hsic
from basd.losses.gram import GramLoss
from basd.losses.logits import DKDLoss, HardLabelLoss, kd_loss
from basd.losses.rsd import RSDLoss
from basd.losses.temperature import LearnedTemperature
from basd.methods.dual_head import bce_kl
from basd.methods.feature_distillation import FeatureDistillation
from basd.models.cifar_models import SmallResNet
from basd.models.taps import TappedModel
from basd.runs.recipes import load_recipe
from basd.training.cached_teacher import CachedTeacher

x, y = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
images = ImageDataset(Source(TensorDataset(torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.arange(40) % 4)))


def student(): return create_student("deit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, depth=4, width=24, heads=2)


def teacher():
    return create_teacher("deit_tiny_patch16_224", untrained=True, num_classes=10, img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=2)


def far_student(): return create_student(student().model, mean=(.1, .2, .3), std=(.3, .3, .3))


def head_alone():
    s = student()
    s.model.requires_grad_(False)
    s.model.head.requires_grad_(True)
    return s


def checkpointed(run):
    "A task whose student's first blocks are run by a function of the block and its input"
    task = task_of("basd", selector=dict(name="ramp"))
    class Run(nn.Module):
        def __init__(self, block): super().__init__(); self.block = block
        def forward(self, x): return run(self.block, x)
    model = task.student.model
    inner, outer = model.blocks, nn.ModuleList(Run(b) for b in model.blocks)
    def forward_features(x, **_):
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for b in outer: x = b(x)
        return model.norm(x)
    model.forward_features = forward_features
    task.looks = 0
    return task


def task_of(method="distill", **options):
    torch.manual_seed(0)
    return create_task(method, student(), teacher(), total_steps=10, **options)


class Gray(TappedModel): "A subclass, whose methods a plain copy would lose"


def grids(n=3): return Layers([randn(2, 4, 6) for _ in range(n)], [(2, 2)]*n)


def grown():
    layers = grids(1)
    layers.append(randn(2, 4, 6))
    return layers


logits, classes = randn(8, 10), torch.arange(8)
REFUSED = {  # what is given → words of the refusal, and the call
    "class numbers as probabilities": ("give class probabilities", lambda: DKDLoss()(logits, logits, classes)),
    "one teacher image for eight": ("teacher logits (1, 10) differ", lambda: DKDLoss()(logits, logits[:1], F.one_hot(classes, 10))),
    "a teacher of other classes": ("teacher logits (8, 5) differ", lambda: HardLabelLoss()(logits, logits[:, :5], None)),
    "one class against five": ("teacher logits (4, 1) differ", lambda: bce_kl(randn(4, 5), randn(4, 1))),
    "a temperature per class": ("T=(8,)", lambda: kd_loss(randn(8, 8), randn(8, 8), torch.linspace(1, 8, 8))),
    "a negative temperature": ("T=-4.0; a temperature is positive", lambda: kd_loss(logits, logits, -4.)),
    "a range of temperatures below 0": ("low=-5.0", lambda: LearnedTemperature(10, low=-5., init=-1.)),
    "a negative temperature of cosines": ("tau=-0.1", lambda: self_similarity(randn(2, 4, 6), tau=-.1)),
    "a negative temperature of votes": ("temperature=-0.07", lambda: knn_predict(randn(5, 3), classes[:5], randn(2, 3), 1, -.07)),
    "labels in a column": ("labels of shape (5, 1)", lambda: knn_predict(randn(5, 3), classes[:5, None], randn(2, 3), 1)),
    "a negative penalty": ("recon=-1.0", lambda: GrassmannSelector([6], [6, 6], rank=2, dim=6, recon=-1.)),
    "a negative weight in the balance": ("give weights of at least 0", lambda: LossBalancer(["a", "b"], form="fixed", weights=dict(a=-1, b=1))),
    "a negative kappa": ("kappa=-1.0", lambda: RSDLoss([6], [6], kappa=-1.)),
    "a negative weight of a built-in class": ("rkd.weight=-1", lambda: task_of(FeatureDistillation, losses=dict(rkd=dict(weight=-1.)))),
    "layers without grids": ("2 layers and 1 grids", lambda: CKALoss()(grown(), grids(2))),
    "a mask as positions": ("indices given as torch.bool", lambda: ViewDataset(images, images.labels == 3, DualViewTransform(4))),
    "floats as positions": ("indices given as torch.float32", lambda: ViewDataset(images, [.9, 1.9], DualViewTransform(4))),
    "one image and a half": ("is no number of images", lambda: stratified_split(40, None, 1.5)),
    "a picture of floats": ("a picture of torch.float32", lambda: DualViewTransform(16)(torch.rand(3, 20, 20), 0)),
    "one teacher image for four": ("1 images of the teacher for 4", lambda: task_of()(x, y, x[:1])),
    "teacher images up to 255": ("pixels of the teacher's images", lambda: task_of()(x, y, 255*x)),
    "bytes beside normalized images": ("images are bytes", lambda: task_of(normalized=True)((x - .5)/.5, y, (255*x).byte())),
    "one logit": ("one logit", lambda: create_task("ce", create_student("deit_tiny_patch16_224", num_classes=1, img_size=16, patch_size=4, depth=1, width=24, heads=2))),
    "logits of a map": ("logits of one image of shape (1, 10, 4, 4)", lambda: create_task("ce", create_student(nn.Conv2d(3, 10, 4, 4), img_size=16, layers=[]))),
    "a method nobody knows": ("did you mean 'fitnets'?", lambda: task_of("fitnet")),
    "a recipe with a student of its own": ("sets its student besides a method", lambda: task_of("lift")),
    "a recipe in stages": ("sets its stages besides a method", lambda: task_of("two_stage")),
    "attention in reentrant checkpoints": ("queries and keys of blocks.0 of the student ran without gradient", lambda: checkpointed(lambda b, x: checkpoint(b, x, use_reentrant=True))(x, y)),
    "an argument that is 0": ("drop_rate is for a model that is built", lambda: create_student(nn.Conv2d(3, 10, 4, 4), img_size=16, layers=[], drop_rate=0)),
    "a model without the size of its images": ("is tapped without the size of its images", lambda: create_task("ce", TappedModel(student().model, mean=(.5,)*3, std=(.5,)*3))),
    "logits as labels": ("are no probabilities", lambda: task_of()(x, randn(4, 10))),
    "several labels at once": ("are no probabilities", lambda: task_of()(x, torch.ones(4, 10))),
    "a share of a step": ("step=0.29", lambda: task_of()(x, y, step=.29)),
    "no steps at all": ("total_steps=0", lambda: task_of()(x, y, total_steps=0)),
    "a share above 1": ("lam=1.5", lambda: task_of()(x, y, mix=MixParams(torch.tensor([1, 0, 3, 2]), torch.tensor(1.5)))),
    "smoothing above 1": ("smoothing=2", lambda: mix_labels(y, 10, None, 2.)),
    "another optimizer": ("no parameter of the student", lambda: task_of().follow(torch.optim.SGD([nn.Parameter(torch.ones(1))], .1))),
    "a subclass as teacher": ("a TappedModel of its own", lambda: create_task("distill", student(), Gray(teacher().model), total_steps=1)),
    "a subclass as student": ("a TappedModel of its own", lambda: create_task("match", Gray(student().model, [-1]), teacher(), losses=dict(rkd={}), student_layers=[1], total_steps=1)),
    "a tapped model, tapped": ("is tapped already", lambda: TappedModel(teacher())),
    "two layers too many": ("depth=22", lambda: SmallResNet(22)),
    "bases of other dimensions": ("not on one Grassmannian", lambda: principal_angles(torch.eye(6)[:, :1], torch.eye(6)[:, :3])),
    "a map that is not there": ("which=[4] of 3 maps", lambda: SharedProjection([8, 8, 16], [8], dim=4).student([randn(2, 16)], which=[4])),
    "one map for two layers": ("which=[0] of 3 maps", lambda: SharedProjection([8, 8, 16], [8], dim=4).student([randn(2, 8)]*2, which=[0])),
    "a debiased form that is not there": ("debias=True with center=False", lambda: hsic(torch.eye(5), torch.eye(5), debias=True, center=False))}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    words, call = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(words)): call()


def test_a_second_mix_is_checked():
    t, mix = task_of(), lambda partner: MixParams(torch.tensor(partner), torch.tensor(.6))
    t(x, y, mix=mix([1, 0, 3, 2]))
    with pytest.raises(ValueError, match="other partners"): t(x, y, mix=mix([2, 3, 0, 1]))


def test_a_slice_of_layers_has_their_grids():
    a, b = grids(), Layers([randn(2, 16, 6) for _ in range(3)], [(4, 4)]*3)
    whole = lambda layers, n: Layers(list(layers)[:n], layers.grid_sizes[:n])
    assert GramLoss()(a[:2], b[:2]) == GramLoss()(whole(a, 2), whole(b, 2)) == GramLoss()((a + b)[:2], (b + a).copy()[:2])


def test_a_copy_reads_its_own_head():
    "In `trajectory`, which reads layers by the student's head: a copied task, a pickled one, and the method's copy that evaluates another model"
    t = task_of("match", losses=dict(trajectory={}))
    value = lambda t: t(x, y)["losses"]["trajectory"].item()
    other, before = copy.deepcopy(t), value(t)
    assert value(pickle.loads(pickle.dumps(t))) == before
    with torch.no_grad(): other.student.model.head.weight.mul_(3)
    assert value(other) != before == value(t)
    other(x, y)["losses"]["trajectory"].backward()
    assert other.student.model.head.weight.grad.norm() > 0 and t.student.model.head.weight.grad is None
    # as `TrainingData.evaluate_unlabeled` copies it
    method = copy.deepcopy(t.method, {id(t.student): other.student, id(t.teacher): t.teacher}).eval()
    with torch.no_grad(): found = t.distill_losses(method, other.student, x, x, 10, 1.)["trajectory"].item()
    with torch.no_grad(): own = other.distill_losses(other.method.eval(), other.student, x, x, 10, 1.)["trajectory"].item()
    assert found == own != before


def test_draws_of_a_loss_do_not_depend_on_the_others():
    given = dict(rel={}, rkd=dict(images=3), cka=dict(max_rows=8))
    value = lambda method, names: {n: v.item() for n,v in task_of(method, losses={n: given[n] for n in names})(x, y)["metrics"].items()
                                   if n.startswith("loss_unweighted/")}
    every = value("match", ["rel", "rkd", "cka"])
    for names in (["cka", "rkd", "rel"], ["cka"], ["rkd", "cka"]):
        found = value("match", names)
        assert found == {n: every[n] for n in found}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_counts_and_means_stay_in_float32(half):
    b = LossBalancer(["a", "b"]).to(half)
    for level in [(1., 1.)]*60 + [(.8, .7)]*500: b(torch.tensor(level), torch.tensor(0.), torch.tensor(100.))
    assert b.count.max() > 256 and b.ema.allclose(torch.tensor([.8, .7]), atol=.02)
    s = LearningProgressSelector([6], [6]*3, rank=2, dim=6).to(half)
    assert {v.dtype for n,v in s.named_buffers() if v.is_floating_point()} == {torch.float32}


def test_one_hook_counts():
    t = task_of()
    optimizer = torch.optim.SGD(t.parameters(), .1)
    t.follow(optimizer).follow(optimizer)
    t(x, y)["loss"].backward(); optimizer.step()
    assert t.updates == 1
    with pytest.raises(ValueError, match="follow"): t.after_update()
    other = copy.deepcopy(t)                                # is followed by no optimizer
    other.after_update()
    assert (t.updates, other.updates) == (1, 2)


def test_a_sign_is_no_negative_weight():
    "`entropy_sign: -1` is one of the words of its option"
    stage = [*load_recipe("basd_fourier", "method.selector.entropy_sign=-1").values()][-1]
    assert stage.method.options.selector.entropy_sign == -1


def test_frozen_layers_are_allowed():
    "Head alone: one warning, as exits may be trained on a frozen backbone; a frozen first block, or adapters behind its attention: none"
    task = create_task("basd", head_alone(), teacher(), total_steps=1)
    with pytest.warns(UserWarning, match="are frozen, with all before them"): task(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task(x, y)
        part = student()
        for frozen in (part.model.patch_embed, part.model.blocks[0].attn, part.model.blocks[0].norm1): frozen.requires_grad_(False)
        part.model.pos_embed.requires_grad_(False), part.model.cls_token.requires_grad_(False)
        create_task("basd", part, teacher(), total_steps=1)(x, y)["loss"].backward()


@pytest.mark.parametrize("words, call", {
    "normalized by the student's mean and std": lambda: create_task("distill", far_student(), teacher(), total_steps=1, normalized=True)(x - .5, y, x - .5),
    "normalized images have pixels below 0": lambda: task_of(normalized=True)(x, y),
    "have parameters to train and outputs without gradient": lambda: checkpointed(lambda b, x: torch.no_grad()(b)(x))(x, y)}.items())
def test_warnings(words, call):
    with pytest.warns(UserWarning, match=words): call()


def test_one_output_without_labels(): create_task("match", create_student("deit_tiny_patch16_224", num_classes=1, img_size=16, patch_size=4, depth=2, width=24, heads=2, layers=[1]),
                                                  teacher(), labels=False, total_steps=1, losses=dict(gram={}), student_layers=[1], teacher_layers=[3])(x)


@pytest.mark.parametrize("mixup", [0., .8])
@pytest.mark.parametrize("method, options", [("distill", dict(loss="dkd")), ("match", dict(losses={}, logits=dict(loss="dkd"), student_layers=[1], teacher_layers=[1]))])
def test_dkd_of_images_without_a_class(method, options, mixup):
    "They have no part in it, as none in cross-entropy; they counted as images of class 0"
    if method == "match": options = options | dict(losses=dict(gram={}))
    task = task_of(method, **options, mixup=mixup, mix_prob=1.)
    value = lambda labels: task(x, torch.tensor(labels), step=9)["losses"]["logits"].item()
    assert value([-1]*4) == value([-100]*4) == 0.
    some, all_of = value([3, 3, -1, -1]), value([3, 3, 3, 3])
    assert 0 < some < all_of and value([0]*4) > 0
    rows = F.one_hot(torch.tensor([3, 3, 0, 0]), 10)*torch.tensor([1., 1., 0., 0.])[:, None]             # the same as probabilities
    assert task(x, rows, step=9)["losses"]["logits"].item() == pytest.approx(some, rel=1e-5)


def test_both_heads_in_evaluation():
    "A student with a distillation head has one set of logits there, with which the teacher's are compared"
    s = create_student("deit_tiny_distilled_patch16_224", num_classes=10, img_size=16, patch_size=4, depth=4, width=24, heads=2)
    task = create_task("distill", s, teacher(), head="dist", total_steps=10)
    assert task(x, y)["loss"].isfinite()
    assert task.eval()(x, y)["losses"]["logits"] > 0


def test_cache_of_another_network_with_the_same_weights(tmp_path):
    "Another activation, or another number of heads, has no weights of its own"
    def teacher(**more):
        torch.manual_seed(0)
        return create_teacher("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, **dict(embed_dim=48, num_heads=3) | more, untrained=True)
    views = DualViewTransform(24, 32, crop="center", flip=0.)
    for _ in range(2): CachedTeacher(teacher(), tmp_path/"cache", images, range(8), views).build()
    for more in (dict(act_layer="relu"), dict(num_heads=6)):
        with pytest.raises(ValueError, match="another teacher; remove it"): CachedTeacher(teacher(**more), tmp_path/"cache", images, range(8), views)


def test_a_task_seeds_no_gpu(monkeypatch):
    "The random numbers of the caller's model go on as they would"
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    model = create_student(nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()), img_size=16, layers=[])
    before = torch.get_rng_state()
    create_task("ce", model)
    assert torch.equal(torch.get_rng_state(), before)
