"""The smallest member of every timm family as a teacher: are its tokens, grid, prefix and attention read right?

    python experiments/families.py                 # all, in one process; writes experiments/results/families.json
    python experiments/families.py vit deit hrnet   # families whose name has one of these words, printed only
    python experiments/families.py --choose         # count the parameters of all models anew, to choose the smallest (minutes)

A family is what one source file of timm holds under one leading word (`vision_transformer/deit`). Models have random weights, all of
them shaken so that no layer is an identity, and are built for small images and with three blocks where they take `img_size` and `depth`.
For each one result:
- agree: the tokens of an ordinary, tapped forward pass equal timm's second implementation, `forward_intermediates`, as do grid and
  prefix (which is what the layer returned beyond the grid); every layer of `layer_names` does. Where attention is read, its map equals the
  softmax that the unfused code computes.
- refused: `TappedModel` gives the reason in one sentence.
- no reference: it is read, and timm has no second implementation to compare with.
- differs: neither of these. There must be none.
"""
import json, platform, re, subprocess, sys, time, warnings
from pathlib import Path

import timm
import torch
import torchvision
from timm.models import _registry

from basd.models.taps import TappedModel

here = Path(__file__).parent
results = here/'results'/'families.json'


def family(name): return f"{_registry._model_to_module[name]}/{re.match('[a-z]*', name.split('_')[0]).group()}"

def timm_models(): return [n for n in timm.list_models() if _registry.model_entrypoint(n).__module__.startswith('timm.')]

def choose():
    "Smallest member of each family"
    smallest = {}
    for name in timm_models():
        with torch.device('meta'): size = sum(p.numel() for p in timm.create_model(name).parameters())
        if family(name) not in smallest or size < smallest[family(name)][1]: smallest[family(name)] = name, size
    return {f: n for f,(n,_) in sorted(smallest.items())}

def shaken(name, **kwargs):
    "A model without an identity among its layers"
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02*torch.randn_like(p))
    return model

def small(name):
    "The model for the smallest images that it takes, with an input"
    native, last = _registry.get_pretrained_cfg(name).input_size, None
    for size in (96, 112, 128, 224, native[-1]):
        for kwargs in (dict(img_size=size, depth=3), dict(depth=3), dict(img_size=size), {}):
            x = torch.randn(2, native[0], size, size, generator=torch.Generator().manual_seed(1))
            try:
                model = shaken(name, **kwargs)
                with torch.no_grad():
                    model(x)
                    if hasattr(model, 'forward_intermediates'): model.forward_intermediates(x)
                return model, x, kwargs
            except Exception as e: last = e
    raise last

def unfused_maps(model, x):
    "What the unfused attention of timm gives to its dropout, by the module's name"
    maps, fused, handles = {}, [m for m in model.modules() if getattr(m, 'fused_attn', False)], []
    for m in fused: m.fused_attn = False
    for name,m in model.named_modules():
        if isinstance(getattr(m, 'attn_drop', None), torch.nn.Module):
            handles.append(m.attn_drop.register_forward_pre_hook(lambda mod, args, name=name: maps.setdefault(name, args[0])))
    with torch.no_grad(): model(x)
    for h in handles: h.remove()
    for m in fused: m.fused_attn = True
    return maps

def error(a, b): return float((a.double() - b.double()).abs().max()/b.double().abs().max().clamp(min=1e-12))

def against_timm(model, x, names, f):
    "Largest relative error of tokens, and whether each layer equals a map of the second implementation in one order"
    with torch.no_grad(): maps = [m for m in model.forward_intermediates(x, intermediates_only=True) if m.dim() == 4]
    worst = 0.
    for n,t,grid in zip(names, f.tokens, f.grid_sizes):
        fits = [m for m in maps if grid == tuple(m.shape[2:]) and t.shape[-1] == m.shape[1]]
        worst = max(worst, min((error(t, m.flatten(2).mT) for m in fits), default=float('inf')))
    return worst

def against_unfused(model, x, names, f):
    "Largest error of the attention maps that are read"
    maps, worst = unfused_maps(model, x), 0.
    for n,a in zip(names, f.attention):
        if a is None: continue
        true = [m for k,m in maps.items() if (k == n or k.startswith(f'{n}.')) and m.shape == a.full_map().shape]
        worst = max(worst, float((a.full_map() - true[0]).abs().max()) if len(true) == 1 else float('inf'))
    return worst

def trial(name):
    "Result for one model as a teacher"
    began = time.perf_counter()
    try: model, x, kwargs = small(name)
    except Exception as e: return dict(model=name, result='not runnable', why=f'{type(e).__name__}: {e}'[:300])
    row = dict(model=name, images=list(x.shape[1:]), arguments=kwargs, reference=hasattr(model, 'forward_intermediates'))
    try:
        teacher = TappedModel(model)
        teacher.infer_shapes(x[:1])
        with torch.no_grad(): f = teacher.eval()(x)
    except ValueError as e: return row | dict(result='refused', why=str(e), seconds=round(time.perf_counter() - began, 1))
    except Exception as e:
        return row | dict(result='differs', why=f'not in a sentence, {type(e).__name__}: {e}'[:300])
    row |= dict(layers=len(f), names=[teacher.names[0], teacher.names[-1]], tokens=[t.shape[1] for t in f.tokens],
                widths=[t.shape[2] for t in f.tokens], grids=[g and list(g) for g in f.grid_sizes],
                prefix=[r.prefix or 0 for r in teacher.readings], copies=sum(r.copy for r in teacher.readings),
                order=['rows' if r.order is None else 'restored' for r in teacher.readings],
                maps=['last' if r.last else 'first' if r.last is False else 'tokens' for r in teacher.readings],
                attention=sum(a is not None for a in f.attention), unread=next((u for u in f.unread if u), None))
    tokens = against_timm(model, x, teacher.names, f) if row['reference'] else None
    maps = against_unfused(model, x, teacher.names, f) if row['attention'] else None
    good = (tokens is None or tokens < 1e-4) and (maps is None or maps < 1e-4)
    return row | dict(token_error=tokens, map_error=maps, seconds=round(time.perf_counter() - began, 1),
                      result='differs' if not good else 'agree' if row['reference'] else 'no reference')


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    words = [w for w in sys.argv[1:] if not w.startswith('-')]
    kept = json.loads(results.read_text()) if results.is_file() else {}
    chosen = choose() if '--choose' in sys.argv or not kept else {f: r['model'] for f,r in kept['families'].items()}
    rows, began = {}, time.perf_counter()
    for f,name in chosen.items():
        if words and not any(w in f for w in words): continue
        r = rows[f] = trial(name)
        print(f"{f:36} {name:40} {r['result']:13} {r.get('why') or r.get('unread') or ''}"[:200], flush=True)
    counts = {k: sum(r['result'] == k for r in rows.values()) for k in sorted({r['result'] for r in rows.values()})}
    print(counts, 'attention read in', sum(bool(r.get('attention')) for r in rows.values()))
    if not words:
        commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=here, capture_output=True, text=True).stdout.strip()
        results.write_text(json.dumps(dict(
            what='smallest member of every timm family as a teacher, experiments/families.py', commit=commit, seed=0,
            versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                          torchvision=torchvision.__version__), hardware=f'{platform.machine()}, CPU',
            seconds=round(time.perf_counter() - began), counts=counts, families=rows), indent=1) + '\n')
    sys.exit('differs' in counts)
