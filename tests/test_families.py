"""Models of other packages as teachers: where their patches lie, what is prefix, and what they attend to.

The smallest members of a few timm families are tried here; `BASD_ALL_FAMILIES=1 pytest tests/test_families.py` tries all of them
(minutes), as experiments/families.py does. Models of transformers are made from small configurations with random weights, nothing is
downloaded; without the package their tests are skipped. DINOv2 and DINOv3 as their authors publish them are written here anew, with the names that
the published modules have and nothing more.
"""
import copy
import importlib.util
import json
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from basd.models.layers import layer_names
from basd.models.taps import TappedModel
from basd.models.students import wrap_student

here = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('families', here/'experiments'/'families.py')
families = importlib.util.module_from_spec(spec)
spec.loader.exec_module(families)
recorded = json.loads(families.results.read_text())['families']
fast = ['byobnet/repvgg', 'cait/cait', 'coat/coat', 'crossvit/crossvit', 'efficientnet/mobilenetv', 'hiera/hiera', 'levit/levit',
        'mlp_mixer/gmixer', 'mvitv2/mvitv', 'pit/pit', 'swin_transformer/swin', 'tnt/tnt', 'vision_transformer/test']


def shaken(model):
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize('family', recorded if os.environ.get('BASD_ALL_FAMILIES') else [f for f in fast if f in recorded])
def test_timm_family(family):
    "Tokens, grid, prefix and attention agree with timm's second implementation, or it is refused with a reason"
    r = families.trial(recorded[family]['model'])
    assert r['result'] == recorded[family]['result'] in ('agree', 'refused', 'no reference'), r
    for k in ('tokens', 'grids', 'prefix', 'attention'): assert r.get(k) == recorded[family].get(k), k


def test_all_families_are_recorded():
    "One row for each family that timm has, and none of them differs"
    assert {families.family(n) for n in families.timm_models()} == set(recorded)
    assert {r['result'] for r in recorded.values()} <= {'agree', 'refused', 'no reference'}


# transformers: (model, configuration, arguments, prefix, attention readable)
vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
hub_models = [
    ('ViTModel', 'ViTConfig', vit, 1, True), ('ViTForImageClassification', 'ViTConfig', vit, 1, True),
    ('DeiTModel', 'DeiTConfig', vit, 2, True), ('Dinov2Model', 'Dinov2Config', vit, 1, True),
    ('Dinov2WithRegistersModel', 'Dinov2WithRegistersConfig', vit | dict(num_register_tokens=4), 5, True),
    ('DINOv3ViTModel', 'DINOv3ViTConfig', vit | dict(num_register_tokens=4), 5, True),
    ('SiglipVisionModel', 'SiglipVisionConfig', vit, 0, True), ('CLIPVisionModel', 'CLIPVisionConfig', vit, 1, True),
    ('BeitModel', 'BeitConfig', vit, 1, False)]


@pytest.mark.parametrize('name,config,arguments,prefix,readable', hub_models, ids=lambda v: v if isinstance(v, str) else '')
def test_transformers(name, config, arguments, prefix, readable):
    "16 patches on a grid of 4 × 4, whatever stands before them; maps as the eager implementation computes them"
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    if not hasattr(transformers, name): pytest.skip(f'this transformers has no {name}')
    make = lambda how: getattr(transformers, name)._from_config(getattr(transformers, config)(**arguments), attn_implementation=how)
    model = shaken(make('sdpa' if readable else 'eager'))
    eager = make('eager').eval(); eager.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        f, ref = TappedModel(model)(x), eager(x, output_hidden_states=True, output_attentions=True)
    assert [t.shape for t in f.tokens] == [(2, 16, 32)]*2 and f.grid_sizes == [(4, 4)]*2
    assert_close(f.tokens[0], ref.hidden_states[1][:, prefix:])
    if readable:
        for a,true in zip(f.attention, ref.attentions, strict=True): assert_close(a.full_map(), true, rtol=0, atol=1e-5)
        assert [a.num_prefix_tokens for a in f.attention] == [prefix]*2
    else: assert f.attention == [None]*2 and 'Beit' in f.unread[0]
    assert (f.logits is None) == (name != 'ViTForImageClassification')


