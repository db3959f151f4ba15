"""What differs between the supported SGLang versions, asked of the installed one."""

from __future__ import annotations

import logging
from array import array
from types import SimpleNamespace

import pytest
import torch

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from sglang_mosaic.adapter import arguments, compat, versions  # noqa: E402
from sglang_mosaic.adapter.compat import Tenant  # noqa: E402
from sglang_mosaic.adapter.cpu_platform import is_active  # noqa: E402
from sglang_mosaic.adapter.radix_cache import MosaicRadixCache  # noqa: E402
from sglang_mosaic.adapter.tenants import before_request  # noqa: E402


@pytest.fixture(scope="module")
def resolved_args() -> ServerArgs:
    load_plugins()
    return compat.parse(["--model-path", "dummy", "--attention-backend", "mosaic"])


def test_the_installed_version_is_a_supported_one():
    assert versions.sglang_version() in versions.SUPPORTED


def test_resolving_fills_in_what_the_backend_needs(resolved_args):
    seen = compat.resolved(resolved_args)
    assert (seen.page_size, seen.radix_cache_backend, seen.disable_cuda_graph) == (64, "mosaic", True)
    assert arguments.selects_mosaic(resolved_args) and arguments.selects_mosaic(seen)
    assert compat.attention_replicas(seen) == 1


def test_resolving_again_changes_nothing_and_refuses_nothing(resolved_args):
    before = compat.resolved(resolved_args).page_size
    if compat.is_resolved(resolved_args):
        resolved_args.resolve_once()
    assert compat.resolved(resolved_args).page_size == before


def test_only_the_first_version_is_served_on_other_devices_than_a_plain_cpu(monkeypatch):
    load_plugins()
    assert compat.unsupported_device(is_active()) is None
    for later, refused in ((False, False), (True, True)):
        monkeypatch.setattr(compat, "_IS_LATER", later)
        assert (compat.unsupported_device(plain_cpu=False) is not None) == refused


def test_a_request_tells_its_place_and_its_tenant():
    salts = {"cache_salt": "salt"} if versions.sglang_version() == "0.5.23" else {}
    request = Req("r", "", array("q", range(9)), SamplingParams(), extra_key="tenant", vocab_size=10, **salts)
    assert compat.pool_index(request) is None
    assert compat.matched_tokens(request) == 0
    tenant = Tenant.of(request)
    assert tenant == Tenant("tenant", salts.get("cache_salt")) and tenant.is_named
    assert Tenant.of(tenant.key(array("q", range(64)))) == tenant


def test_pages_of_tenants_have_keys_of_their_own_on_the_host():
    tree = MosaicRadixCache.__new__(MosaicRadixCache)
    tree.root_node, tree._root_key = object(), b"root"
    names = (None, "a", "b")
    tenants = [Tenant(extra_key, salt) for extra_key in names for salt in names]
    keys = {tree._keys_below(tree.root_node, array("q", range(64)), tenant)[0] for tenant in tenants}
    assert len(keys) == len(tenants)


def test_slots_of_a_match_are_those_inserted():
    tree = RadixCache.create_simulated(page_size=64)
    tokens, slots = array("q", range(192)), torch.arange(640, 832)
    tree.insert(InsertParams(key=RadixKey(tokens[:128]), value=slots[:128]))
    tree.insert(InsertParams(key=RadixKey(tokens), value=slots))
    match = tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
    assert compat.matched_slots(tree, match).tolist() == slots.tolist()
    nothing = tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", range(500, 564)))))
    assert compat.matched_slots(tree, nothing).tolist() == []


def test_a_salt_is_a_name_so_isolation_leaves_it_alone(monkeypatch):
    monkeypatch.setattr(compat, "_IS_LATER", True)
    server_args = SimpleNamespace(attention_backend="mosaic")
    monkeypatch.setattr(compat, "resolved", lambda args: args)
    scheduler = SimpleNamespace(server_args=server_args, mosaic_isolate=True)
    salted = SimpleNamespace(extra_key=None, cache_salt="tenant")
    nameless = SimpleNamespace(extra_key=None, cache_salt=None)
    for request in (salted, nameless):
        before_request(scheduler, request)
    assert salted.extra_key is None
    assert nameless.extra_key.startswith("alone ")


def test_the_tree_in_use_is_named_where_it_is_not_sglangs_own(monkeypatch, caplog):
    for later, said in ((False, 0), (True, 1)):
        caplog.clear()
        monkeypatch.setattr(compat, "_IS_LATER", later)
        with caplog.at_level(logging.INFO, logger=compat.logger.name):
            compat.log_tree()
        assert len(caplog.records) == said
