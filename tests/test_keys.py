"Every key has a meaning, and the schema that the command and editors read says what the classes say"
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from basd.runs.recipe_files import RECIPES_DIR, check_words, read_recipe, read_schema, recipe_keys, recipe_names, stage_trees
from basd.runs.recipes import load_recipe, recipe_schema, to_dict


def test_the_file_has_what_the_classes_have():
    made = recipe_schema()
    assert read_schema() == made, "a key has changed: run python tools/schema.py, and commit basd/recipe.schema.json"
    Draft202012Validator.check_schema(made)


def test_no_key_is_without_a_meaning():
    "A meaning stands alone: it is not the key's own name, nor does it begin in the middle of a sentence or lean on the key before"
    keys = recipe_keys()
    assert len(keys) > 400 and [k.key for k in keys if not k.meaning] == []
    assert [k.key for k in keys if re.match(r"(of|over|likewise|the same)\b", k.meaning) or "likewise" in k.meaning] == []
    assert [k.key for k in keys if k.meaning.strip(" .").lower() == k.key.rpartition(".")[2].replace("_", " ")] == []


def valid(tree): return not [e.message for e in Draft202012Validator(read_schema()).iter_errors(tree)]


def test_shipped_recipes_are_valid():
    "As they are written, merged, and with every default filled in"
    plain = lambda x: ({k: plain(v) for k, v in x.items()} if isinstance(x, dict)
                       else [plain(v) for v in x] if isinstance(x, (list, tuple)) else x)
    for file in RECIPES_DIR.rglob("*.yaml"): assert valid(yaml.safe_load(file.read_text(encoding="utf-8"))), file
    for name in recipe_names():
        assert valid(read_recipe(name)), name
        for tree in stage_trees(name, read_recipe(name), [], None).values(): check_words(tree)
        stages = {k or "all": to_dict(r) for k, r in load_recipe(name).items()}
        assert valid(plain(dict(stages=stages))), name


@pytest.mark.parametrize("text", [
    "train: {epoch: 3}", "train: {epochs: many}", "train: {epochs: 0}", "views: {crop: free}", "tain: {}", "stages: {a: {train: {epoch: 1}}}",
    "method: {name: basd, distill_wieght: 1}", "method: {name: basd, losses: {rsd: {kapa: 1}}}", "method: {name: bsad}",
    "method: {name: basd, selector: {name: ramp, tua: 1}}", "method: {name: match, losses: {cka: {row: token}}}",
    "method: {no_method_has_it: 1}", "teacher: {extra_teachers: [{modle: x}]}"])
def test_a_wrong_recipe_is_invalid(text): assert not valid(yaml.safe_load(text))


@pytest.mark.parametrize("text", [
    "method: {name: 'my.module:Mine', anything: 1}", "method: {losses: {spectral: null}}", "stages: {teacher: null}",
    "method: {name: match, losses: {'my.losses:Mine': {weight: 1}}}", "student: {kwargs: null}"])
def test_what_only_the_classes_can_judge_is_valid(text): assert valid(yaml.safe_load(text))


def test_words_are_refused_alike_without_the_classes():
    "A misspelled key or choice gets one sentence, whether the file or the classes find it"
    for change in ("train.epoch=3", "views.crop=free", "method.distill_wieght=1", "method.losses.rsd.kapa=1", "method.name=bsad",
                   "data.on_error=skp"):
        messages = []
        for check in (lambda: [check_words(t) for t in stage_trees("x", read_recipe("basd_cifar10"), [change], None).values()],
                      lambda: load_recipe("basd_cifar10", change)):
            with pytest.raises(ValueError) as e: check()
            messages.append(re.sub(r"; allowed: .*", "", str(e.value)))
        assert messages[0] == messages[1], messages
