"Models that nobody thought of: what is no patch, no text, no logits, and comparisons that must not be left out"
import copy

import basd
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from fastcore.test import test_eq as equals
from torch import nn
from torch.testing import assert_close

from basd.models.taps import TappedModel, _find_logits, tap

ONE = dict(img_size=32, patch_size=8)
TINY = dict(ONE, depth=2, embed_dim=24, num_heads=2)


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Around(nn.Module):
    "A module around a model, which it calls in one of several ways"
    def __init__(self, inner, call=None, **more):
        super().__init__()
        self.inner, self.call = inner, call or (lambda m, x: m(x))
        for n,m in more.items(): setattr(self, n, m)

    def forward(self, x): return self.call(self.inner, x)


class Transformer(nn.Module):
    "A small transformer whose patches are made by a convolution or a linear map, with tokens of its own in front, behind or both"
    def __init__(self, front=0, behind=0, conv=True, D=32):
        super().__init__()
        self.embed = nn.Conv2d(3, D, 8, 8) if conv else nn.Linear(3*64, D)
        self.front, self.behind = (nn.Parameter(torch.randn(1, n, D)) for n in (front, behind))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(D, 4, 2*D, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(D, 10)

    def forward(self, pixel_values):
        patches = (self.embed(pixel_values).flatten(2).mT if isinstance(self.embed, nn.Conv2d)
                   else self.embed(F.unfold(pixel_values, 8, stride=8).mT))
        z = torch.cat([self.front.expand(len(patches), -1, -1), patches, self.behind.expand(len(patches), -1, -1)], 1)
        for layer in self.layers: z = layer(z)
        return self.fc(z.mean(1))


@pytest.fixture
def pictures(): return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("front, behind, strays", [(0, 4, "16, 17, 18, 19"), (1, 4, "17, 18, 19, 20"), (0, 1, "16"), (0, 9, "16, 17, 18, 19, …")])
@torch.no_grad()
def test_tokens_of_no_patch_are_not_taken_for_patches(front, behind, strays, pictures):
    "Registers behind the patches: cut in front, four patches are lost and the registers get their places"
    model = TappedModel(Transformer(front, behind).eval())
    with pytest.raises(ValueError, match=f"tokens {strays} of the {16 + front + behind} of layers.0 are the same for every image"): model(pictures)
    equals((model.readings, hooks(model)), (None, 0))
    with pytest.raises(ValueError, match="have to come first"):                  # told wrongly
        TappedModel(model.model, [-1], prefix=front + behind, grid=(4, 4))(pictures)
    without = TappedModel(model.model, prefix=0)(pictures)                       # tokens without a place
    equals((without.tokens[0].shape[1], without.grid_sizes), (16 + front + behind, [None]*2))


@pytest.mark.parametrize("front", (0, 1, 5))
@torch.no_grad()
def test_tokens_in_front_stay_the_prefix(front, pictures):
    f = TappedModel(Transformer(front).eval())(pictures)
    equals(([t.shape[1] for t in f.tokens], f.grid_sizes, [a.num_prefix_tokens for a in f.attention]), ([16]*2, [(4, 4)]*2, [front]*2))
    blind = Transformer(front).eval()
    nn.init.zeros_(blind.embed.weight)                                           # sees nothing: nothing can be told of its tokens
    equals(TappedModel(blind)(pictures).grid_sizes, [(4, 4)]*2)
    equals(hooks(blind), 0)


@torch.no_grad()
def test_the_search_for_strays_leaves_no_trace(pictures):
    model = Transformer(1).eval()
    before = torch.get_rng_state()
    TappedModel(model).infer_shapes(pictures)
    assert torch.equal(before, torch.get_rng_state())
    whole, calls = TappedModel(model), []
    whole.stops = False                                                          # sharded weights have to run to their end
    handle = model.fc.register_forward_hook(lambda module, args, out: calls.append(1))
    whole.settle(pictures)
    handle.remove()
    equals(len(calls), 3)


@torch.no_grad()
def test_images_without_a_convolution_are_images(pictures):
    "Patches made by a linear map have places, too, and it has to be said which"
    for front in (0, 1):
        model = Transformer(front, conv=False).eval()
        with pytest.raises(ValueError, match="no patch embedding was found"): TappedModel(model)(pictures)
        with tap(model) as taps: model(pixel_values=pictures)
        with pytest.raises(ValueError, match="no patch embedding was found"): taps.features()
        f = TappedModel(model, prefix=front, grid=(4, 4))(pictures)
        equals((f.grid_sizes, f.tokens[0].shape[1]), ([(4, 4)]*2, 16))
    words = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False).eval()
    equals(TappedModel(words)(torch.randn(2, 7, 32)).grid_sizes, [None]*2)
    mask = torch.zeros(2*4, 7, 7)                                                # (B·heads, N, N)
    equals(TappedModel(words)(torch.randn(2, 7, 32), mask=mask).grid_sizes, [None]*2)


