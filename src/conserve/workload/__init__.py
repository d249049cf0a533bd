"""Arrivals, lengths and trace readers; seeded."""

from .plan import RequestPlan, Window, Workload
from .requests import build_workload
from .scenario import WHOLE, Point, Scenario, load_scenario
from .table import ScenarioError, unknown_name
from .trace_lines import TraceError

__all__ = [
    "WHOLE",
    "Point",
    "RequestPlan",
    "Scenario",
    "ScenarioError",
    "TraceError",
    "Window",
    "Workload",
    "build_workload",
    "load_scenario",
    "unknown_name",
]
