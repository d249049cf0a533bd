from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conserve.bench.selection import SCENARIOS
from conserve.workload import WHOLE, Scenario, ScenarioError, load_scenario

FIXED = {"kind": "fixed", "tokens": 10}
LENGTHS = {"kind": "independent", "prompt": FIXED, "output": FIXED}
BURSTS = {"kind": "bursts", "num_requests": 6, "burst_size": 3}
REPLAY = {
    "kind": "replay",
    "trace": "t",
    "format": "azure",
    "rate_rps": 1,
    "mean_prompt_tokens": 10,
    "mean_output_tokens": 10,
    "max_prompt_tokens": 10,
    "max_output_tokens": 10,
}


def table(**changes: Any) -> dict[str, Any]:
    return {
        "name": "made-up",
        "about": "A test.",
        "online": {"arrivals": BURSTS, "lengths": LENGTHS},
        "offline": {"in_flight": 2, "lengths": LENGTHS},
        **changes,
    }


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_scenario_of_ours_is_good(file: Path) -> None:
    scenario = load_scenario(file)
    assert scenario.name == file.stem
    assert scenario.about.endswith(".")
    for point in scenario.points:
        assert scenario.at(point).points == ()


def test_the_issue_s_scenarios_are_there() -> None:
    wanted = {"burst", "gamma", "diurnal", "azure-conv", "azure-code", "mooncake", "quick"}
    wanted |= {"summarise", "generate", "shared-prefix", "acceptance"}
    assert wanted <= {file.stem for file in SCENARIOS.glob("*.toml")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"durations": 3}, "unknown key 'durations': did you mean 'duration_s'"),
        ({"xyz": 3}, "unknown key 'xyz': known here: name, about, duration_s"),
        ({"duration_s": 0}, "duration_s: Input should be greater than 0"),
        ({"duration_s": float("inf")}, "duration_s: .*finite"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"online": None, "offline": None}, "neither .online. nor .offline.: nothing to send"),
        ({"online": {"arrivals": BURSTS}}, "online: lengths: missing"),
        ({"online": {"arrivals": REPLAY, "lengths": LENGTHS}}, "a replayed trace brings its own"),
        (
            {"online": {"arrivals": {**BURSTS, "burstsize": 1}, "lengths": LENGTHS}},
            "online.arrivals.bursts: unknown key 'burstsize': did you mean 'burst_size'",
        ),
        (
            {"online": {"arrivals": {"kind": "gama"}, "lengths": LENGTHS}},
            "online.arrivals: unknown kind 'gama': did you mean 'gamma'",
        ),
        ({"online": {"arrivals": {}, "lengths": LENGTHS}}, "online.arrivals: needs a kind"),
        ({"offline": {"in_flight": 0, "lengths": LENGTHS}}, "in_flight: must be at least 1"),
        ({"targets": {"ttft_ms": -1}}, "targets.ttft_ms: Input should be greater than 0"),
    ],
)
def test_bad_input_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=f"made-up.toml: .*{message}"):
        Scenario.of(table(**changes), "made-up.toml")


def test_lognormal_limits_must_be_in_order() -> None:
    bad = {"kind": "lognormal", "median_tokens": 5, "sigma": 1, "min_tokens": 9, "max_tokens": 8}
    lengths = {"kind": "independent", "prompt": bad, "output": FIXED}
    with pytest.raises(ScenarioError, match="min_tokens 9 is above max_tokens 8"):
        Scenario.of(table(offline={"lengths": lengths}), "x")


@pytest.mark.parametrize("text", ["a = ", "\xff"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ScenarioError, match=r"bad\.toml"):
        load_scenario(file)


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    """With its byte order mark and line ends."""
    source = SCENARIOS / "burst.toml"
    file = tmp_path / "burst.toml"
    file.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    assert load_scenario(file) == load_scenario(source)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.toml"):
        load_scenario(tmp_path / "none.toml")


def swept(**values: Any) -> Scenario:
    return Scenario.of(table(points=[{"name": "a", "x": 1, "set": values}]), "swept")


def test_a_point_changes_what_it_sets_and_nothing_else() -> None:
    scenario = swept(**{"online.arrivals.num_requests": 12})
    (point,) = scenario.places().values()
    changed = {**BURSTS, "num_requests": 12}
    expected = Scenario.of(table(online={"arrivals": changed, "lengths": LENGTHS}), "expected")
    assert point == expected
    assert point.places() == {WHOLE: point}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("online.arrivals.num_request", "did you mean 'num_requests'"),
        ("online.nothing.rate_rps", "no table 'online.nothing'"),
    ],
)
def test_a_point_that_sets_nothing_known_is_refused(key: str, message: str) -> None:
    scenario = swept(**{key: 1})
    with pytest.raises(ScenarioError, match=f"points.a: .*{message}"):
        scenario.at(scenario.points[0])


def test_two_points_of_one_name_are_refused() -> None:
    point = {"name": "a", "x": 1, "set": {}}
    with pytest.raises(ScenarioError, match="two have the same name"):
        Scenario.of(table(points=[point, point]), "x")


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("seeds", [1, 2, 1], "seeds: 1 is named twice"),
        ("arms", ["fcfs", "fcfs"], "arms: 'fcfs' is named twice"),
        ("arms", [], "arms: "),
        ("seeds", [], "seeds: "),
    ],
)
def test_arms_and_seeds_are_some_and_differ(
    field: str, values: list[int] | list[str], message: str
) -> None:
    with pytest.raises(ScenarioError, match=message):
        Scenario.of(table(**{field: values}), "x")


def test_trace_names_are_those_used() -> None:
    online = {"arrivals": REPLAY}
    lengths = {k: v for k, v in REPLAY.items() if k != "rate_rps"}
    offline = {"lengths": {**lengths, "kind": "trace", "trace": "u", "format": "arxiv"}}
    assert Scenario.of(table(online=online, offline=offline), "x").trace_names() == ["t", "u"]
    assert Scenario.of(table(), "x").trace_names() == []