def hiera(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("hiera_tiny_224", embed_dim=24, num_heads=1, num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("call, more", [
    (lambda m, x: m(x=x), {}), (lambda m, x: m.forward_features(x).mean(1), {}),
    (lambda m, x: m.forward_features(F.interpolate(x, 224)).mean(1), {}),
    (lambda m, x: m(x), dict(aux=timm.create_model("resnet18", num_classes=3)))])
@torch.no_grad()
def test_no_way_of_calling_leaves_the_comparison_out(call, more):
    "Hiera's tokens come in the order of its mask units; without the comparison they would be read shuffled"
    inner = hiera()
    x = torch.rand(1, 3, 224, 224)
    if "interpolate" in call.__code__.co_names: x = F.interpolate(x, 112)
    plain = TappedModel(inner)
    tapped = TappedModel(Around(inner, call, **more).eval(), [f"inner.{n}" for n in plain.names])
    f, true = tapped(x), plain(F.interpolate(x, 224))
    assert any(r.order is not None for r in tapped.readings)
    equals(f.grid_sizes, true.grid_sizes)
    for a,b in zip(f.tokens, true.tokens, strict=True): assert_close(a, b, rtol=0, atol=0)


class Shuffled(nn.Module):
    "Lists its features as timm does, and keeps its tokens in another order than row by row, as Hiera"
    feature_info = [dict(module=f"blocks.{i}", num_chs=8) for i in range(2)]

    def __init__(self):
        super().__init__()
        self.patch_embed, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)), nn.Linear(8, 5)
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(1)))

    def layers(self, x):
        z = self.patch_embed(x).flatten(2).mT[:, self.order]
        for b in self.blocks: z = b(z); yield z

    def forward(self, x): return self.head([*self.layers(x)][-1].mean(1))

    def forward_intermediates(self, x, intermediates_only=True):
        return [z[:, self.order.argsort()].mT.unflatten(2, (4, 4)) for z in self.layers(x)]


@torch.no_grad()
def test_a_compiled_pass_compares_first():
    model, x, graphs = Shuffled().eval(), torch.rand(1, 3, 16, 16), []
    plain = TappedModel(model)(x)

    def keep(graph, example): graphs.append(graph); return graph
    torch._dynamo.reset()
    tapped = TappedModel(model).install_hooks()
    compiled = torch.compile(tapped, backend=keep)
    for _ in range(2):
        for a,b in zip(compiled(x).tokens, plain.tokens, strict=True): assert_close(a, b)
    assert any(r.order is not None for r in tapped.readings)
    tapped.remove_hooks()
    torch._dynamo.reset()
    whole = TappedModel(model).install_hooks()
    with pytest.raises(RuntimeError, match="run infer_shapes"): torch.compile(whole, backend=keep, fullgraph=True)(x)
    whole.infer_shapes(x)
    f = torch.compile(whole, backend=keep, fullgraph=True)(x)
    for a,b in zip(f.tokens, plain.tokens, strict=True): assert_close(a, b)
    assert graphs
    torch._dynamo.reset()


class Failing(nn.Module):
    def __init__(self): super().__init__(); self.inner = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    def forward(self, x): self.inner(x); raise KeyError("the caller's own")


def test_a_failed_comparison_leaves_no_hook(pictures):
    model = Failing().eval()
    with pytest.raises(KeyError): TappedModel(model)(pictures)
    equals(hooks(model), 0)


def headless_models():
    yield "torchvision's ResNet", _set(torchvision.models.resnet18(num_classes=7), "fc")
    yield "torchvision's MobileNet", _set(torchvision.models.mobilenet_v3_small(num_classes=7), "classifier")
    yield "torchvision's ViT", _set(torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=7), "heads")
    yield "a ViT of timm whose head was replaced", _set(timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY), "head")
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    yield "a sequence around a model without head", nn.Sequential(bare)
    yield "two modules around it", Around(nn.Sequential(nn.Identity(), bare))
    yield "a module around ResNet", Around(_set(torchvision.models.resnet18(num_classes=7), "fc"))


def _set(model, name): setattr(model, name, nn.Identity()); return model


@pytest.mark.parametrize("name, model", list(headless_models()))
@torch.no_grad()
def test_features_do_not_become_logits(name, model, pictures):
    "A model without head has no classes, whoever took its head away"
    tapped = TappedModel(model.eval(), None)
    out = model(pictures)
    equals((tapped(pictures).logits, out.dim()), (None, 2))
    tapped.logits = None
    equals(tapped(pictures).logits, None)


