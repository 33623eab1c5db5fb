"""VOLO beyond the rules for every family: its MLP, position embedding, padding, token labelling."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from models.checkpoints import load_checkpoint, save_checkpoint
from models.layers.pointwise import activated
from models.layers.tokens import Mlp, mix_box, random_box, resize_position_embedding
from models.volo import VOLO
from tests.models.families import images, narrow
from tests.support import DEVICE, FORWARD_TOLERANCE, assert_close, golden_fill, random_tensor


def small(**options: Any) -> Any:
    """Two Outlookers, then one block per stage."""
    return narrow("volo", **{"layers": (2, 1, 1, 1), "mix_token": True, **options}).to(DEVICE)


def test_mlp_whose_product_takes_gelu_in(monkeypatch):
    """On a GPU by tanh, whose error is less than that of rounding; elsewhere PyTorch's product has GELU itself."""
    x = random_tensor(2, 3, 16, dtype=torch.float64)
    layer = golden_fill().fill_(Mlp(16, 48)).double().to(DEVICE).requires_grad_(False)
    expected = layer.fc2(F.gelu(layer.fc1(x)))
    layer.folded()
    assert torch.equal(layer(x), expected)
    monkeypatch.setattr("models.layers.tokens.activated", product := mock.Mock(side_effect=activated))
    monkeypatch.setattr("models.layers.tokens.in_16_bits_on_gpu", lambda _: True)
    assert_close(layer(x), expected, 1e-14 if DEVICE == "cpu" else 1e-3)
    x.requires_grad_()
    assert_close(layer(x), expected, 1e-14)  # with gradients, which that product has not
    assert layer(x).requires_grad
    x.requires_grad_(False)
    layer.fc1.weight.requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), layer.fc1.weight)[0].abs().sum() > 0
    layer.requires_grad_(False)
    assert [call.kwargs for call in product.mock_calls] == [{"gelu": True}] * 4
    layer.fc1.register_forward_hook(lambda *_: None)
    assert_close(layer(x), expected, 1e-14)
    assert product.call_count == 4
    normal = random_tensor(100_000, dtype=torch.float64, seed=0)
    others = F.gelu(normal, approximate="tanh"), F.gelu(normal).bfloat16()
    errors = [(other - F.gelu(normal)).norm() for other in others]
    assert 8 * errors[0] < errors[1]


