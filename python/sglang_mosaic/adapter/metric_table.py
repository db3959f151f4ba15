"""Every metric that /metrics shows, in one table: what it is called, what it means, and which statistic it comes from.

Names, units and suffixes are those that Prometheus asks for. A place is a path into what `PageMemory.stats` gives,
which /get_server_info shows under `mosaic`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

PREFIX = "sglang_mosaic_"
HOST = "host."
"""Places of servers with a host tier."""
MANAGER = "host.manager."
"""Places of what a manager counts, from 0 on."""


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    """Its place has two ends: `_counts`, by bucket, and `_seconds`, their sum."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One family of series. They have the labels of SGLang's own metrics besides."""

    kind: Kind
    name: str
    help: str
    places: Mapping[str, str]
    """By value of the label; without a label, under an empty name."""
    label: str | None = None

    @property
    def of_host(self) -> bool:
        """Whether only servers with a host tier have it."""
        return all(place.startswith(HOST) for place in self.places.values())


def _metric(kind: Kind, name: str, help_: str, place: str | Mapping[str, str], label: str | None = None) -> Metric:
    places = {"": place} if isinstance(place, str) else place
    return Metric(kind, PREFIX + name, help_, places, label)


def _counter(name: str, help_: str, place: str | Mapping[str, str], label: str | None = None) -> Metric:
    return _metric(Kind.COUNTER, name, help_, place, label)


def _gauge(name: str, help_: str, place: str | Mapping[str, str], label: str | None = None) -> Metric:
    return _metric(Kind.GAUGE, name, help_, place, label)


_POOL = (
    _gauge("logical_pages", "Pages of 64 tokens that SGLang's pool has.", "logical_pages"),
    _gauge(
        "frames",
        "Frames of the pool, each with room for one page: dense (bf16) or mosaic (compressed).",
        {"dense": "dense_frames", "mosaic": "mosaic_frames"},
        "frame",
    ),
    _gauge(
        "used_pages",
        "Pages in use, by the kind of frame that they are in.",
        {"dense": "dense_frames_used", "mosaic": "mosaic_frames_used"},
        "frame",
    ),
    _gauge("sealed_pages", "Full pages in dense frames: those that could be compressed.", "sealed_pages"),
    _gauge(
        "frame_bytes",
        "Bytes of one frame, all layers and KV heads of this rank.",
        {"dense": "frame_bytes_dense", "mosaic": "frame_bytes_mosaic"},
        "frame",
    ),
    _gauge("kv_bytes", "Bytes of all frames together.", "kv_bytes"),
    _gauge("table_bytes", "Bytes of the page table and of the codec's tables, on the device.", "table_bytes"),
    _gauge("sample_bytes", "Bytes of the pages sampled for calibrations, in host memory.", "sample_bytes"),
    _gauge("compression_ratio", "bf16 bytes per byte of a compressed page.", "ratio"),
    _counter("allocated_pages_total", "Pages handed out, restored ones included.", "pages_allocated"),
    _counter("freed_pages_total", "Pages taken back.", "pages_freed"),
    _counter("encoded_pages_total", "Pages compressed in the pool.", "pages_encoded"),
    _counter(
        "encoded_last_pages_total",
        "Pages chosen to be compressed, for want of others, that should go last: starts of sequences, recent windows "
        "of running requests, and pages over --mosaic-max-error.",
        {"sink": "pages_encoded_sinks", "recent": "pages_encoded_recent", "over_error": "pages_encoded_over_error"},
        "reason",
    ),
    _counter(
        "cancelled_encodings_total",
        "Pages freed after they were chosen to be compressed and before that ran.",
        "encodings_cancelled",
    ),
    _gauge(
        "encoding_error_ratio",
        "Expected relative error of the attention output over the pages compressed so far, root mean square: over all "
        "layers, and of the worst one.",
        {"all": "error", "worst": "error_worst_layer"},
        "layers",
    ),
    _counter(
        "encoding_squared_error_total",
        "Squares of the expected relative error, summed over compressed pages; divided by encoding_error_pages_total, "
        "the mean square over any time.",
        "squared_error_sum",
    ),
    _counter(
        "encoding_error_pages_total",
        "Compressed pages in the sum of squared errors: encoded_pages_total, as soon as the device has written them.",
        "squared_error_pages",
    ),
    _counter("calibrations_total", "Calibrations that pages were or will be compressed with.", "epochs_started"),
    _counter("audits_total", "Audits that the idle pool passed (--mosaic-audit).", "audits"),
)

_TIER = (
    _counter("host_offered_pages_total", "Evicted pages that were to go to the host.", "host.offered"),
    _counter(
        "host_dropped_pages_total",
        "Offered pages that nothing had room or a calibration for.",
        "host.dropped",
    ),
    _counter("host_restored_pages_total", "Pages brought back into the pool for requests.", "host.restored"),
    _counter(
        "host_recomputed_pages_total",
        "Pages on the host that were computed again, as that takes no longer than bringing them back.",
        "host.recomputed",
    ),
    _counter(
        "host_missed_pages_total",
        "Pages asked for and not restored: lost, damaged, unreadable, late, or without room in the pool.",
        "host.missed",
    ),
    _gauge("host_outbox_pages", "Evicted pages that wait for the manager in the server's memory.", "host.outbox_pages"),
    _gauge(
        "host_outbox_bytes",
        "Bytes of evicted pages that wait for the manager or are on their way from the device.",
        "host.outbox_bytes",
    ),
    _gauge("host_waiting_requests", "Queued requests that wait for pages from the host.", "host.restores_waiting"),
)

