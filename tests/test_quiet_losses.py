"Pictures, labels, weights and settings that would be lost in silence: between threads, in buffers, in half precision, among prefixes"
import json
import os
import threading
import time
import warnings
from itertools import pairwise

import basd
import numpy as np
import pytest
import timm
import torch
from fastcore.test import test_eq as equals
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from basd.core.processes import Meanwhile
from basd.data import pictures, sources
from basd.data.cache import RecordLayout
from basd.data.sources import ImageDataset, ImageFolderSource, Source, number_labels, without_labels
from basd.data.views import DistributedBatchSampler, DualViewTransform, build_loader
from basd.models.students import create_student, export_config, load_student, save_student
from basd.models.taps import TappedModel
from basd.models.teachers import load_weights


class OneBuffer(Dataset):
    "Reads every image into the same memory"
    def __init__(self, x, numpy): self.x, self.buffer = x, np.zeros((8, 8, 3), "uint8") if numpy else torch.zeros(3, 8, 8, dtype=torch.uint8)
    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        if isinstance(self.buffer, Tensor := torch.Tensor): self.buffer.copy_(self.x[i])
        else: self.buffer[:] = self.x[i].permute(1, 2, 0).numpy()
        return self.buffer, i % 2


@pytest.mark.parametrize("numpy", (False, True))
@pytest.mark.parametrize("memory", (True, False))
def test_a_buffer_that_is_filled_again(numpy, memory):
    "Every image would be the last one"
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    images = ImageDataset(Source(OneBuffer(x, numpy), torch.arange(6) % 2), memory=memory)
    assert torch.equal(torch.stack([images.read(i)[0] for i in range(6)]), x)
    first, _ = images.read(0)
    images.read(5)
    assert torch.equal(first, x[0])


def test_arrays_of_any_strides():
    x = np.arange(8*8*3, dtype="uint8").reshape(8, 8, 3)
    for view in (x[::-1], x[:, ::-1], x[..., ::-1], x.transpose(1, 0, 2)):
        assert np.array_equal(pictures.decode_picture(view).permute(1, 2, 0).numpy(), view)
    still = x.copy()
    still.flags.writeable = False                                   # torch warns of such memory
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.decode_picture(still)


def together(*works):
    threads = [threading.Thread(target=w) for w in works]
    for t in threads: t.start()
    for t in threads: t.join()


def test_pillows_limit_survives_threads(monkeypatch):
    "The second thread took the first one's value for the user's, and left it behind"
    limit, opened, inside = Image.MAX_IMAGE_PIXELS, Image.open, threading.Barrier(2)
    raw = _png()

    def slow(file):
        if order := threading.current_thread().name == "late": inside.wait()
        else: inside.wait(); time.sleep(.05)                        # leaves first or last, and the other way round below
        if order is late_first: time.sleep(.1)
        return opened(file)
    monkeypatch.setattr(Image, "open", slow)
    for late_first in (True, False):
        late = threading.Thread(target=lambda: pictures._open_picture(raw), name="late")
        other = threading.Thread(target=lambda: pictures._open_picture(raw))
        for t in (other, late): t.start(); time.sleep(.02)
        for t in (other, late): t.join()
        equals(Image.MAX_IMAGE_PIXELS, limit)


def _png():
    import io
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()


