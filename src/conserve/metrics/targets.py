"""Latency targets: which requests met them, and how many good ones a second that makes."""

from __future__ import annotations

from collections.abc import Sequence

from conserve.core.snapshot import Targets

from .records import RequestRecord


def meets(record: RequestRecord, targets: Targets) -> bool:
    """Finished, with TTFT within its target and TPOT within the TBT target.

    TPOT is a request's mean gap: this is goodput as DistServe (OSDI 2024) counts it. Single slow
    gaps show in `tbt_attainment` and in the TBT percentiles.
    """
    if not record.finished or record.ttft_s is None:
        return False
    return record.ttft_s <= targets.ttft_s and (record.tpot_s or 0.0) <= targets.tbt_s


def slo_attainment(records: Sequence[RequestRecord], targets: Targets) -> float | None:
    """Share of the requests that met both targets; failed ones did not. None without requests."""
    if not records:
        return None
    return sum(meets(record, targets) for record in records) / len(records)


def ttft_attainment(records: Sequence[RequestRecord], targets: Targets) -> float | None:
    """Share of the requests whose first token came within its target. None without requests."""
    if not records:
        return None
    met = [r.ttft_s is not None and r.ttft_s <= targets.ttft_s for r in records]
    return sum(met) / len(met)


def tbt_attainment(records: Sequence[RequestRecord], targets: Targets) -> float | None:
    """Share of all gaps between tokens that stayed within the target. None without gaps."""
    gaps = [gap for record in records for gap in record.tbts_s]
    return sum(gap <= targets.tbt_s for gap in gaps) / len(gaps) if gaps else None


def goodput_rps(
    records: Sequence[RequestRecord], targets: Targets, duration_s: float
) -> float | None:
    """Requests a second that arrived within the run and met both targets."""
    attained = slo_attainment(records, targets)
    return None if attained is None else attained * len(records) / duration_s
