"""The only definitions of TTFT and its parts, TPOT, TBT, goodput and percentiles."""

from .histograms import bucket_percentile, share_within
from .percentiles import median, percentile
from .records import CUT_OFF, UNFINISHED, BadRecordError, RequestRecord, read_records, write_records
from .summary import RunSummary, summarise, throughput
from .targets import goodput_rps, meets, slo_attainment, tbt_attainment, ttft_attainment

__all__ = [
    "CUT_OFF",
    "UNFINISHED",
    "BadRecordError",
    "RequestRecord",
    "RunSummary",
    "bucket_percentile",
    "goodput_rps",
    "median",
    "meets",
    "percentile",
    "read_records",
    "share_within",
    "slo_attainment",
    "summarise",
    "tbt_attainment",
    "throughput",
    "ttft_attainment",
    "write_records",
]
