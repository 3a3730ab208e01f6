"CKA on several ranks is that of the whole batch, and no step of the loss reads a value on the host"
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from basd.losses.base import Layers
from basd.losses.cka import CKALoss

SCRIPT = """
import sys, torch, torch.distributed as dist
from basd.losses.base import Layers
from basd.losses.cka import CKALoss
def run(rank, ranks):
    torch.manual_seed(0)
    x, t, w = (torch.randn(*s, dtype=torch.double) for s in ((12, 9, 5), (12, 16, 7), (5, 6)))
    x, t = x.chunk(ranks)[rank], t.chunk(ranks)[rank]
    found = []
    for how in ((rows, debias) for rows in ('token', 'image', 'within') for debias in (False, True)):
        v, g = w.clone().requires_grad_(), torch.Generator().manual_seed(3)
        loss = CKALoss(*how, max_rows=48 if how[0] == 'token' else None)
        l = loss(Layers([torch.tanh(x @ v)], [(3, 3)]), Layers([t], [(4, 4)]), loss.sample([9], len(x), g))
        l.backward()
        both = torch.cat([l.detach()[None], v.grad.flatten()])
        if ranks > 1: dist.all_reduce(both); both = both/ranks       # as data parallelism does with gradients
        found.append(both)
    return torch.stack(found)
"""
WORKER = SCRIPT + """
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{out}.meet', rank=rank, world_size=2)
found = run(rank, 2)
if rank == 0: torch.save(found, out)
dist.barrier(); dist.destroy_process_group()
"""


def test_two_ranks_are_one(tmp_path):
    file, out = tmp_path/"worker.py", tmp_path/"out"
    file.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})" + WORKER)
    workers = [subprocess.Popen([sys.executable, file, str(r), out]) for r in range(2)]
    assert [w.wait() for w in workers] == [0, 0]
    here = {}
    exec(SCRIPT, here)
    assert_close(torch.load(out), here["run"](0, 1), rtol=1e-9, atol=1e-12)


class NoReading(TorchDispatchMode):
    "Raises an error where a value is read"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is torch.ops.aten._local_scalar_dense.default: raise RuntimeError("a value was read")
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("rows", ["token", "image", "within"])
def test_no_value_is_read(rows, debias):
    s, t = torch.randn(8, 9, 12, requires_grad=True), torch.randn(8, 16, 20)
    loss = CKALoss(rows, debias, log=True, max_rows=32 if rows == "token" else None)
    def step(): return loss(Layers([s], [(3, 3)]), Layers([t], [(4, 4)]))
    step()                                                           # builds the resampling weights
    with NoReading():
        value = step()
        value.backward()
    with pytest.raises(RuntimeError, match="read"), NoReading(): value.detach().item()