@pytest.mark.parametrize('name,config', [('SwinModel', 'SwinConfig'), ('ConvNextModel', 'ConvNextConfig'),
                                         ('DINOv3ConvNextModel', 'DINOv3ConvNextConfig')])
def test_transformers_stages(name, config):
    "Stages lie on their grids"
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, name): pytest.skip(f'this transformers has no {name}')
    torch.manual_seed(0)
    small = (dict(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=2) if 'Swin' in name
             else dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))
    model, x = shaken(getattr(transformers, name)(getattr(transformers, config)(**small))), torch.randn(2, 3, 64, 64)
    with torch.no_grad(): f, ref = TappedModel(model)(x), model(x, output_hidden_states=True)
    assert len(f) == 4
    for t,grid in zip(f.tokens, f.grid_sizes):
        assert grid[0]*grid[1] == t.shape[1]
        maps = [h.flatten(2).mT if h.dim() == 4 else h for h in ref.hidden_states]
        assert any(t.shape == h.shape and torch.allclose(t, h, atol=1e-5) for h in maps)


class HubPatchEmbed(nn.Module):
    "Patches, as the authors' modules make them"
    def __init__(self, D):
        super().__init__()
        self.proj = nn.Conv2d(3, D, 8, 8)
    def forward(self, x): return self.proj(x).flatten(2).mT