class Prototypes(nn.Module):
    "A head without parameters: the classes' directions are a buffer"
    def __init__(self): super().__init__(); self.register_buffer("directions", torch.randn(7, 24))
    def forward(self, z): return F.normalize(z, dim=-1) @ F.normalize(self.directions, dim=-1).T


@torch.no_grad()
def test_logits_stay_logits(pictures):
    bare, full = (timm.create_model("vit_tiny_patch16_224", num_classes=n, **TINY) for n in (0, 7))
    for model in (full, Around(full), nn.Sequential(bare, nn.Linear(24, 7)), nn.Sequential(bare, Prototypes()),
                  Around(bare, lambda m, x: m(x) @ torch.ones(24, 7), head=nn.Linear(24, 7)), Around(nn.Sequential(bare, nn.Linear(24, 7))),
                  torchvision.models.resnet18(num_classes=7), torchvision.models.mobilenet_v3_small(num_classes=7)):
        equals(TappedModel(model.eval(), None)(pictures).logits.shape, (2, 7))
    own = _set(Around(nn.Sequential(bare, nn.Linear(24, 7))), "fc")                # an identity called fc, and seven classes stated
    own.num_classes = 7
    equals(TappedModel(own.eval(), None)(pictures).logits.shape, (2, 7))


@torch.no_grad()
def test_a_tensor_of_another_shape_is_no_logits(pictures):
    "Tokens, maps and numbers that a model returns are not scores of classes"
    for model in (nn.Conv2d(3, 5, 4), nn.Sequential(nn.Flatten(2), nn.Linear(1024, 4)), Around(nn.Conv2d(3, 5, 4), lambda m, x: m(x).sum((1, 2, 3)))):
        equals(TappedModel(model, None)(pictures).logits, None)
    z = torch.randn(4, 2, 7)                                                     # (T, B, C)
    equals(_find_logits(nn.Linear(7, 7), z, dims=(2, 3))[0].shape, (4, 2, 7))
    equals(_find_logits(nn.Linear(7, 7), z), (None, None))


def test_a_dense_student_is_not_taken_for_one_without_a_head(pictures):
    "Its cross-entropy would be left out in silence; a model that has no head may return what it likes"
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.ReLU(), nn.Conv2d(24, 10, 1))
    teacher = basd.create_teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10, **TINY), untrained=True)
    make = lambda model, **more: basd.create_task("basd", basd.create_student(model, img_size=32, layers=["1"], **more), teacher, total_steps=2)
    with pytest.raises(ValueError, match="logits of one image of shape .1, 10, 4, 4.; give a student that returns .B, C., .* or logits=None"): make(dense)
    assert "ce" not in make(dense, logits=None)(pictures.sigmoid(), torch.arange(2))["losses"]
    tokens = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **TINY)
    equals(tokens(pictures).dim(), 3)
    student = basd.create_student(tokens, img_size=32)
    assert "ce" not in basd.create_task("basd", student, teacher, total_steps=2)(pictures.sigmoid(), torch.arange(2))["losses"]


class Writes(nn.Module):
    "Adds to its layer's output in place"
    def __init__(self): super().__init__(); self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
    def forward(self, x): z = self.first(x); z += 1; return self.fc(z.mean(1))


def test_inference_mode_hides_no_change():
    "PyTorch counts no changes of an inference tensor"
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    for model,names,x in ((small, [0], torch.randn(2, 3, 12, 12)), (Writes(), ["first"], torch.randn(2, 5, 4))):
        true = getattr(model, str(names[0]))(x) if names == ["first"] else small[0](x)
        true = (true if true.dim() == 3 else true.flatten(2).mT).detach()
        with torch.inference_mode():
            tapped, inside = TappedModel(model, names), x + 0
            assert_close(tapped(inside).tokens[0], true)
            equals([r.copy for r in tapped.readings], [True])
            with tap(model, names) as taps: model(inside)
            assert_close(taps.features().tokens[0], true)
        assert_close(tapped(x).tokens[0].detach(), true)
        tapped(x).tokens[0].sum().backward()                                     # and gradients run as ever
    quiet = TappedModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["0"])
    with torch.inference_mode(): quiet(torch.randn(2, 5, 4))
    equals([r.copy for r in quiet.readings], [False])


@pytest.mark.parametrize("rate", (.5, .75))
def test_dropped_patches_have_no_grid(rate):
    "Also where those that are left would fill a coarser one"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, patch_drop_rate=rate, **TINY)
    for tapped in (TappedModel(copy.deepcopy(model)), TappedModel(copy.deepcopy(model), grid=(4, 4))):
        f = tapped.train()(torch.randn(2, 3, 32, 32))
        equals((f.grid_sizes, [t.shape[1] for t in f.tokens]), ([None]*2, [round(16*(1 - rate))]*2))
        equals(tapped.eval()(torch.randn(2, 3, 32, 32)).grid_sizes, [(4, 4)]*2)
