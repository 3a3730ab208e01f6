"Taps of many families of models: maps against unfused attention, passes that end early, copies, and failures on the way"
import copy
import pickle
import weakref

import pytest
import timm
import torch
import torchvision
from fastcore.test import test_eq as equals
from torch import nn
from torch.testing import assert_close

from basd.models.layers import ATTENTION_READERS, Hook, QKNormReader, TimmAttention
from basd.models.taps import TappedModel, tap

ONE = dict(img_size=32, patch_size=8)
TINY = dict(ONE, depth=3, embed_dim=24, num_heads=2)


def build(name, **kwargs):
    "A timm model with random weights, none of them at a special value"
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model.eval()


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def unfused_maps(model, x):
    "The attention maps that timm's unfused code computes: the inputs of `attn_drop`"
    maps, handles, fused = [], [], [m for m in model.modules() if hasattr(m, "fused_attn")]
    for m in fused:
        m.fused_attn = False
        handles.append(m.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0])))
    model(x)
    for h in handles: h.remove()
    for m in fused: m.fused_attn = True
    return maps


def called(tapped, x, depth, names):
    "Names of the modules that a pass runs"
    tapped.infer_shapes(x)                       # and not those before the first pass
    ran, handles = [], [tapped.model.get_submodule(n).register_forward_pre_hook(
        lambda module, args, n=n: ran.append(n)) for n in names]
    tapped(x, depth=depth)
    for h in handles: h.remove()
    return ran


def equal(f, whole, n):
    "Features of `n` layers equal the first of the whole pass, bit by bit"
    same = lambda a, b: assert_close(a, b, rtol=0, atol=0)
    equals((len(f), f.logits, f.dist_logits, f.grid_sizes, f.unread),
           (n, None, None, whole.grid_sizes[:n], whole.unread[:n]))
    for a,b in zip(f.tokens, whole.tokens): same(a, b)
    for a,b in zip(f.attention, whole.attention[:n], strict=True):
        equals((a is None, a and a.num_prefix_tokens), (b is None, b and b.num_prefix_tokens))
        if a is not None: same(a.q, b.q); same(a.k, b.k)


class Registers(nn.Module):
    "A transformer as published elsewhere: its five prefix tokens are not stated"
    def __init__(self, D=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3, D, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 5, D))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(D, 4, 2*D, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(D, 10)

    def forward(self, x):
        z = torch.cat([self.first.expand(len(x), -1, -1), self.conv1(x).flatten(2).mT], 1)
        for layer in self.layers: z = layer(z)
        return self.fc(z[:, 0])


def small_vgg():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True),
                         nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("name, kwargs", [
    ("vit_tiny_patch16_224", dict(ONE, depth=3, num_classes=10)), ("vit_tiny_patch16_224", dict(ONE, depth=2, qk_norm=True)),
    ("deit_tiny_distilled_patch16_224", dict(ONE, depth=2, num_classes=10)),
    ("vit_small_patch14_reg4_dinov2", dict(img_size=56, depth=2)), ("eva02_tiny_patch14_224", dict(img_size=56, depth=2)),
    ("eva02_base_patch14_224", dict(img_size=56, depth=2, embed_dim=192, num_heads=3)),
    ("vit_small_patch16_dinov3", dict(img_size=64, depth=2))])
@torch.no_grad()
def test_tapped_maps_equal_unfused_attention(name, kwargs):
    model = build(name, **kwargs)
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    with tap(model) as taps: model(x)
    for a,true in zip(taps.features().attention, unfused_maps(model, x), strict=True):
        assert_close(a.full_map(), true, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tapped_maps_of_multihead_attention():
    "Those of torchvision's ViT and of PyTorch's encoder equal the weights that the module returns"
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48,
                                               mlp_dim=96, num_classes=10).eval()
    text = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2,
                                 enable_nested_tensor=False).eval()
    for model,x,grid in ((vit, torch.randn(2, 3, 32, 32), (4, 4)), (text, torch.randn(2, 7, 32), None)):
        heads, given = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)], []
        for m in heads: nn.init.normal_(m.in_proj_bias)              # zero by default, where a forgotten bias would not show
        handles = [m.register_forward_pre_hook(lambda module, args, kwargs: given.append(args[0]), with_kwargs=True)
                   for m in heads]
        with tap(model) as taps: model(x)
        for h in handles: h.remove()
        f = taps.features()
        equals(f.grid_sizes, [grid]*2)
        for a,m,z in zip(f.attention, heads, given, strict=True):
            assert_close(a.full_map(), m(z, z, z, average_attn_weights=False)[1], rtol=0, atol=1e-5)


