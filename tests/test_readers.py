"Reader processes: they outlive signals, end with their parent, and give the batches that no process gives"
import multiprocessing
import os
import signal
import time

import pytest
from torch.testing import assert_close

from basd.data.sources import ImageDataset, open_source
from basd.data.views import (DistributedBatchSampler, DualViewTransform, ReaderPool, ViewDataset, _ignore_interrupts,
                             build_loader, reader_process)


def started(seconds):
    "A reader process that does nothing for so long"
    process = multiprocessing.get_context("fork").Process(target=lambda: (reader_process(), time.sleep(seconds)))
    with _ignore_interrupts(): process.start()
    return process


needs_senders = pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="a system that does not name a signal's sender")


@needs_senders
def test_a_reader_outlives_signals_of_strangers():
    start, process = time.perf_counter(), started(1)
    for s in (signal.SIGTERM, signal.SIGINT): os.system(f"kill -{s:d} {process.pid}")   # a shell is a stranger
    process.join()
    assert time.perf_counter() - start > 1 and process.exitcode == 0


@needs_senders
def test_a_reader_ends_when_its_parent_says_so():
    process = started(60)
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


def same(a, b):
    assert len(a) == len(b)
    for x,y in zip(a, b):
        for k in x: assert_close(x[k], y[k], rtol=0, atol=0)


def test_pooled_readers_give_the_same_batches():
    "Also of a few images, some named twice, of a pass stopped half way, and of validation images in between"
    images, views = ImageDataset(open_source("digits")), DualViewTransform(32, 42)
    few = ViewDataset(images, [5, 9, 5, 700, 31, 32], views, seed=5)
    every = dict(fit=ViewDataset(images, None, views, seed=5),
                 val=ViewDataset(images, None, DualViewTransform(32), train=False))
    def passes(readers):
        given_up = readers("fit", few, DistributedBatchSampler(6, 2, 5))
        next(given_up)
        part = [*readers("fit", few, DistributedBatchSampler(6, 2, 5, epoch=3))]
        judged = [*readers("val", ViewDataset(images, [1, 2, 3], DualViewTransform(32), train=False),
                           DistributedBatchSampler(3, 2, shuffle=False, drop_last=False))]
        return part + judged + [*readers("fit", few, DistributedBatchSampler(6, 3, 5, epoch=4, twins=False))]

    expected = [*build_loader(images, few.indices, views, 2, seed=5, epoch=3),
                *build_loader(images, [1, 2, 3], DualViewTransform(32), 2, train=False),
                *build_loader(images, few.indices, views, 3, seed=5, epoch=4)]
    readers, before = ReaderPool(every, workers=2), set(multiprocessing.active_children())
    processes = []
    for r in (ReaderPool(every), readers, readers):
        same(passes(r), expected)
        processes.append({p.pid for p in set(multiprocessing.active_children()) - before})
    readers.close()
    assert ([len(s) for s in processes], processes[1] == processes[2]) == ([0, 2, 2], True)
    assert set(multiprocessing.active_children()) - before == set()