class JointAttention(nn.Module):
    "Attention with a joint projection"
    def __init__(self, D, heads):
        super().__init__()
        self.num_heads, self.scale, self.qkv, self.proj = heads, (D//heads)**-.5, nn.Linear(D, 3*D), nn.Linear(D, D)
        self.maps = None
    def forward(self, x, attn_bias=None, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            sin, cos = rope
            n = q.shape[-2] - len(sin)
            half = lambda t: torch.cat([-t[..., t.shape[-1]//2:], t[..., :t.shape[-1]//2]], -1)
            q, k = (torch.cat([t[..., :n, :], t[..., n:, :]*cos + half(t[..., n:, :])*sin], -2) for t in (q, k))
        self.maps = (self.scale*q @ k.mT).softmax(-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HubBlock(nn.Module):
    def __init__(self, D, attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), attention(D, 4)
    def forward(self, x, rope=None): return x + self.attn(self.norm1(x), rope=rope)


class HubDino(nn.Module):
    "DINOv2 (class token, registers) or DINOv3 (storage tokens, rotated) by their attributes"
    def __init__(self, attention, registers, rotated, D=32):
        super().__init__()
        self.patch_embed, self.cls_token, self.rotated = HubPatchEmbed(D), nn.Parameter(torch.randn(1, 1, D)), rotated
        setattr(self, 'storage_tokens' if rotated else 'register_tokens', nn.Parameter(torch.randn(1, registers, D)))
        self.mask_token = nn.Parameter(torch.zeros(1, D))
        self.blocks, self.norm, self.head = nn.ModuleList(HubBlock(D, attention) for _ in range(3)), nn.LayerNorm(D), nn.Identity()
    def forward(self, x):
        z = self.patch_embed(x)
        angles = torch.randn(z.shape[1], 4, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
        more = self.storage_tokens if self.rotated else self.register_tokens
        z = torch.cat([t.expand(len(x), -1, -1) for t in (self.cls_token, more)] + [z], 1)
        for b in self.blocks: z = b(z, (angles.sin(), angles.cos()) if self.rotated else None)
        return self.head(self.norm(z)[:, 0])


@pytest.mark.parametrize('rotated,module,name', [(False, 'dinov2.layers.attention', 'MemEffAttention'),
                                                 (True, 'dinov3.layers.attention', 'SelfAttention')])
def test_hub_dino(rotated, module, name):
    "Neither states its prefix; queries and keys come from the joint projection, turned where the model turns them"
    torch.manual_seed(0)
    model = HubDino(type(name, (JointAttention,), dict(__module__=module, __qualname__=name)), 4, rotated).eval()
    with torch.no_grad(): f = TappedModel(model)(torch.randn(2, 3, 32, 32))
    assert [t.shape[1] for t in f.tokens] == [16]*3 and f.grid_sizes == [(4, 4)]*3 and f.logits is None
    for a,b in zip(f.attention, model.blocks, strict=True):
        assert_close(a.full_map(), b.attn.maps, rtol=0, atol=1e-5); assert a.num_prefix_tokens == 5
    with torch.no_grad(): f = TappedModel(HubDino(JointAttention, 4, rotated).eval())(torch.randn(2, 3, 32, 32))
    assert f.attention == [None]*3 and 'JointAttention' in f.unread[0]                 # a class of the same shape is not trusted, but named


def test_hub_dinov3_convnext():
    "Of two lists of four, the stages are the layers and not what makes maps smaller between them"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            D = [3, 8, 16, 24, 32]
            norm = lambda d: nn.GroupNorm(1, d)
            self.downsample_layers = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 2, 2), norm(b)) for a,b in zip(D, D[1:]))
            self.stages = nn.ModuleList(nn.Sequential(*(nn.Sequential(nn.Conv2d(d, 4*d, 3, 1, 1), nn.GELU(), nn.Conv2d(4*d, d, 1))
                                                        for _ in range(2))) for d in D[1:])
        def forward(self, x):
            for d,s in zip(self.downsample_layers, self.stages): x = s(d(x))
            return x.mean((2, 3))
    model = Net()
    assert layer_names(model) == [f'stages.{i}' for i in range(4)]
    assert TappedModel(model)(torch.randn(1, 3, 32, 32)).grid_sizes == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_open_clip():
    "A convolution called conv1, a class embedding without a batch axis"
    open_clip = pytest.importorskip('open_clip')
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_ratio=2., output_dim=16).eval()
    with torch.no_grad(): f = TappedModel(model)(torch.randn(2, 3, 32, 32))
    assert [t.shape for t in f.tokens] == [(2, 16, 32)]*2 and f.grid_sizes == [(4, 4)]*2
    assert [a and a.num_prefix_tokens for a in f.attention] == [1, 1]


@pytest.mark.parametrize('name,layers', [('vgg11', ['features.0', 'features.3']), ('mobilenet_v2', 'all'), ('vgg11_bn', ['features.1']),
                                         ('googlenet', 'all'), ('maxvit_t', 'all'), ('swin_t', 'all')])
def test_torchvision(name, layers):
    "Taps keep what a layer returned, also where the next one writes into it; the layers are stages of the network"
    torch.manual_seed(0)
    more = dict(init_weights=False) if name == 'googlenet' else {}
    size = 224 if name == 'maxvit_t' else 64
    model, x = getattr(torchvision.models, name)(num_classes=4, **more).eval(), torch.randn(1, 3, size, size)
    tapped, seen = TappedModel(model, layers), {}
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: (seen.setdefault(n, o.clone()), None)[1]) for n in tapped.names]
    with torch.no_grad():
        tapped.infer_shapes(x)
        seen.clear(); f = tapped(x)
    for h in handles: h.remove()
    for n,t in zip(tapped.names, f.tokens):
        own = seen[n].permute(0, 3, 1, 2) if name == 'swin_t' else seen[n]
        assert_close(t, own.flatten(2).mT, rtol=0, atol=0)
    assert f.logits.shape == (1, 4)


@pytest.mark.parametrize('name,size', [('levit_128s', 224), ('efficientformerv2_s0', 224), ('deit_tiny_distilled_patch16_224', 32)])
def test_two_heads_as_one_classifier(name, size):
    "The mean of both heads in training and evaluation, unless the second is requested"
    torch.manual_seed(0)
    args = dict(num_classes=5) | (dict(img_size=32, patch_size=8, depth=1) if size == 32 else {})
    s = wrap_student(timm.create_model(name, **args).train(), layers=[])
    x = torch.rand(2, 3, size, size)
    f = s(x); assert f.logits.shape == (2, 5) and f.dist_logits is None
    s.model.set_distilled_training(True)
    f = s(x); assert f.dist_logits.shape == (2, 5)
    loss = copy.deepcopy(s)(x).logits.sum(); loss.backward()
