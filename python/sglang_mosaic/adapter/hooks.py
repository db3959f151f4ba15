"""Every hook into SGLang, in one table, and the check that each of them took.

SGLang logs a hook that cannot be applied and goes on. A server that lost one hook would serve wrong answers, so the
table is verified wherever the mosaic backend is selected, and a gap ends the process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_mosaic.adapter import arguments, compat, cpu_hooks, host, observe, sizing, tenants
from sglang_mosaic.adapter.cpu_platform import is_active as on_plain_cpu
from sglang_mosaic.adapter.sight import routes
from sglang_mosaic.adapter.versions import SUPPORTED, sglang_version


@dataclasses.dataclass(frozen=True)
class Hook:
    target: str
    function: Callable
    kind: HookType


_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_POOL_SIZES = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_REPORTER = "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"

_EVERYWHERE = (
    Hook(f"{_SERVER_ARGS}.add_cli_args", arguments.after_add_cli_args, HookType.AFTER),
    Hook(f"{_SERVER_ARGS}.from_cli_args", arguments.before_from_cli_args, HookType.BEFORE),
    Hook(f"{_SERVER_ARGS}.{compat.RESOLUTION}", arguments.around_resolution, HookType.AROUND),
    Hook(f"{_CONFIGURATOR}.config_from_budget", sizing.around_config_from_budget, HookType.AROUND),
    Hook(f"{_CONFIGURATOR}.resolve_max_num_reqs", sizing.around_resolve_max_num_reqs, HookType.AROUND),
    Hook(f"{_CONFIGURATOR}._build_token_to_kv_pool", sizing.around_build_pool, HookType.AROUND),
    Hook(f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", sizing.around_build_allocator, HookType.AROUND),
    Hook("sglang.srt.models.utils.enable_fused_set_kv_buffer", sizing.around_fused_set_kv_buffer, HookType.AROUND),
    Hook(f"{_SCHEDULER}.__init__", observe.after_scheduler_init, HookType.AFTER),
    Hook(f"{_SCHEDULER}.handle_generate_request", tenants.before_request, HookType.BEFORE),
    Hook(f"{_SCHEDULER}.get_next_batch_to_run", host.before_next_batch, HookType.BEFORE),
    Hook(f"{_SCHEDULER}.get_next_batch_to_run", observe.before_next_batch, HookType.BEFORE),
    Hook(f"{_SCHEDULER}._prefetch_kvcache", host.around_prefetch, HookType.AROUND),
    Hook(f"{_SCHEDULER}.maybe_sleep_on_idle", host.around_idle_sleep, HookType.AROUND),
    Hook(f"{_BATCH}.prepare_for_extend", observe.after_extend, HookType.AFTER),
    Hook(f"{_BATCH}.prepare_for_decode", observe.after_decode, HookType.AFTER),
    Hook(f"{_SCHEDULER}.get_internal_state", observe.around_get_internal_state, HookType.AROUND),
    Hook(f"{_REPORTER}.report_prefill_stats", observe.after_prefill_report, HookType.AFTER),
    Hook(f"{_CHECKER}._check_tree_cache", observe.after_idle_check, HookType.AFTER),
)

# Where the HTTP server runs. Its module takes a second to import, which the processes that it starts need not wait for.
_SERVING = (
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        routes.before_serving,
        HookType.BEFORE,
    ),
    Hook("sglang.srt.utils.auth.add_api_key_middleware", routes.after_key_middleware, HookType.AFTER),
)

_PLAIN_CPU = (
    Hook("sglang.srt.utils.common.support_triton", cpu_hooks.support_triton, HookType.REPLACE),
    Hook("sglang.srt.mem_cache.allocation.get_last_loc", cpu_hooks.get_last_loc, HookType.REPLACE),
)


def table() -> tuple[Hook, ...]:
    """The hooks that this process needs."""
    serving = multiprocessing.parent_process() is None
    return _EVERYWHERE + (_SERVING if serving else ()) + (_PLAIN_CPU if on_plain_cpu() else ())


def install() -> None:
    """Register every hook; SGLang applies them after all plugins have run."""
    for hook in table():
        HookRegistry.register(hook.target, hook.function, hook.kind)


def missing() -> list[str]:
    """Targets whose hook did not take."""
    targets = dict.fromkeys(hook.target for hook in table())
    return [target for target in targets if target not in HookRegistry._patched]


def verify() -> None:
    """Refuse to go on with a gap.

    Raises:
        SystemExit: names the targets, the version found and those supported. Not an Exception, since SGLang catches
            and logs those while it loads plugins.
    """
    gaps = missing()
    if gaps:
        raise SystemExit(
            f"sglang_mosaic could not hook into SGLang {sglang_version()} at {', '.join(gaps)} (supported: "
            f"{', '.join(SUPPORTED)}): install a supported version, or serve without --attention-backend mosaic."
        )
