"""A recipe is a frame and a method: every former name means what it meant, and every method goes with every frame or says why not"""
import hashlib
import json

import pytest
import torch
from steps import take_steps
from torch import nn

from basd.training.build import create_schedule
from basd.training.optimizers import create_optimizer
from basd.runs.recipe_files import frame_names, method_names, read_frame, read_recipe
from basd.runs.recipes import load_recipe, to_dict

# name → first digits of the digest of its resolved recipe at commit b4e7274, before there were frames; where BASD has its
# default selector, when that became `complementary`
FORMER = dict(item.split("=") for item in """
alp=e705ff51 amtml=1bb6cc5b assistant=b3c22ede at=82a59dd3 basd_cifar10=623aec49 basd_cifar100=601db378
basd_cifar10_fast=dd3d62c4 basd_equal_weights=2ef5a772 basd_fourier=de2d0964 basd_imagenet=15ccae6b
basd_imagenet_fast=ed755daf basd_literal=d4bd9eb4 basd_map_final=f44b6bf2 basd_map_first=412b1228
basd_map_first_to_last=67513a02 basd_map_mean=f97505f3 basd_map_random=3e2ace75 basd_map_reversed=08f53b7d
basd_map_uniform=bbac3006 basd_select_arc_length=5381df3d basd_select_complementary=66bd9f58
basd_select_leap_basd=4b021fbe basd_select_learning_progress=49f97024 basd_select_nearest=0d830ec5
basd_select_nearest_band=7bba4cd5 basd_select_progressive=31fc33d0 basd_select_ramp=fd00a245
basd_study=d6527a8a basd_without_attn=39bf4c59 basd_without_rel=b5bfac9e basd_without_rsd=219e6871
basd_without_spectral=5529150b byot=186b0883 cifar_improved=4b8514bc cka=e77a9da8 convnext_v2_cifar=d327f9d3
crd=e571daee ctkd=7fcf7d67 deit_cifar=0b3d5d28 deit_cifar_distill=fa33714a deit_cifar_distill_token=e14ea78b
deit_ss_distill_cifar_ablation_ce_only=bde27a0c deit_ss_distill_cka_cifar=83d0a31f
deit_ss_distill_gram_ablation=c577dda8 digits=ca647ec3 distilbert=f6fee0d1 diverse=b4f9086f dkd=be899ab8
dot=0c39c5ef dual_head=15b9ef04 fdd=aa82a203 fitnets=9e0258ca fourier=bba7edba gram=acbf392a kd=9e872a11
lad=180ae252 last_layer=0e924bb0 leap=79be8bd0 lift=8a74511b minilm=23bfaa19 mnist_improved=12c5a535
ofa=d214d22b patient_kd=87ed8b9c pkd=4fbf786b pocl=3eeda3c2 quickstart=e5d8c2e1 resnet18_cifar=7106dd90
reverse_kl=19b2ffce rkd=78e7801b rsd=0f942876 spectralkd=a9f9b650 tinybert=1f3a3a8f token_cosine=cd74d9ad
two_stage=370058c4 unlabeled=8dad3a8e vrm=ddc014b1 wide_last=e61ea0f2
""".split())


# keys that are younger than the digests, with the defaults that leave a recipe what it was
YOUNGER = dict(data=dict(knn_source=None), student=dict(grad_checkpointing=False), teacher=dict(shard=False), views=dict(crop_padding=None),
               train=dict(lr_steps=None, lr_decay=.1, nesterov=True, decay_all=False, log=["jsonl"], callbacks=[], knn_every=0,
                          eval_metric="auto"))


def digest(name):
    "Of all that a recipe resolves to, but the words about it"
    stages = {k: {n: v for n, v in to_dict(r).items() if n not in ("about", "paper")} for k, r in load_recipe(name).items()}
    for section, keys in YOUNGER.items():
        for tree in stages.values():
            for key, default in keys.items(): assert tree[section].pop(key) == default, (name, key)
    return hashlib.sha256(json.dumps(stages).encode()).hexdigest()[:8]


def test_former_names_are_the_recipes_that_they_were():
    assert len(FORMER) == 77
    assert {name: digest(name) for name in FORMER} == FORMER
    for pair in ("digits/rkd", "ablations/basd_map_mean", "rkd@digits"): assert digest(pair) == FORMER[pair.split("/")[-1].split("@")[0]]