def test_attention_that_is_not_read():
    "A mask or a foreign class means no `Attention`; tokens first are refused; a class joins by one line"
    words, text = torch.randn(2, 7, 32), nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False).eval()
    with tap(text) as taps: text(words)
    assert None not in taps.features().attention
    with tap(text) as taps: text(words, mask=torch.ones(7, 7).tril() == 0)
    equals(taps.features().attention, [None, None])
    with pytest.raises(ValueError, match="batch_first=True"), \
            tap(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64)), [0]): pass

    class OwnAttention(TimmAttention): pass
    own = nn.Sequential(OwnAttention(32, 4)).eval()
    with tap(own) as taps: own(words)
    equals(taps.features().attention, [None])
    ATTENTION_READERS[OwnAttention] = QKNormReader
    try:
        with tap(own) as taps: own(words)
        assert_close(taps.features().attention[0].full_map(), unfused_maps(own, words)[0])
    finally: del ATTENTION_READERS[OwnAttention]


@pytest.mark.parametrize("half", (False, True))
@pytest.mark.parametrize("name, side, kwargs", [
    ("deit_tiny_distilled_patch16_224", 32, TINY), ("vit_small_patch14_reg4_dinov2", 32, TINY),
    ("eva02_tiny_patch14_224", 32, TINY), ("convnext_atto", 64, {}), ("resnet18", 64, {}),
    ("swin_tiny_patch4_window7_224", 64, dict(img_size=64, window_size=4, embed_dim=24, num_heads=(1, 2, 2, 4))),
    ("hiera_tiny_224", 224, dict(embed_dim=24, num_heads=1)), (Registers, 32, {}), (small_vgg, 32, {})])
@torch.no_grad()
def test_short_pass_equals_whole_pass(name, side, kwargs, half):
    "Class tokens, two heads, registers, rotary positions, windows, maps, tokens out of order, outputs written into later"
    torch.manual_seed(0)
    model = build(name, **kwargs) if isinstance(name, str) else name().eval()
    tapped, picture = TappedModel(model), torch.rand(2, 3, side, side)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        whole = tapped(picture)
        for n in range(1, len(tapped.names) + 1): equal(tapped(picture, depth=n), whole, n)
    equals(hooks(model), 0)


@pytest.fixture
def four(): return TappedModel(build("vit_tiny_patch16_224", **ONE, depth=4))


