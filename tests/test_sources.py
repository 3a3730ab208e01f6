"Tables that are not what they seem, opened as sources"
import hashlib

import pytest
from torch.testing import assert_close

from basd.data.sources import _open_hfds, open_source

datasets = pytest.importorskip("datasets")
V = datasets.Value
names = datasets.ClassLabel(names=["x", "y"])
digits = open_source("digits")
pictures = [digits.decode(i, digits.encoded_images(i, i + 1)[0]).permute(1, 2, 0).numpy() for i in range(10)]


@pytest.fixture
def write(tmp_path):
    "Opens a folder with a table of ten images and these columns, (type, values) each"
    datasets.disable_progress_bars()
    def one(split="train", label_key=None, labels=True, image="img", **columns):
        at = tmp_path/f"tables[{len(list(tmp_path.glob('tables*')))}]"                  # a pattern to `datasets`
        at.mkdir()
        kinds = {image: datasets.Image()} | {k: kind for k,(kind,_) in columns.items()}
        rows = {image: pictures} | {k: values for k,(_,values) in columns.items()}
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(at/"train.parquet")
        return _open_hfds(str(at), split, root=tmp_path/"cache", label_key=label_key, labels=labels)
    return one


def test_the_usual_column_is_taken_before_another(write):
    columns = dict(a=(names, [0, 1]*5), label=(names, [1, 0]*5))
    assert write(**columns).labels[:2].tolist() == [1, 0]
    assert write(**columns, label_key="a").labels[:2].tolist() == [0, 1]


def test_a_column_that_is_called_image(write):
    assert write(image="image", label=(names, [0, 1]*5)).labels[:2].tolist() == [0, 1]


def test_a_table_without_labels(write):
    "Images alone, captions or hidden labels: refused where labels are needed, else images without classes"
    hidden, captions = dict(label=(V("int64"), [-1]*10)), dict(a=(V("string"), list("abcdefghij")), b=(V("string"), ["x"]*10))
    for columns in ({}, hidden, captions):
        with pytest.raises(ValueError, match="has no column of labels|do not number|several columns of labels"): write(**columns)
        for labels in (None, False):
            bare = write(**columns, labels=labels)
            assert (bare.classes, set(bare.labels.tolist()), len(bare)) == ([], {-1}, 10)
            assert_close(bare.decode(3, bare.encoded_images(3, 4)[0]), digits[3][0])
    known = dict(label=(names, [0, 1]*5))
    assert write(**known, labels=None).classes == ["x", "y"] and write(**known, labels=False).classes == []
    with pytest.raises(ValueError, match="has no column 'kind'"): write(**known, labels=None, label_key="kind")


def test_texts_and_whole_floats_are_classes(write):
    text = write(kind=(V("string"), ["dog", "cat"]*5))
    assert (text.classes, text.labels[:2].tolist()) == (["cat", "dog"], [1, 0])
    assert_close(text[3][0], digits[3][0])
    assert write(label=(V("float32"), [2., 0.]*5)).labels[:2].tolist() == [2, 0]


def test_a_part_of_a_table_has_another_fingerprint(write):
    def hashed(source):
        h = hashlib.blake2b(digest_size=8)
        return source.feed(h), h.hexdigest()
    columns = dict(label=(names, [1, 0]*5))
    assert hashed(write(**columns)) == hashed(write(**columns)) != hashed(write("train[:9]", **columns))


@pytest.mark.parametrize("columns, words", [
    (dict(a=(names, [0]*10), b=(names, [0]*10)), r"several columns of labels \('a', 'b'\); its columns are"),
    (dict(a=(V("int64"), [0]*10), b=(V("string"), [""]*10)), r"several columns of labels \('a', 'b'\)"),
    (dict(), "has no column of labels"),
    (dict(label=(V("float32"), [.5]*10)), "such as '0.5' are neither whole numbers"),
    (dict(label=(V("int64"), [7, 5000, 20300, 7, 7]*2)), "would make 20,301 classes"),
    (dict(label=(V("uint64"), [2**62]*10)), "would make 4,611,686,018,427,387,905 classes"),
    (dict(label=(V("int64"), [0, None]*5)), "is empty in 5 of 10 rows"),
    (dict(label=(datasets.List(V("int64")), [[0, 1]]*10)), "not one class per image"),
    (dict(label=(V("timestamp[s]"), [0]*10)), r"holds timestamp\[ms\], not one class per image")])
def test_no_classes(columns, words, write):
    with pytest.raises(ValueError, match=words): write(**columns)
