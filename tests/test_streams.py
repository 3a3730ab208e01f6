"Shards of WebDataset: what is read, what is refused, and that every promise about runs holds for them"
import gzip
import io
import json
import os
import tarfile

import pytest
import torch
from conftest import TINY
from forks import on_ranks, state_of
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as F

from basd.data.sources import ImageDataset, open_source
from basd.runs.recipe_files import _placed
from basd.runs.recipes import load_recipe
from basd.training.build import build_trainer

pytest.importorskip("webdataset")
digits = open_source("digits")


def png(i):
    "A digit as the bytes of a file"
    F.to_pil_image(digits[i][0]).save(out := io.BytesIO(), "png")
    return out.getvalue()


def shard(path, samples):
    "Write a tar file of samples, name → {ending: bytes}"
    with tarfile.open(path, "w") as tar:
        for name, parts in samples.items():
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def sample(i): return dict(png=png(i), cls=str(int(digits.labels[i])).encode(), json=json.dumps(dict(odd=int(digits.labels[i]) % 2)).encode())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "200 digits in three shards, with the file that lists two splits"
    folder, at = tmp_path_factory.mktemp("data")/"shards", 0
    folder.mkdir()
    splits = dict(train=[70, 80], test=[50])
    for split, sizes in splits.items():
        names = [f"{split}-{k:04}.tar" for k in range(len(sizes))]
        for name, n in zip(names, sizes):
            shard(folder/name, {f"{i:05}": sample(i) for i in range(at, at + n)})
            at += n
        splits[split] = dict(name=split, filenames=names, shard_lengths=sizes, num_samples=sum(sizes))
    (folder/"_info.json").write_text(json.dumps(dict(splits=splits)))
    return folder


def test_shards_are_a_source(shards):
    "In their order, to the last pixel; splits by the list or by the names of shards; another label; no labels"
    train, test = (open_source(f"wds/{shards}", split) for split in ("train", "test"))
    assert (len(train), len(test), train.classes, train.name) == (150, 50, list("0123456789"), "wds/shards/train")
    assert_close(torch.cat([train.labels, test.labels]), digits.labels[:200])
    for i in (0, 69, 70, 149): assert_close(train[i][0], digits[i][0])
    named = open_source("wds/shards", "train-{0000..0001}.tar|150", root=shards.parent)
    assert_close(named.labels, train.labels)
    assert open_source(f"wds/{shards}", "test", label_key="odd").labels.tolist() == (digits.labels[150:200] % 2).tolist()
    assert set(open_source(f"wds/{shards}", labels=False).labels.tolist()) == {-1}
    for kind in ("wds", "hfids", "hfds"):
        assert _placed(dict(data=dict(source=f"{kind}/~/d")))["data"]["source"] == f"{kind}/{os.path.expanduser('~/d')}"


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(out := io.BytesIO(), "png")
    shard(tmp_path/"a.tar", {"0": dict(png=out.getvalue(), cls=b"0"), "1": sample(0)})
    assert open_source(f"wds/{tmp_path}", "a.tar")[0][0].min() == 255


@pytest.mark.parametrize("samples, split, message", [
    ({"0": sample(0), "1": dict(gif=png(1), cls=b"1")}, "a.tar", "1 in a.tar has no .jpg or .png or .webp, but .gif, .cls"),
    ({"0": sample(0), "1": dict(png=png(1))}, "a.tar", "1 in a.tar has no .cls, but .png"),
    ({"0": sample(0), "1": dict(png=png(1), cls=b"one")}, "a.tar", "invalid literal for int"),
    ({"0": sample(0), "1": sample(1)}, "a.tar|3", "2 images were found of 3; shards are missing, or their number is wrong"),
    ({"0": sample(0)}, "{a,b}.tar", "there is no shard .*b.tar"),
    ({"0": sample(0)}, "train", "split train not found .* name its splits with data.train_split"),
    ({"0": sample(0)}, "pipe:touch mark; tar", "there is no shard"),
    ({"0": sample(0)}, "packed.tar", "packed.tar is no whole, uncompressed tar file .*unpack it"),
    ({"0": sample(0)}, "cut.tar", "cut.tar is no whole, uncompressed tar file"),
], ids=["picture", "label", "text", "number", "shard", "split", "pipe", "packed", "cut"])
def test_what_a_reader_would_pass_over(samples, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path/"a.tar", samples)
    (tmp_path/"packed.tar").write_bytes(gzip.compress((tmp_path/"a.tar").read_bytes()))
    (tmp_path/"cut.tar").write_bytes((tmp_path/"a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=message) as e: open_source(f"wds/{tmp_path}", split)
    assert "\n" not in str(e.value) and not (tmp_path/"mark").exists()


def test_an_image_that_cannot_be_decoded(tmp_path):
    "As in a folder: an error that names its shard, or passed over"
    shard(tmp_path/"a.tar", {"0": sample(0), "1": dict(png=b"no picture", cls=b"1"), "2": sample(2)})
    source = open_source(f"wds/{tmp_path}", "a.tar")
    with pytest.raises(ValueError, match=r"image 1 of wds/.* \(a.tar\) cannot be decoded"): ImageDataset(source)
    assert len(ImageDataset(source, on_error="skip")) == 2


def test_images_alone(tmp_path):
    "Without labels, shards need none"
    shard(tmp_path/"a.tar", {f"0.d/{i}": dict(png=png(i)) for i in range(3)})
    source = open_source(f"wds/{tmp_path}", "a.tar", labels=False)
    assert source.labels.tolist() == [-1]*3 and torch.equal(source[2][0], digits[2][0])


def test_the_fingerprint_is_of_the_shards(tmp_path):
    marks = []
    for i in (0, 1, 0):
        shard(tmp_path/"a.tar", {"0": sample(i) | dict(cls=b"0")})
        marks.append(ImageDataset(open_source(f"wds/{tmp_path}", "a.tar")).fingerprint())
    assert marks[0] == marks[2] != marks[1] and marks[0].startswith("content-")


@pytest.mark.parametrize("place", ["https://example.org/shards", "pipe:touch mark", "nowhere"])
def test_only_a_folder_is_opened(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*copy those of a server first"): open_source(f"wds/{place}", "a.tar")
    assert not [*tmp_path.iterdir()]


def made(shards, folder, resume=False, memory=False):
    words = [*TINY, f"data.in_memory={memory}", f"data.source=wds/{shards}", "data.train_size=null", "data.val_size=0.2", "train.epochs=2", "train.log_gradients=false"]
    return build_trainer(load_recipe("basd_cifar10", words)[""], folder, "cpu", resume, bars=False)


def test_stop_and_go_on(shards, tmp_path):
    "In the middle of an epoch, with the state of an undisturbed run, bit for bit; read from the disk at random as from memory"
    assert made(shards, tmp_path/"whole", memory=True).fit()["test"]["best"]["n"] == 50
    half = made(shards, tmp_path/"half")
    half.agreed_to_stop = lambda: half.step >= 5
    assert half.fit() is None and half.step % half.data.per_epoch
    made(shards, tmp_path/"half", resume=True).fit()
    assert state_of(tmp_path/"half") == state_of(tmp_path/"whole")


def labels_of(shards): return open_source(f"wds/{shards}").labels


def test_every_rank_reads_all(shards, tmp_path):
    assert_close(on_ranks(labels_of, shards, ranks=2, folder=tmp_path), labels_of(shards))
