"""timm's registry and scripts, in processes of their own: timm is imported before this package, or by it.

timm needs torchvision merely to be imported. Where that is not installed, empty classes stand in for what timm imports
from it; everything of timm that these tests call is timm's own.
"""

import importlib.util

import pytest

from tests.support import in_a_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")

STAND_IN = """
import importlib.machinery, sys, types

class StandIn(types.ModuleType):
    __path__ = []
    __spec__ = importlib.machinery.ModuleSpec("torchvision", None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in sys.modules:
            return sys.modules[f"{self.__name__}.{name}"]
        return type(name, (), {"BILINEAR": 2, "BICUBIC": 3, "NEAREST": 0, "BOX": 4, "HAMMING": 5, "LANCZOS": 1})

for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"):
    sys.modules["torchvision" + name] = StandIn("torchvision" + name)
"""

TORCHVISION = STAND_IN if importlib.util.find_spec("torchvision") is None else ""

USE = """
import importlib.util
import torch
from timm.data import resolve_model_data_config

NEW = hasattr(timm.models, "resolve_model_input_args")  # after 1.0.29

ours = ["overlock_t", "overlock_t_reparam", "rednet50", "volo_d1"]
assert set(ours) <= set(timm.list_models()), timm.list_models("*lock*")
assert timm.list_models("rednet*") == models.list_models("rednet*")
assert "overlock_t" in timm.list_models(pretrained=True) and "rednet50" not in timm.list_models(pretrained=True)
assert "models" == timm.models.model_entrypoint("overlock_t").__module__.partition(".")[0]
assert "timm" == timm.models.model_entrypoint("volo_d1_224").__module__.partition(".")[0]

with torch.device("meta"):
    model = timm.create_model("overlock_t", num_classes=10, drop_path_rate=0.2, drop_rate=0.0, global_pool="avg")
    features = timm.create_model("overlock_t", features_only=True, out_indices=(1, 3))
    arguments = {"model_name": "volo_d1", "in_chans": 1, "num_classes": 7, "img_size": 384}
    if NEW:  # what its scripts make of their arguments
        script = {"img_size": None, "in_chans": 1, "input_size": None}
        arguments = timm.models.resolve_model_input_args("volo_d1", script, num_classes=7, img_size=384)
    volo = timm.create_model(**arguments)
assert type(model) is models.overlock.OverLoCK and model.num_classes == 10
assert model.pretrained_cfg is model.default_cfg and model.default_cfg["architecture"] == "overlock_t"
assert features.feature_info.channels() == [128, 640] and features.feature_info.reduction() == [8, 32]
assert volo.num_classes == 7 and volo.in_chans == 1 and volo.default_cfg["url"].endswith("d1_384_85.2.pth.tar")
config = resolve_model_data_config(model)
assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 0.925, "bicubic"), config

model = timm.create_model("overlock_xt", num_classes=4).train()
optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
loss = timm.loss.LabelSmoothingCrossEntropy()(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 3]))
loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
optimizer.step()

torch.save(model.state_dict(), FOLDER + "/weights.pth")
file = {"file": FOLDER + "/weights.pth"}
merged = timm.create_model("overlock_xt_reparam", pretrained=True, pretrained_cfg_overlay=file, num_classes=4).eval()
x = torch.randn(1, 3, 64, 64)
torch.testing.assert_close(merged(x), model.eval()(x), rtol=0, atol=1e-4)

from timm.utils import reparameterize_model

again = timm.create_model("overlock_xt", num_classes=4, checkpoint_path=FOLDER + "/weights.pth").eval()
fused = reparameterize_model(again)
assert len(list(fused.parameters())) == len(list(merged.parameters())) < len(list(again.parameters()))
torch.testing.assert_close(fused(x), again(x), rtol=0, atol=1e-4)

unpooled = timm.create_model("rednet26", num_classes=0, global_pool="").eval()
assert unpooled(x).shape == (1, 2048, 2, 2)
narrow = {"layers": (1, 1, 1, 1), "img_size": 64}
mean = timm.create_model("volo_d1", num_classes=0, global_pool="avg", **narrow).eval()
torch.testing.assert_close(mean(x), mean.forward_features(x).mean(1))
placed = timm.create_model("volo_d1", device="meta", dtype=torch.bfloat16, output_stride=16, **narrow)
assert {(p.device.type, p.dtype) for p in placed.parameters()} == {("meta", torch.bfloat16)}

if NEW and all(map(importlib.util.find_spec, ("huggingface_hub", "safetensors"))):  # before, not with model_args
    from timm.models._hub import save_for_hf

    source = timm.create_model("volo_d1", num_classes=7, in_chans=1, **narrow).eval()
    save_for_hf(source, FOLDER + "/hub", safe_serialization=True)
    back = timm.create_model("local-dir:" + FOLDER + "/hub", pretrained=True).eval()
    assert torch.equal(back(x[:, :1]), source(x[:, :1]))
    other = timm.create_model("local-dir:" + FOLDER + "/hub", pretrained=True, num_classes=3, in_chans=3)
    assert other.num_classes == 3 and torch.equal(other.network[0][0].attn.v.weight, source.network[0][0].attn.v.weight)

refused = (
    ("drop_rate", {"drop_rate": 0.1}),
    ("a_tag", {"pretrained_cfg": "a_tag"}),
    ("output_stride", {"output_stride": 8}),
    ("global_pool", {"global_pool": ""}),
    ("global_pool", {"global_pool": "max", "num_classes": 0}),
)
for word, arguments in refused:
    try:
        timm.create_model("rednet26", **arguments)
    except ValueError as error:
        assert word in str(error)
    else:
        raise AssertionError(word)
"""


def test_timm_creates_these_models(tmp_path):
    _run(f"""
import sys
finders = list(sys.meta_path)
import models
assert "timm" not in sys.modules and sys.meta_path == finders
{TORCHVISION}
models.register_with_timm()
models.register_with_timm()  # a second time changes nothing
import timm, timm.loss, timm.optim
FOLDER = {str(tmp_path)!r}
{USE}
""")


def test_timm_imported_before_keeps_the_names_it_has():
    _run(f"""
{TORCHVISION}
import timm.models

def rednet50(pretrained=False, **kwargs): ...

timm.models.register_model(rednet50)
import models
assert timm.models.model_entrypoint("rednet50") is rednet50
assert timm.models.model_entrypoint("rednet101").__wrapped__ is models.rednet.rednet101
""")


def test_where_timm_cannot_be_imported_nothing_is_missed():
    _run("""
import sys
sys.modules["torchvision"] = None
import models
try:
    models.register_with_timm()
except ImportError:
    pass
else:
    raise AssertionError("timm came without torchvision")
with __import__("torch").device("meta"):
    models.create_model("overlock_t")
""")


def _run(script: str) -> None:
    result = in_a_process("-c", script)
    assert result.returncode == 0, result.stderr[-3000:]
