"""Teachers of two hubs, from folders that stand in for them: `hub:REPOSITORY:ENTRY` of torch.hub, whose code is run only where it
is trusted, and `hf:PLACE` of transformers (where it is installed). A student of one's own learns from each, stopped and resumed."""
import importlib.util
import json
import sys

import pytest
import timm
import torch
from PIL import Image
from basd.cli import main
from basd.core import registry
from basd.core.registry import trusting
from basd.data.sources import ImageDataset, open_source
from basd.models.students import create_student, load_student
from basd.models.teachers import create_teacher
from forks import state_of
from test_doors import MODULE, here as with_models     # noqa: F401 (a fixture)

HUBCONF = '''
dependencies = ["torch", "timm"]
import timm

def tiny(pretrained=True, depth=2):
    return timm.create_model("vit_small_patch14_dinov2", img_size=16, patch_size=4, depth=depth, embed_dim=24, num_heads=2, num_classes=10)

def words(pretrained=True): return "no module"
'''
REGISTERED = '''
from timm.models import build_model_with_cfg, register_model

@register_model
def own_net(pretrained=False, **kwargs):
    return build_model_with_cfg(cnn, "own_net", pretrained, kwargs_filter=("in_chans",), **kwargs)
'''
TRAIN = ["data.source=digits", "data.train_size=96", "data.val_size=48", "data.batch_size=24", "data.workers=0", "views.flip=0",
         "student.model=own_net_of_hubs:own_net", "student.img_size=8", "student.patch_size=null", "student.drop_path=0", "teacher.img_size=16", "teacher.untrained=true", "teacher.pretrained=false",
         "train.epochs=2", "train.warmup_epochs=0", "method.name=match", "method.losses={cka: {}}", "method.student_layers=[0, 2]"]
GRAY = ["teacher.mean=[0, 0, 0]", "teacher.std=[1, 1, 1]"]


@pytest.fixture
def here(with_models):
    (with_models/"hub").mkdir()
    (with_models/"hub"/"hubconf.py").write_text(HUBCONF)
    (with_models/"own_net_of_hubs.py").write_text(MODULE + REGISTERED)
    importlib.invalidate_caches()
    yield with_models
    sys.modules.pop("own_net_of_hubs", None)


def timm_is_right(folder, images, top1):
    "The model that timm opens has, by timm's transform, the accuracy of the run to the last digit; it is returned"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pairs = [images[i] for i in range(len(images))]
    x = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image, _ in pairs])
    with torch.no_grad(): right = (model(x).argmax(1) == torch.tensor([int(label) for _, label in pairs])).float().mean().item()
    assert round(100*right, 4) == round(top1, 4)
    return model


def forget(monkeypatch):
    monkeypatch.setattr(registry, "_admitted", set())
    sys.modules.pop("own_net_of_hubs", None)


def story(words, run, capsys, monkeypatch):
    "Train whole; train to the first epoch's end and resume: equal. Another process evaluates and exports it, with trust alone; timm opens it"
    assert main(["train", "basd_cifar10", *TRAIN, *words, "--run-dir", f"{run}/whole"]) == 0
    with monkeypatch.context() as m:                                    # killed after the first epoch's checkpoint
        from basd.training.trainer import Trainer
        after = Trainer.run_epoch
        def dies(self, *a, **k):
            if self.step: raise KeyboardInterrupt
            return after(self, *a, **k)
        m.setattr(Trainer, "run_epoch", dies)
        try: main(["train", "basd_cifar10", *TRAIN, *words, "--run-dir", f"{run}/again"])
        except KeyboardInterrupt: pass
    assert not (run/"again"/"result.json").is_file()
    assert main(["train", "basd_cifar10", *TRAIN, *words, "--run-dir", f"{run}/again", "--resume"]) == 0
    assert state_of(run/"again") == state_of(run/"whole")
    forget(monkeypatch)
    capsys.readouterr()
    assert main(["evaluate", f"{run}/whole", "--quick"]) == 2 and "would import code" in capsys.readouterr().err
    assert main(["evaluate", f"{run}/whole", "--quick", "--trust"]) == 0
    with trusting(["own_net_of_hubs:own_net"]): student = load_student(run/"whole", layers=[]).eval()
    onnx = ["--onnx"] if all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")) else []
    assert main(["export", f"{run}/whole", "--to", f"{run}/out", "--trust", *onnx]) == 0
    output = capsys.readouterr().out
    assert "not for timm" not in output and ("ONNX opset" in output) == bool(onnx)
    forget(monkeypatch)
    importlib.import_module("own_net_of_hubs")            # as a process that opens the folder does
    result, x = json.loads((run/"whole"/"result.json").read_text()), torch.rand(2, 3, 8, 8)
    opened = timm_is_right(run/"out", ImageDataset(open_source("digits", "test")), result["test"][result["exported"]]["top1"])
    with torch.no_grad(): assert (opened(x) == student.model(x)).all()


def test_a_teacher_of_torch_hub(here, capsys, monkeypatch):
    story([f"teacher.model=hub:{here}/hub:tiny", "method.teacher_layers=[0, 1]", *GRAY], here/"runs", capsys, monkeypatch)