@pytest.fixture
def x(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_blocks_beyond_the_depth_do_not_run(four, x):
    beyond = [*four.names, "norm", "head"]
    for n in (1, 2, 3, 4): equals(called(four, x, n, beyond), four.names[:n])
    equals(called(four, x, None, beyond), beyond)


def test_layers_in_another_order(four, x):
    "A layer beside a part of itself and the patch embedding, too"
    for layers in ([3, 0, 1], ["blocks.2", "blocks.2.attn", "blocks.0"], ["patch_embed.proj", "blocks.0"]):
        other = TappedModel(four.model, layers)
        with torch.no_grad():
            whole = other(x)
            for n in (1, 2): equal(other(x, depth=n), whole, n)
    beyond = [*four.names, "norm", "head"]
    equals(called(TappedModel(four.model, [3, 0, 1]), x, 1, beyond), four.names)
    equals(called(TappedModel(four.model, [1, 2, 0]), x, 2, beyond), four.names[:3])


def test_gradient_through_recomputed_activations(four, x):
    def pull(depth):
        four.model.zero_grad()
        four(x, depth=depth).tokens[1].square().mean().backward()
        return {n: p.grad.clone() for n,p in four.model.named_parameters() if p.grad is not None}
    want = pull(None)
    four.model.set_grad_checkpointing(True)
    got = pull(2)
    assert got.keys() == want.keys() and not any("blocks.2" in n for n in got)
    for n in got: assert_close(got[n], want[n])


class Outer(nn.Module):
    "Two linear layers around a tapped model, and an `except` of its own"
    def __init__(self):
        super().__init__()
        self.inner = TappedModel(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
        self.inner.infer_shapes(torch.randn(2, 5, 4))
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        try: return self.last(self.inner(x, depth=2).tokens[1])
        except Exception: return self.last(x)


def test_a_tapped_model_inside_another():
    torch.manual_seed(0)
    nested, words = TappedModel(Outer(), ["inner.model.0", "inner.model.1", "last"]), torch.randn(2, 5, 4)
    whole = nested(words)
    for n in (1, 2, 3): equal(nested(words, depth=n), whole, n)
    equals(called(nested, words, 1, ["inner.model.1", "last"]), [])
    equals(called(nested, words, 2, ["inner.model.2", "last"]), [])


@torch.no_grad()
def test_a_failure_on_the_way(four, x):
    "It is not taken for the end of the pass, and leaves neither hook nor depth; a copy ends its own passes"
    whole, twin = four(x), copy.deepcopy(four.install_hooks())
    with pytest.raises(AssertionError): four(torch.randn(1, 3, 5, 5), depth=2) # the size is refused on the way
    equal(four(x, depth=2), whole, 2)
    assert_close(four.model(x), whole.logits, rtol=0, atol=0)
    assert_close(four(x).logits, whole.logits, rtol=0, atol=0)
    equal(twin(x, depth=3), whole, 3)
    equals((four.taps.depth, four.taps.outputs, twin.taps), (None, {}, None))
    four.remove_hooks()
    equals(hooks(four.model), 0)
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"depth={n} of 4 tapped layers"): four(x, depth=n)


@torch.no_grad()
def test_copies_have_no_hooks(x):
    "A pass through a copy leaves the records of the original alone, and both can be pickled"
    original = TappedModel(build("vit_tiny_patch16_224", **ONE, depth=1, num_classes=3), mean=3*[0.],
                           std=3*[1.]).install_hooks()
    pair, inner = (copy.deepcopy(original), pickle.loads(pickle.dumps(original))), copy.deepcopy(original.model)
    original(x)
    for c in pair: assert_close(c(x + 1).tokens[0], original(x + 1).tokens[0])
    original.model(x)
    kept = original.taps.outputs[0].clone()
    inner(x + 1)
    assert_close(original.taps.outputs[0], kept, rtol=0, atol=0)
    equals([sum(isinstance(h, Hook) for m in c.modules()
                for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())) for c in pair], [0, 0])


def test_a_layer_of_several_branches_is_refused():
    with pytest.raises(ValueError, match="stage2 of HighResolutionNet returns"):
        TappedModel(timm.create_model("hrnet_w18_small"))(torch.rand(1, 3, 64, 64))


def test_what_is_worked_out_once():
    "The layers are found once, and anew when a module is replaced or a setting changes; a pass leaves no activation behind"
    student = TappedModel(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=3, embed_dim=24, num_heads=3))
    x = torch.randn(2, 3, 16, 16)
    f = student(x)
    taps, alive = student.made[2], [weakref.ref(t) for t in (f.tokens[0], f.attention[0].q)]
    del f
    assert [a() for a in alive] == [None, None]
    assert student(x).attention[0] is not None and student.made[2] is taps
    student.attention = False
    assert student(x).attention[0] is None
    student.model.blocks[1] = nn.Identity()
    f = student(x)
    assert torch.equal(f.tokens[1], f.tokens[0]) and student.made[2] is not taps
    with pytest.raises(AssertionError): student(torch.randn(1, 3, 5, 5))            # timm refuses the size
    assert student.made is None and copy.deepcopy(student)(x).logits.equal(student(x).logits)