# ---- image sizes and the position embedding


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (72, 40), (65, 129)])
@torch.no_grad()
def test_any_size_is_padded_to_whole_patches(height, width):
    model, x = small().double(), images(3, 3, height, width).double()
    rows, columns = -(-height // 8), -(-width // 8)
    padded = F.pad(x, (0, 8 * columns - width, 0, 8 * rows - height))
    features = model.forward_features(x)
    assert features.shape == (3, 1 + (rows // 2) * (columns // 2), 24)
    assert_close(model.forward_head(features), model(padded), FORWARD_TOLERANCE[torch.float64])
    # The stem's convolutions reach at most 5 pixels beyond a patch: the corner of the image must still matter.
    x[..., -1, -1] += 10
    assert (model(x) - model.forward_head(features)).abs().min() > 1e-6


@torch.no_grad()
def test_position_embedding_has_its_own_grid_and_is_resized_for_others(tmp_path):
    wide = small(img_size=(64, 95))
    assert wide.pos_embed.shape == (1, 4, 6, 24)
    square = small(img_size=64)
    assert square.pos_embed.shape == (1, 4, 4, 24)
    resized = resize_position_embedding(square.pos_embed, (4, 6))
    square_parameters = square.state_dict()
    wide.load_state_dict(square_parameters | {"pos_embed": resized})
    x = images(3, 3, 64, 95)
    assert torch.equal(wide(x), square(x))
    save_checkpoint(square, tmp_path / "square.pth")
    load_checkpoint(other := small(img_size=(64, 95)), tmp_path / "square.pth")  # the loader does so, too
    assert_close(other(x), square(x), FORWARD_TOLERANCE[torch.float32])
    square.set_input_size((64, 95))
    assert torch.equal(square.pos_embed, resized)
    for wrong, message in (((16,), r"^img_size must be >= 32"), ((96, 16), r"^patch_size must be 8")):
        with pytest.raises(ValueError, match=message):
            square.set_input_size(*wrong)
    square = small(img_size=64)
    # Three times as many rows and five times as many columns: every old pixel centre is a new one.
    enlarged = resize_position_embedding(square.pos_embed, (12, 20))
    assert_close(enlarged[:, 1::3, 2::5], square.pos_embed, FORWARD_TOLERANCE[torch.float32])


# ---- training


def test_boxes_are_drawn_from_the_generator_of_torch():
    model, found = small().train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(images(3, 3, 64, 96)))
    assert all(torch.equal(*pair) for pair in zip(*found[:2], strict=True))
    assert found[0][2].dtype == torch.int64
    assert not torch.equal(found[2][2], found[0][2])


@torch.no_grad()
def test_training_outputs_without_mixing_add_up_to_the_logits_of_evaluation():
    model, x = small(mix_token=False), images(3, 3, 40, 72)
    logits = model(x)
    model.train()
    model.patch_embed.eval()  # running statistics in both
    class_logits, token_logits, box = model(x)
    assert torch.equal(class_logits + 0.5 * token_logits.max(1).values, logits)
    assert box.tolist() == [0, 0, 0, 0]
    plain = small(return_dense=False).train()
    plain.patch_embed.eval()
    assert torch.equal(plain(x), logits)


def test_tokens_and_their_logits_are_mixed_with_the_opposite_image(monkeypatch):
    model = small().train()
    top, left, bottom, right = box = (1, 2, 3, 5)
    monkeypatch.setattr("models.volo.random_box", lambda height, width, device: torch.tensor(box, device=device))
    seen = {}
    model.patch_embed.register_forward_hook(lambda *call: seen.update(embedded=call[2]))
    model.get_submodule("network.0.0").register_forward_hook(lambda *call: seen.update(mixed=call[1][0]))
    model.aux_head.register_forward_hook(lambda *call: seen.update(token_logits=call[2]))
    _, token_logits, returned = model(images(3, 3, 64, 96))
    assert returned.tolist() == list(box)

    expected = seen["embedded"].clone()
    area = (slice(None), slice(2 * top, 2 * bottom), slice(2 * left, 2 * right))
    expected[area] = seen["embedded"].flip(0)[area]
    assert torch.equal(seen["mixed"], expected)
    assert not torch.equal(seen["mixed"], seen["embedded"])

    raw = seen["token_logits"].view(3, 4, 6, 5)
    expected, area = raw.clone(), (slice(None), slice(top, bottom), slice(left, right))
    expected[area] = raw.flip(0)[area]
    assert torch.equal(token_logits.view(3, 4, 6, 5), expected)


def test_random_boxes_follow_beta_1_1():
    boxes = torch.stack([random_box(1000, 500) for _ in range(3000)]).double()
    top, left, bottom, right = boxes.unbind(1)
    assert ((top >= 0) & (top <= bottom) & (bottom <= 1000)).all()
    assert ((left >= 0) & (left <= right) & (right <= 500)).all()
    # A share a, uniform, has sides √a; clipping at a uniform centre leaves √a − a/4 of each on average, so that
    # E[area] = ∫ (√a − a/4)² da = 1/2 − 1/5 + 1/48.
    area = (bottom - top) * (right - left) / (1000 * 500)
    assert area.mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.02)
    uncut = (top > 0) & (bottom < 1000) & (left > 0) & (right < 500)
    assert ((bottom - top) / (right - left))[uncut & (area > 0.1)].mean().item() == pytest.approx(2, abs=0.05)
    small_boxes = torch.stack([random_box(14, 3) for _ in range(300)])
    assert (small_boxes[:, 2:] <= torch.tensor([14, 3])).all()
    x = random_tensor(4, 14, 3, 2)
    assert all(torch.equal(mix_box(mix_box(x, box), box), x) for box in small_boxes[:20].to(DEVICE))


def test_initial_weights_are_truncated_normal():
    model = VOLO((1, 1, 1, 1), (96, 192), (3, 6))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.bias is None or not module.bias.any()
