"""Arrivals, lengths and trace readers; seeded."""

from .plan import RequestPlan, Workload
from .requests import build_workload
from .scaling import Scale
from .scenario import Point, Scenario, load_scenario, parse
from .table import ScenarioError, unknown_name
from .traces import TraceError

__all__ = [
    "Point",
    "RequestPlan",
    "Scale",
    "Scenario",
    "ScenarioError",
    "TraceError",
    "Workload",
    "build_workload",
    "load_scenario",
    "parse",
    "unknown_name",
]
