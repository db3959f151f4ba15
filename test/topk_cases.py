"""Epochs whose heads have a format of top-k, too: calibrations give one only to heads that have a page for it."""

from mosaic_kernels.topk.segment import TopKFormat
from sglang_mosaic.codec.planes import PlanesEpoch


def with_topk(epoch: PlanesEpoch) -> PlanesEpoch:
    """The same epoch with a format more in every head."""
    layers = []
    for plan in epoch.layers:
        k_dim, v_dim = plan.basis.k_basis.shape[1], plan.basis.v_basis.shape[1]
        heads = [
            head._replace(
                formats=(*head.formats, TopKFormat.fitting(head.segment_bytes, k_dim, v_dim, epoch.page_size))
            )
            for head in plan.heads
        ]
        layers.append(plan._replace(heads=tuple(heads)))
    return PlanesEpoch(layers, epoch.page_size)
