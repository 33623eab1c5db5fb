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


def test_a_neighbourhood_attention_block_runs_under_both_sets_of_names():
    query, key, value = (random_tensor(1, 2, 8, 9, 4) for _ in range(3))
    rpb = random_tensor(2, 5, 9)
    attn = functional.na2d_qk(query, key, (3, 5), 1, is_causal=False, rpb=rpb).softmax(-1)
    out = functional.na2d_av(attn.double(), value, (3, 5), 1)  # NATTEN casts attn to value's dtype
    expected = kernels.reference.na2d_qk(query, key, (3, 5), 1, rpb).softmax(-1)
    torch.testing.assert_close(out, kernels.reference.na2d_av(expected, value, (3, 5)))
    for older in (functional.natten2dqkrpb, functional.na2d_qk_with_bias):
        assert torch.equal(older(query, key, rpb, (3, 5), 1).softmax(-1), attn)
    assert (functional.natten2dqk, functional.natten2dav) == (functional.na2d_qk, functional.na2d_av)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"is_causal": True}, "is_causal"), ({"is_causal": (False, True)}, "is_causal"),
     ({"additional_values": torch.zeros(1, 2, 3, 4)}, "additional_values"), ({"value": 3}, "value must be a torch")],
)  # fmt: skip
def test_what_is_not_supported_is_refused(options, message):
    given = {"attn": torch.zeros(1, 2, 5, 5, 9), "value": torch.zeros(1, 2, 5, 5, 4), "kernel_size": 3}
    with pytest.raises((TypeError, ValueError), match=message):
        functional.na2d_av(**given | options)


@pytest.mark.parametrize("module", [natten, functional])
def test_what_nattens_users_ask_and_switch(module):
    assert module.has_half()
    assert not module.has_fused_na()  # a model that asks takes the unfused operators
    assert not module.is_fna_enabled()
    module.use_fused_na(False)
    module.use_autotuner(True, thorough_mode_forward=True)
    assert module.has_cuda() == torch.cuda.is_available()


def test_heads_last_tensors_are_refused_by_name():
    query = torch.zeros(1, 8, 9, 4, 16)
    for refused in (
        lambda: functional.na2d_qk(query, query, 5),
        lambda: functional.natten2dqkrpb(query, query, torch.zeros(4, 5, 5), 3, 1),  # four heads, says the bias
        lambda: functional.natten2dav(torch.zeros(1, 8, 9, 4, 25), query, 5, 1),
    ):
        with pytest.raises(ValueError, match=r"(query|value) must be heads first"):
            refused()


def test_names_of_other_ranks_say_what_exists():
    for name in ("na1d_qk", "natten3dav"):
        with pytest.raises(ImportError, match=f"{name} does not exist here: .* na2d_qk"):
            getattr(functional, name)
    with pytest.raises(ImportError, match="na2d_av"):
        from kernels.natten import NeighborhoodAttention3D  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(natten, "something else")


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
