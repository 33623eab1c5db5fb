"""Models outside PyTorch: torch.export, ONNX with its runtime, a compiled package; each at batches it has not seen."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import models
from models.layers import ContMix, Involution2d, OutlookAttention
from tests.models.families import FAMILY, SHALLOW, by_family, narrow
from tests.support import assert_close, golden_fill, random_tensor


def exported_form(family: str) -> Any:
    """What to export: the inference form, on the CPU."""
    return models.optimize_for_inference(narrow(family, **SHALLOW["overlock"] if family == "overlock" else {}))


def image(batch: int) -> Tensor:
    return random_tensor(batch, 3, 64, 96, seed=batch, device="cpu")


@by_family
@torch.no_grad()
def test_torch_export(family):
    """The graph holds this package's operators themselves, not what they are made of."""
    model = exported_form(family)
    program = torch.export.export(model, (image(2),), dynamic_shapes=({0: Dim("batch")},))
    operators = {str(node.target) for node in program.graph.nodes if "dynamic_kernels" in str(node.target)}
    assert operators == {f"dynamic_kernels.{FAMILY[family].operator}.default"}
    for batch in (2, 3):
        assert_close(program.module()(image(batch)), model(image(batch)), 1e-6)


@pytest.mark.slow
@by_family
@torch.no_grad()
def test_onnx_export(family, tmp_path):
    """No custom operator in the file, and onnxruntime, which knows none, computes the same.

    RedNet is exported as it is trained, with several maps, the others in their inference form.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    several = family == "rednet"
    model = narrow(family, features_only=True, out_indices=(0, 1)) if several else exported_form(family)
    program = torch.onnx.export(model, (image(2),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False)
    assert program is not None
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib.common"}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    for batch in (2, 3):
        found = map(torch.from_numpy, session.run(None, {argument.name: image(batch).numpy()}))
        assert_close([*found], model(image(batch)) if several else [model(image(batch))], 1e-5)


class OneOfEach(nn.Module):
    """Every dynamic layer; a package of a whole family takes the compiler half a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.involution = Involution2d(32, kernel_size=3, stride=2)
        self.contmix = ContMix(32, context_channels=32, kernel_size=7, num_heads=2)
        self.outlook = OutlookAttention(32, num_heads=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        mixed = self.contmix(x, torch.cat((x, x.roll(1, 0)), 1))
        return [self.involution(x), mixed, self.outlook(x.permute(0, 2, 3, 1))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@torch.no_grad()
def test_aot_inductor_package(tmp_path):
    def maps(batch: int) -> Tensor:
        return random_tensor(batch, 32, 12, 14, seed=batch, device="cpu")

    model = golden_fill().fill_(OneOfEach()).eval()
    program = torch.export.export(model, (maps(2),), dynamic_shapes=({0: Dim("batch")},))
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    package = torch._inductor.aoti_load_package(path)
    for batch in (2, 3):
        assert_close(package(maps(batch)), model(maps(batch)), 1e-5)
