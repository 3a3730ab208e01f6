"CKA on several ranks is that of the whole batch, and no step of the loss reads a value on the host"
import pytest
import torch
from forks import on_ranks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from basd.core.distributed import all_reduce_mean, rank, world_size
from basd.losses.base import Layers
from basd.losses.cka import CKALoss


def value_and_gradient():
    "Of each form, on this rank's share of twelve images; the mean over ranks, as data parallelism has it"
    torch.manual_seed(0)
    x, t, w = (torch.randn(*s, dtype=torch.double) for s in ((12, 9, 5), (12, 16, 7), (5, 6)))
    x, t = x.chunk(world_size())[rank()], t.chunk(world_size())[rank()]
    found = []
    for how in ((rows, debias) for rows in ("token", "image", "within") for debias in (False, True)):
        v, g = w.clone().requires_grad_(), torch.Generator().manual_seed(3)
        loss = CKALoss(*how, max_rows=48 if how[0] == "token" else None)
        l = loss(Layers([torch.tanh(x @ v)], [(3, 3)]), Layers([t], [(4, 4)]), loss.sample([9], len(x), g))
        l.backward()
        found.append(all_reduce_mean(torch.cat([l.detach()[None], v.grad.flatten()])))
    return torch.stack(found)


def test_two_ranks_are_one(tmp_path):
    one, two = (on_ranks(value_and_gradient, ranks=ranks, folder=tmp_path) for ranks in (1, 2))
    assert_close(two, one, rtol=1e-9, atol=1e-12)


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