def test_offline_mode_survives_threads(monkeypatch):
    import datasets.config as readers
    import huggingface_hub.constants as hub
    for m in (readers, hub): monkeypatch.setattr(m, "HF_HUB_OFFLINE", False)
    seen = []
    a_in, b_in, a_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with sources._offline(True): a_in.set(); b_in.wait(5)
        a_out.set()

    def second():
        a_in.wait(5)
        with sources._offline(True): b_in.set(); a_out.wait(5); seen.append(hub.HF_HUB_OFFLINE)
    together(first, second)
    equals((readers.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE, seen), (False, False, [True]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_process_is_alone():
    "No thread of the parent will ever leave there"
    class Held: value = 1
    setting = Meanwhile(Held, "value", 2)
    with setting:
        setting.lock.acquire()                                      # as where another thread is just entering
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                     # of forks beside threads
                child = os.fork()
            if child == 0:
                os._exit(0 if Held.value == 1 and not setting.inside and not setting.lock.locked() else 1)
        finally: setting.lock.release()
        equals(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        equals(Held.value, 2)
    equals(Held.value, 1)


class Own(Dataset):
    "Has attributes called as torchvision's are, with something else in them"
    def __init__(self, x, **more): self.x = x; vars(self).update(more)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], i % 2


@pytest.mark.parametrize("more", (dict(data=np.arange(600)), dict(data=np.zeros((600, 3))), dict(samples=[("nowhere.png", 0)]*600)))
def test_a_fingerprint_says_what_it_hashed(more):
    "`content` although no pixel had been hashed: two data sets had the same mark"
    x = torch.randint(256, (600, 3, 4, 4), dtype=torch.uint8)
    y = x.clone()
    y[1] = 0                                                        # not among the 256 samples
    marks = [ImageDataset(Source(Own(v, **more), torch.arange(600) % 2)).fingerprint() for v in (x, y)]
    for m in marks: assert m.startswith("sample-"), m
    whole = [ImageDataset(Source(TensorDataset(v, torch.arange(600) % 2), torch.arange(600) % 2)).fingerprint() for v in (x, y)]
    assert whole[0] != whole[1] and all(m.startswith("content-") for m in whole)


def test_files_that_are_gone_were_not_hashed(tmp_path):
    for i in range(3): Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path/f"{i}.png")
    import hashlib
    paths = [str(tmp_path/f"{i}.png") for i in range(3)]
    equals(sources._feed_files(hashlib.md5(), paths, str(tmp_path), 2**30), "content")
    equals(sources._feed_files(hashlib.md5(), [*paths, str(tmp_path/"3.png")], str(tmp_path), 2**30), "sample")
    assert not sources._feed_raw(hashlib.md5(), str(tmp_path/"3.png"))


@pytest.mark.parametrize("batch, world, twins, fits", [
    (12, 1, False, True), (12, 2, False, True), (12, 3, False, True), (12, 4, False, False), (5, 1, False, False),
    (6, 1, True, False), (8, 1, True, True), (12, 3, True, True), (6, 3, True, False), (24, 3, True, True)])
def test_pairs_of_a_kind_are_not_cut(batch, world, twins, fits):
    "An odd share, or an odd half of twins, mixes images with labels and images without"
    kinds = torch.arange(100) % 3 == 0
    make = lambda rank: DistributedBatchSampler(100, batch, rank=rank, world=world, twins=twins, kinds=kinds)
    if not fits:
        with pytest.raises(ValueError, match="cuts pairs of one kind") as e: make(0)
        good = int(str(e.value).split()[-1])
        assert DistributedBatchSampler(100, good, world=world, twins=twins, kinds=kinds)
        return
    for rank in range(world):
        for b in list(make(rank))[:2]:                              # the last ones may hold what was left over
            ks = [kinds[at[1]].item() for at in b]
            assert all(a == c for a,c in list(pairwise(ks))[::2])


def test_validation_stays_in_order():
    x = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    images = ImageDataset(Source(TensorDataset(x, torch.arange(12) % 2), torch.arange(12) % 2))
    few = torch.where(torch.arange(12) % 3 == 0, images.labels, -1)
    seen = [i for b in build_loader(images, None, DualViewTransform(8), 4, train=False, labels=few) for i in b["index"].tolist()]
    equals(seen, list(range(12)))
    odd = build_loader(images, None, DualViewTransform(8), 3, labels=few, pairs=False)
    equals(len(next(iter(odd))["label"]), 3)
    with pytest.raises(ValueError, match="choose a multiple of 2"): build_loader(images, None, DualViewTransform(8), 3, labels=few)


@pytest.mark.parametrize("wrong", (dict(padding=-1), dict(recorded=0), dict(fill=300), dict(padding=1.5)))
def test_views_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="): DualViewTransform(8, **wrong)


def test_labels_of_a_data_frame():
    "pandas gives arrays of objects"
    y, names = number_labels(np.array(["cat", "dog", "cat"], dtype=object))
    equals((y.tolist(), names), ([0, 1, 0], ["cat", "dog"]))
    with pytest.raises(ValueError, match="neither whole numbers nor texts"): number_labels(np.array(["cat", 3], dtype=object))


def test_images_without_labels_have_nothing_to_number():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    bare = without_labels(Source(TensorDataset(x, torch.arange(4)), torch.arange(4)))
    equals((bare.under(["a", "b"]).classes, bare.under(["a", "b"]).labels.tolist()), ([], [-1]*4))


def test_half_precision_is_not_enough_for_small_numbers():
    layout = RecordLayout(dict(tokens=(4, 3)))
    rows = torch.randn(5, 4, 3)
    for scale,fits in ((1., True), (1e-3, True), (1e-6, False), (1e-9, False), (0., True)):
        if not fits:
            with pytest.raises(ValueError, match="use a cache of float32"): layout.pack(dict(tokens=rows*scale))
        else: assert_close(layout.unpack(layout.pack(dict(tokens=rows*scale)))["tokens"].float(), rows*scale, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("first", ("student", "teacher"))
@pytest.mark.parametrize("pairs", (("student.", "teacher."), ("model.", "ema_model."), ("student.backbone.", "teacher.backbone."), ("model.", "model_ema.")))
def test_of_two_models_in_a_file_the_better_one(first, pairs, tmp_path):
    "Flat names are read as nested ones are: the average before the model, the teacher before the student"
    make = lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    a, b, model = make(), make(), make()
    parts = [(pairs[0], a), (pairs[1], b)]
    state = {f"{p}{k}": v for p,m in (parts if first == "student" else parts[::-1]) for k,v in m.state_dict().items()}
    torch.save(state, tmp_path/"both.pth")
    words = load_weights(model, tmp_path/"both.pth")
    for k,v in model.state_dict().items(): assert torch.equal(v, b.state_dict()[k])
    assert f"without {pairs[1]}" in words and "leaving" in words
    load_weights(model, tmp_path/"both.pth", key=pairs[0].rstrip("."))
    for k,v in model.state_dict().items(): assert torch.equal(v, a.state_dict()[k])


@pytest.mark.parametrize("name", ("deit_tiny_lift", "deit_tiny_wide_last"))
def test_a_wide_end_takes_another_head(name, tmp_path):
    student = create_student(name, 7, img_size=24, patch_size=4, depth=2, width=48, heads=3, last_width=72)
    x = torch.rand(2, 3, 24, 24)
    for classes in (5, 0, 3):
        student.model.reset_classifier(classes)
        out = student.model(x)
        equals((out.shape[1], student.model.num_classes), (classes or 72, classes))
    student.model_args["num_classes"] = 3
    save_student(student.eval(), tmp_path)
    assert_close(load_student(tmp_path).eval()(x).logits, student(x).logits, rtol=0, atol=0)


def test_names_of_classes_are_as_many_as_classes():
    student = create_student("deit_tiny_patch16_224", 3, img_size=24, patch_size=4, depth=1, width=24, heads=2)
    student.label_names = ["a", "b"]
    with pytest.raises(ValueError, match="2 names, and the student has 3 classes"): export_config(student)
    student.label_names = ["a", "b", "c"]
    equals(json.loads(export_config(student))["label_names"], ["a", "b", "c"])


def test_images_are_normalized_in_full_precision():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).bfloat16()
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    tapped = TappedModel(model, None, mean=mean.tolist(), std=std.tolist())
    x = torch.rand(4, 3, 2, 2).bfloat16()
    true = (x.float() - mean.view(3, 1, 1))/std.view(3, 1, 1)
    equals(tapped.normalize(x).dtype, torch.bfloat16)
    assert torch.equal(tapped.normalize(x), true.bfloat16())        # rounded once
    assert TappedModel(nn.Linear(2, 2), None, mean=mean.tolist(), std=std.tolist()).normalize(x).dtype == torch.float32
    assert TappedModel(nn.Linear(2, 2).double(), None, mean=mean.tolist(), std=std.tolist()).normalize(x.double()).dtype == torch.float64


def small(seed, **more):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, depth=4, embed_dim=24, num_heads=3, **more)