_LINK = (
    _gauge("manager_up", "1 if there is a manager that answers.", "host.connected"),
    _counter(
        "manager_restarts_total",
        "Managers that ended or were killed; another follows each.",
        "host.client.deaths",
    ),
    _counter("manager_silences_total", "Times that a manager stopped answering.", "host.client.silences"),
    _gauge("manager_free_slots", "Payloads that may go on their way to or from the manager now.", "host.slots_free"),
    _gauge("manager_known_records", "Records that the manager has, as far as the server knows.", "host.known_records"),
    _gauge("manager_uploads", "Calibrations and their statistics that wait to be sent.", "host.uploads"),
    _counter(
        "manager_puts_total",
        "Pages for the manager: sent, known to be there already, or dropped as there was no slot or no manager.",
        {"sent": "host.client.puts", "known": "host.client.puts_known", "dropped": "host.client.puts_dropped"},
        "result",
    ),
    _counter(
        "manager_refused_puts_total", "Pages that the manager refused, of those sent.", "host.client.puts_refused"
    ),
    _counter(
        "manager_fetches_total",
        "Records asked of the manager, calibrations included, by how that ended.",
        {"hit": "host.client.hits", "miss": "host.client.misses"},
        "result",
    ),
    _counter(
        "manager_late_fetches_total", "Fetches that missed because nobody answered in time.", "host.client.deadlines"
    ),
    _counter(
        "manager_refused_replies_total",
        "Messages of the manager that were none, late or replayed, and payloads that did not match.",
        "host.client.refused",
    ),
)

_MANAGER = (
    _gauge(
        "host_records",
        "Records that the manager keeps, pages and calibrations.",
        {"memory": MANAGER + "memory_records", "disk": MANAGER + "disk_records"},
        "tier",
    ),
    _gauge(
        "host_bytes",
        "Bytes of the records that the manager keeps.",
        {"memory": MANAGER + "memory_bytes", "disk": MANAGER + "disk_bytes"},
        "tier",
    ),
    _gauge(
        "host_original_bytes",
        "Bytes that the records in memory came with; divided by host_bytes, the ratio of recompression.",
        MANAGER + "memory_restored_bytes",
    ),
    _gauge("manager_backlog_pages", "Pages that wait for recompression.", MANAGER + "backlog"),
    _counter("manager_stored_records_total", "Records that the manager took in.", MANAGER + "stored"),
    _counter("manager_evicted_records_total", "Records that memory had no room for any more.", MANAGER + "evicted"),
    _counter("manager_recompressed_pages_total", "Pages that the manager made smaller.", MANAGER + "recompressed"),
    _counter(
        "manager_recompressed_bytes_total",
        "Bytes of recompressed pages before and after.",
        {"before": MANAGER + "recompressed_from", "after": MANAGER + "recompressed_to"},
        "when",
    ),
    _counter(
        "manager_transformed_pages_total",
        "Cold pages that the manager transform-coded, which were recompressed before.",
        MANAGER + "transformed",
    ),
    _counter(
        "manager_transformed_bytes_total",
        "Bytes of transform-coded pages before and after.",
        {"before": MANAGER + "transformed_from", "after": MANAGER + "transformed_to"},
        "when",
    ),
    _counter(
        "manager_hits_total",
        "Fetches that the manager answered with a record, by where it lay.",
        {"memory": MANAGER + "hits_memory", "disk": MANAGER + "hits_disk"},
        "tier",
    ),
    _counter(
        "manager_misses_total",
        "Fetches that the manager answered without a record: there was none, or their deadline had passed.",
        {"absent": MANAGER + "misses", "expired": MANAGER + "expired"},
        "reason",
    ),
    _counter(
        "manager_refused_total",
        "What the manager refused: messages that were none, payloads that did not match, damaged records, records that "
        "no tier had room for, and those that the disk did not take.",
        {
            "message": MANAGER + "refused_messages",
            "payload": MANAGER + "refused_payloads",
            "record": MANAGER + "refused_records",
            "full": MANAGER + "refused_full",
            "write": MANAGER + "refused_writes",
        },
        "what",
    ),
    _counter(
        "manager_calibrations_total",
        "Calibrations that the manager made, or failed to make.",
        {"made": MANAGER + "calibrations", "failed": MANAGER + "calibrations_failed"},
        "result",
    ),
    _metric(
        Kind.HISTOGRAM,
        "manager_restore_seconds",
        "From the arrival of a fetch that hit until its bytes lay in shared memory.",
        MANAGER + "restore",
    ),
)

METRICS = (*_POOL, *_TIER, *_LINK, *_MANAGER)