def test_a_file_changes_the_stage_that_it_extends(tmp_path):
    "Its stage is called as in the packaged recipe, whatever the file is called"
    (tmp_path/"mine.yaml").write_text("extends: kd\nstages: {kd: {method: {T: 2.0}, train: {lr: 0.1}}}")
    found = load_recipe(str(tmp_path/"mine.yaml"))
    assert [*found] == [*load_recipe("kd")] and (found["kd"].method.options.T, found["kd"].train.lr) == (2., .1)
    (tmp_path/"other.yaml").write_text("extends: cka\nmethod: {student_layers: [0, 2]}")
    assert load_recipe(str(tmp_path/"other.yaml"))["cka"].method.options.student_layers in ([0, 2], (0, 2))


@pytest.mark.parametrize("frame", frame_names())
def test_each_method_goes_with_each_frame_or_says_why_not(frame):
    refused = {}
    for method in method_names():
        try: tree = read_recipe(f"{method}@{frame}")
        except ValueError as e: refused[method] = str(e); continue
        assert tree["data"] == read_frame(frame)[0]["data"]
        if method == "kd": assert load_recipe(f"kd@{frame}")
    lacks = read_frame(frame)[0].get("lacks") or {}
    assert all(f"{m} needs " in text and any(why in text for why in lacks.values()) and "; frames on which it runs: " in text for m, text in refused.items())
    assert bool(refused) == bool(lacks)


class Plain(nn.Module):
    "A task of two layers"
    def __init__(self): super().__init__(); self.student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    def no_weight_decay(self): return set()


@pytest.mark.parametrize("frame, teacher, student", [("cifar100_r56_r20", "resnet56_cifar", "resnet20_cifar"),
                                                     ("cifar100_wrn40_wrn16", "wrn_40_2_cifar", "wrn_16_2_cifar")])
def test_kd_is_set_up_as_in_repdistiller(frame, teacher, student):
    "train_teacher.py, train_student.py --distill kd -r 0.1 -a 0.9, dataset/cifar100.py"
    stages = load_recipe(f"kd@{frame}")
    assert [r.student.model for r in stages.values()] == [teacher, student] and stages["kd"].teacher.run == "stage:teacher"
    for r in stages.values():
        assert (r.data.source, r.data.batch_size, r.data.val_size) == ("torch/cifar100", 64, 0)
        assert (r.views.crop, r.views.crop_padding, r.views.flip, r.views.color) == ("shared", 4, .5, "none")
        assert r.views.random_erasing == r.views.mix_prob == r.views.label_smoothing == 0
        assert (r.student.mean, r.student.std) == ((.5071, .4867, .4408), (.2675, .2565, .2761))
        assert r.train.clip_grad is None and r.train.epochs == 240 and r.train.export == "last"
        optimizer = create_optimizer(task := Plain(), r.train)
        group, = optimizer.param_groups                       # one group: norms and biases decay, too
        assert len(group["params"]) == len(list(task.parameters()))
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (.9, False, 5e-4)
        schedule, lrs = create_schedule(optimizer, r.train, per_epoch=782, total=240*782), {}
        for step in (0, 1, 150*782 - 1, 150*782, 180*782 - 1, 180*782, 210*782 - 1, 210*782, 240*782 - 1):
            schedule.step_update(step)                        # after so many steps
            lrs[step] = optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(list(lrs.values()), [.05, .05, .05, .005, .005, 5e-4, 5e-4, 5e-5, 5e-5])
    o = stages["kd"].method.options
    assert (stages["kd"].method.name, o.alpha, o.T, o.kd_warmup) == ("distill", .9, 4., 0)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory): return tmp_path_factory.mktemp("trainings")


@pytest.mark.parametrize("frame", frame_names())
def test_methods_take_steps_on_each_frame(frame, trainings):
    "With a small teacher and student of the frame's families; those that a frame lacks something for are refused, as above"
    took, lacks = [], read_frame(frame)[0].get("lacks") or {}
    for method in ("kd", "dkd", "vrm", "rkd", "basd", *["fitnets"]*("attention" in lacks)):
        try: read_recipe(f"{method}@{frame}")
        except ValueError: continue
        stages = take_steps(f"{method}@{frame}", trainings)
        assert [*stages] in (["teacher", method], [""])
        took.append(method)
    assert took == ["kd", "dkd", "vrm"]*("logits" not in lacks) + ["rkd"] + ["fitnets" if "attention" in lacks else "basd"]
