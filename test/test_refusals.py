"""Every refused flag exists in the supported SGLang, and its harmless value is SGLang's default."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_mosaic.adapter import refusals  # noqa: E402
from sglang_mosaic.config import MosaicConfig  # noqa: E402

DEFAULTS = {name: getattr(ServerArgs(model_path="dummy"), name) for name in ServerArgs.__annotations__}


def arguments(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, "attention_backend": "mosaic", **changes})


@pytest.mark.parametrize(("name", "fine"), [(name, fine) for name, fine, _, _ in refusals._FLAGS])
def test_the_harmless_value_is_the_default(name, fine):
    assert DEFAULTS[name] == fine


def test_default_arguments_are_served():
    refusals.refuse_flags(arguments())


@pytest.mark.parametrize("name", [name for name, _, _, _ in refusals._FLAGS])
def test_a_refused_flag_is_named(name):
    flag = next(flag for attribute, _, flag, _ in refusals._FLAGS if attribute == name)
    with pytest.raises(SystemExit, match=rf"cannot serve {flag} .*; drop {flag}"):
        refusals.refuse_flags(arguments(**{name: "something else"}))


def test_other_page_sizes_are_refused():
    with pytest.raises(SystemExit, match="use --page-size 64"):
        refusals.refuse_flags(arguments(page_size=16))


def test_a_foreign_radix_cache_is_refused():
    with pytest.raises(SystemExit, match="use --radix-cache-backend mosaic"):
        refusals.refuse_flags(arguments(radix_cache_backend="flexkv"))


def test_environment_that_changes_the_pool_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(SystemExit, match="unset SGLANG_USE_HND_KVCACHE"):
        refusals.refuse_flags(arguments())


@pytest.mark.parametrize(
    ("changes", "flag"),
    [({"disable_radix_cache": True}, "--disable-radix-cache"), ({"tp_size": 2}, "--tensor-parallel")],
)
def test_a_host_tier_that_cannot_work_is_refused(changes, flag):
    refusals.refuse_host_tier(arguments(**changes), MosaicConfig())
    with pytest.raises(SystemExit, match=f"--mosaic-host-gb with {flag}"):
        refusals.refuse_host_tier(arguments(**changes), MosaicConfig(host_gb=1))


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    refusals.refuse_host_tier(arguments(), MosaicConfig(host_gb=1, disk=str(tmp_path / "new")))
    tmp_path.chmod(0o777)
    with pytest.raises(SystemExit, match="--mosaic-disk"):
        refusals.refuse_host_tier(arguments(), MosaicConfig(host_gb=1, disk=str(tmp_path)))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ({"sliding_window_size": 512}, "sliding window of 512"),
        ({"logit_cap": 30.0}, "caps its logits at 30"),
        ({"is_cross_attention": True}, "not causal self-attention"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, "not causal self-attention"),
    ],
)
def test_unsupported_layers_are_named(layer, why):
    plain = {
        "layer_id": 3, "sliding_window_size": -1, "logit_cap": 0.0, "is_cross_attention": False,
        "attn_type": SimpleNamespace(value="decoder"),
    }  # fmt: skip
    assert refusals.unsupported_layer(SimpleNamespace(**plain)) is None
    assert why in refusals.unsupported_layer(SimpleNamespace(**{**plain, **layer}))