@pytest.mark.parametrize("name", ("basd", "crd", "rkd"))
@pytest.mark.parametrize("student, teacher", ((torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float64)))
def test_models_in_float64(name, student, teacher):
    "Beside a method in float32, which ended in a traceback of a matrix product"
    def loss(student, teacher, whole=False):
        task = basd.create_task(name, small(0).to(student), basd.create_teacher(small(1).to(teacher), untrained=True), total_steps=2, seed=3)
        if whole: task.double()
        torch.manual_seed(2)
        x = torch.rand(8, 3, 16, 16, dtype=torch.float64)
        out = task(x.to(torch.float64 if whole else student), torch.arange(8))["loss"]
        out.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.student.parameters())
        return out.item(), out.dtype
    exact, _ = loss(torch.float32, torch.float32)
    assert loss(student, teacher)[0] == pytest.approx(exact, rel=1e-4)
    if student == teacher: assert loss(student, teacher, whole=True)[1] == torch.float64


def test_gradient_norms_through_reentrant_checkpointing():
    "A sentence in place of a traceback"
    from basd.training.task import loss_gradients
    first, net = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    x, params = torch.randn(3, 4), [*first.parameters(), *net.parameters()]
    out = torch.utils.checkpoint.checkpoint(net, first(x), use_reentrant=True).sum()
    with pytest.raises(ValueError, match="set train.log_gradients=false"): loss_gradients(dict(a=out), params)
    out = torch.utils.checkpoint.checkpoint(net, first(x), use_reentrant=False).sum()
    assert (loss_gradients(dict(a=out), params)["a"] != 0).all()