def test_code_of_a_hub_is_run_only_where_it_is_trusted(here):
    name = f"hub:{here}/hub:tiny"
    with pytest.raises(ValueError, match="would import code"): create_teacher(name, untrained=True)
    with trusting():
        deep = create_teacher(name, untrained=True, depth=3)
        assert len(deep.names) == 3 and deep.origin == "untrained" and deep.architecture == name
        for wrong, words in ((f"hub:{here}/hub:words", "should return an nn.Module"), (f"hub:{here}/hub:none", "cannot be opened"),
                             ("hub:tiny", "should be written hub:owner/repository:entry")):
            with pytest.raises(ValueError, match=words): create_teacher(wrong, untrained=True)
        with pytest.raises(ValueError, match="cannot be opened: TypeError"): create_teacher(name, untrained=True, width=3)


def test_a_student_is_not_of_a_hub():
    for name in ("hf:facebook/dinov2-small", "hub:facebookresearch/dinov2:dinov2_vits14"):
        with pytest.raises(ValueError, match="a student cannot be h"): create_student(name, 10)


def dinov2(folder, processor=True, kind="Dinov2Model", **more):
    "A small DINOv2 of transformers with random weights in a local folder"
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7, **more)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder)
    if processor: (folder/"preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2], "size": 28}')
    return model


def test_a_teacher_of_transformers(tmp_path):
    "Weights, size and statistics are those of the folder; tokens are the model's hidden states without the class token"
    model = dinov2(tmp_path)
    t = create_teacher(f"hf:{tmp_path}", pretrained=True)
    assert t.input_size == (3, 28, 28) and t.mean.flatten().tolist() == pytest.approx([.4, .5, .6]) and str(tmp_path) in t.origin
    x = torch.rand(2, 3, 28, 28)
    f = t(x)
    with torch.no_grad(): true = model(t.normalize(x), output_hidden_states=True).hidden_states
    for tokens, h in zip(f.tokens, true[1:], strict=True): torch.testing.assert_close(tokens, h[:, 1:])
    assert f.logits is None and f.grid_sizes[0] == (4, 4) and f.attention[0].num_heads == 2
    assert create_teacher(f"hf:{tmp_path}", pretrained=True, img_size=56)(torch.rand(1, 3, 56, 56)).grid_sizes[0] == (8, 8)
    assert len(create_teacher(f"hf:{tmp_path}", untrained=True, num_hidden_layers=2).names) == 2


def test_a_classifier_of_transformers(tmp_path):
    dinov2(tmp_path, kind="Dinov2ForImageClassification", num_labels=5)
    t = create_teacher(f"hf:{tmp_path}", pretrained=True)
    assert t(torch.rand(2, 3, 28, 28)).logits.shape == (2, 5)
    assert create_teacher(f"hf:{tmp_path}", pretrained=True, num_classes=0)(torch.rand(2, 3, 28, 28)).logits is None
    with pytest.raises(ValueError, match="it has 5 classes; leave num_classes out"): create_teacher(f"hf:{tmp_path}", pretrained=True, num_classes=3)


SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=28, patch_size=7)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViTMAE"])
def test_families_of_transformers(kind, tmp_path):
    "Tokens of the first block and its attention are those of transformers' eager model, at the folder's image size and at another"
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    t = create_teacher(f"hf:{tmp_path}", pretrained=True, img_size=42, mean=(0, 0, 0), std=(1, 1, 1))
    plain = transformers.AutoModel.from_pretrained(tmp_path, config=t.model.config, attn_implementation="eager").eval()
    for size in (28, 42):
        x, n = torch.rand(2, 3, size, size), (size//7)**2
        f, more = t(x), dict(interpolate_pos_encoding=True) if t.model.interpolates else {}
        if kind == "ViTMAE": more["noise"] = torch.arange(n).float().expand(2, n)
        with torch.no_grad(): out = plain(x, output_hidden_states=True, output_attentions=True, **more)
        assert f.grid_sizes[0] == (size//7, size//7)
        torch.testing.assert_close(f.tokens[0], out.hidden_states[1][:, -n:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(f.attention[0].probs(), out.attentions[0][:, :, -n:, -n:]/out.attentions[0][:, :, -n:, -n:].sum(-1, keepdim=True),
                                   rtol=1e-4, atol=1e-5)


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    dinov2(tmp_path)
    weights = load_file(tmp_path/"model.safetensors")
    gone = next(k for k in weights if "query.weight" in k)
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path/"model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(ValueError, match="1 weights are missing such as "): create_teacher(f"hf:{tmp_path}", pretrained=True)


def test_what_transformers_refuses_is_a_sentence(tmp_path):
    dinov2(tmp_path, processor=False)
    with pytest.raises(ValueError, match="give img_size|give mean and std"): create_teacher(f"hf:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match="has no widht"): create_teacher(f"hf:{tmp_path}", pretrained=True, widht=3)
    with pytest.raises(ValueError, match="read only where pretrained=true"): create_teacher("hf:facebook/dinov2-small", untrained=True)
    (tmp_path/"config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}')
    (tmp_path/"evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('mark').touch()")
    with pytest.raises(ValueError, match="cannot be opened"): create_teacher(f"hf:{tmp_path}", pretrained=True)
    assert not (tmp_path/"mark").exists()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the package transformers; pip install transformers"): create_teacher("hf:a/b", pretrained=True)


def test_a_student_of_ones_own_learns_from_it(here, capsys, monkeypatch):
    dinov2(here/"dino")
    words = [f"teacher.model=hf:{here}/dino", "teacher.pretrained=true", "teacher.untrained=false", "teacher.img_size=28",
             "method.teacher_layers=[0, 2]"]
    story(words, here/"runs", capsys, monkeypatch)
