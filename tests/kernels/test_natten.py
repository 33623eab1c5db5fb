"""The NATTEN stand-in: signatures in the order existing models rely on, and clear refusals."""

import inspect

import pytest
import torch

import kernels
from kernels import natten
from kernels.natten import functional
from tests.support import random_tensor


def test_parameters_stand_in_nattens_order():
    assert list(inspect.signature(functional.na2d_qk).parameters) == [
        "query", "key", "kernel_size", "dilation", "additional_keys", "is_causal", "rpb",
    ]  # fmt: skip
    assert list(inspect.signature(functional.na2d_av).parameters) == [
        "attn", "value", "kernel_size", "dilation", "additional_values", "is_causal",
    ]  # fmt: skip


def test_a_neighbourhood_attention_block_runs():
    query, key, value = (random_tensor(1, 2, 8, 9, 4) for _ in range(3))
    rpb = random_tensor(2, 5, 9)
    attn = functional.na2d_qk(query, key, (3, 5), 1, is_causal=False, rpb=rpb).softmax(-1)
    out = functional.na2d_av(attn, value, (3, 5), 1)
    expected = kernels.reference.na2d_qk(query, key, (3, 5), 1, rpb).softmax(-1)
    torch.testing.assert_close(out, kernels.reference.na2d_av(expected, value, (3, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"is_causal": True}, "is_causal"), ({"is_causal": (False, True)}, "is_causal"),
     ({"additional_values": torch.zeros(1, 2, 3, 4)}, "additional_values")],
)  # fmt: skip
def test_what_is_not_supported_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        functional.na2d_av(torch.zeros(1, 2, 5, 5, 9), torch.zeros(1, 2, 5, 5, 4), 3, **options)


def test_older_names():
    query, key, value = (random_tensor(1, 2, 8, 9, 4) for _ in range(3))
    rpb = random_tensor(2, 5, 5)
    plain, biased = kernels.na2d_qk(query, key, 3, 2), kernels.na2d_qk(query, key, 3, 2, rpb)
    assert torch.equal(functional.natten2dqk(query, key, 3, 2), plain)
    assert torch.equal(functional.natten2dqkrpb(query, key, rpb, 3, 2), biased)
    assert torch.equal(functional.na2d_qk_with_bias(query, key, rpb, 3, 2), biased)
    assert torch.equal(functional.na2d_qk_with_bias(query, key, None, 3, 2), plain)
    attn = plain.softmax(-1)
    assert torch.equal(functional.natten2dav(attn, value, 3, 2), kernels.na2d_av(attn, value, 3, 2))
    assert functional.na2d_av(attn.double(), value, 3, 2).dtype == value.dtype  # NATTEN casts attn to value's dtype


def test_fused_attention_takes_heads_last():
    query, key, value = (random_tensor(1, 6, 7, 2, 4) for _ in range(3))
    rpb = random_tensor(2, 5, 5)
    first = [tensor.permute(0, 3, 1, 2, 4) for tensor in (query, key, value)]
    attn = kernels.reference.na2d_qk(first[0] / 2, first[1], 3, rpb=rpb).softmax(-1)
    expected = kernels.reference.na2d_av(attn, first[2], 3).permute(0, 2, 3, 1, 4)
    torch.testing.assert_close(functional.na2d(query, key, value, 3, rpb=rpb), expected)


def test_heads_last_tensors_are_refused_by_name():
    query, rpb = torch.zeros(1, 8, 9, 4, 16), torch.zeros(4, 9, 9)
    for refused in (
        lambda: functional.na2d_qk(query, query, 5),
        lambda: functional.natten2dqkrpb(query, query, torch.zeros(4, 5, 5), 3, 1),  # four heads, says the bias
        lambda: functional.na2d_qk_with_bias(query, query, rpb, 5, 1),
        lambda: functional.natten2dav(torch.zeros(1, 8, 9, 4, 25), query, 5, 1),
    ):
        with pytest.raises(ValueError, match=r"(query|value) must be heads first"):
            refused()


def test_names_of_other_ranks_say_what_exists():
    for name in ("na1d_qk", "natten3dav", "na3d"):
        with pytest.raises(ImportError, match=f"{name} does not exist here: .* na2d_qk"):
            getattr(functional, name)
    with pytest.raises(ImportError, match="na2d_av"):
        from kernels.natten import NeighborhoodAttention3D  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(natten, "something else")


@pytest.mark.parametrize("module", [natten, functional, natten.context])
def test_what_nattens_users_ask_and_switch(module):
    assert module.has_half()
    assert not module.has_fused_na()  # a model that asks takes the unfused operators
    assert not module.is_fna_enabled()
    module.use_fused_na(False)
    module.use_autotuner(True, thorough_mode_forward=True)
    assert module.has_cuda() == torch.cuda.is_available()


@pytest.mark.parametrize("biased", [False, True])
def test_the_module(biased):
    module = natten.NeighborhoodAttention2D(8, 2, kernel_size=(3, 5), dilation=(2, 1), rel_pos_bias=biased)
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} | ({"rpb"} if biased else set())
    assert set(module.state_dict()) == names
    x = random_tensor(2, 7, 6, 8, device="cpu")
    query, key, value = module.qkv(x).view(2, 7, 6, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
    logits = kernels.reference.na2d_qk(query * 0.5, key, (3, 5), (2, 1), module.rpb)
    mixed = kernels.reference.na2d_av(logits.softmax(-1), value, (3, 5), (2, 1))
    torch.testing.assert_close(module(x), module.proj(mixed.permute(0, 2, 3, 1, 4).reshape(2, 7, 6, 8)))
    with pytest.raises(ValueError, match="is_causal"):
        natten.NeighborhoodAttention2D(8, 2, 3, is_causal=True)
