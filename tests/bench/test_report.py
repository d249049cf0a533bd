"""The report of the stored result beside this file, byte for byte.

The result is made up: no figure in it was measured. After a wanted change of the report, make
the expected files again with `conserve bench report tests/bench/stored`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conserve.bench.report.compare import compare_folders
from conserve.bench.report.figures import Spread, figures_of, read_figures
from conserve.bench.report.tables import Column
from conserve.bench.report.write import write_report
from conserve.bench.store import ResultError, ResultFolder
from conserve.metrics import read_records, write_records

STORED = Path(__file__).with_name("stored")
TEXTS = ("report.md", "figures.json")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    target = tmp_path / "result"
    shutil.copytree(STORED, target)
    for name in TEXTS:
        (target / name).unlink()
    return target


def test_the_report_is_the_expected_one(copy: Path) -> None:
    write_report(copy)
    for name in TEXTS:
        assert (copy / name).read_text() == (STORED / name).read_text()


def test_a_second_report_has_the_same_bytes(copy: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(copy, again)
    write_report(copy)
    write_report(again)
    made = sorted(path.name for path in copy.iterdir() if path.is_file())
    pictures = {"latency.png", "sweep.png", "timeline.png", "tradeoff.png"}
    assert pictures | {"report.html", "report.md"} <= set(made)
    for name in made:
        assert (copy / name).read_bytes() == (again / name).read_bytes(), name


def test_another_record_makes_another_report(copy: Path) -> None:
    """The negative control of the two above."""
    victim = next(copy.glob("records/*/conserve.seed-1.jsonl.gz"))
    shutil.copyfile(victim.with_name("fcfs.seed-1.jsonl.gz"), victim)
    write_report(copy)
    for name in TEXTS:
        assert (copy / name).read_text() != (STORED / name).read_text()


def test_the_html_needs_no_other_file(copy: Path) -> None:
    write_report(copy)
    html = (copy / "report.html").read_text()
    assert 'src="data:image/png;base64,' in html
    assert 'src="http' not in html
    assert "<link" not in html
    assert html.count("<img") == len(list(copy.glob("*.png")))


def test_the_html_shows_words_not_tags(copy: Path) -> None:
    table = json.loads((copy / "run.json").read_text())
    table["scenario"]["about"] = "<script>alert(1)</script>"
    (copy / "run.json").write_text(json.dumps(table))
    write_report(copy)
    assert "<script>" not in (copy / "report.html").read_text()


def test_ratios_pair_the_seeds(copy: Path) -> None:
    figures = figures_of(ResultFolder(copy))
    assert (figures.alone, figures.bound) == ("online-only", "fcfs")
    point = next(iter(figures.points))
    own = figures.points[point]["conserve"]
    assert own["ttft_p99_over_alone"].num_seeds == 2
    # The other seed of fcfs failed: one pair is left.
    assert own["offline_tps_over_bound"].num_seeds == 1
    assert "offline_tps_over_bound" not in figures.points[point]["online-only"]
    assert "ttft_p99_over_alone" not in figures.points[point]["online-only"]
    assert own["counted:conserve:stopped_steps_total"].median == 5


def test_what_chats_found_is_told_where_servers_tell_it(copy: Path) -> None:
    write_report(copy)
    assert "What chats find again" not in (copy / "report.md").read_text()
    found = {"online-only": 100, "conserve": 50}
    for path in copy.glob("records/*/*.jsonl.gz"):
        records = read_records(path)
        share = found.get(path.name.partition(".")[0], 0)
        for record in records:
            record.num_cached_tokens = record.num_prompt_tokens * share // 100
        write_records(path, records)
    write_report(copy)
    own = next(iter(read_figures(copy / "figures.json").points.values()))["conserve"]
    assert own["online_hit_ratio"].median == pytest.approx(0.5, abs=0.01)
    assert own["hits_over_alone"].median == pytest.approx(0.5, abs=0.01)
    assert own["ttft_p50_over_alone"].num_seeds == 2
    text = (copy / "report.md").read_text()
    row = next(
        line for line in text.split("What chats find again")[1].splitlines() if "| conserve" in line
    )
    assert "0.50" in row


def test_figures_survive_their_file(copy: Path) -> None:
    write_report(copy)
    assert read_figures(copy / "figures.json") == figures_of(ResultFolder(copy))


def test_spread() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([None]) is None
    column = Column("x", "X", 1000, 0)
    assert column.text(Spread(0.2, 0.1, 0.3, 3), with_spread=True) == "200 (100 to 300)"
    assert column.text(Spread(0.2, 0.1, 0.3, 3), with_spread=False) == "200"
    assert column.text(Spread(0.2, 0.2, 0.2, 1), with_spread=True) == "200"
    assert column.cell({}) == "-"


def change(folder: Path, **values: object) -> None:
    table = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**table, **values}))


def test_compare_shows_both_and_marks_what_is_apart(copy: Path) -> None:
    target = copy.with_name("other")
    shutil.copytree(copy, target)
    point = next((copy / "records").iterdir()).name
    for seed in (1, 2):
        fcfs = target / "records" / point / "fcfs.seed-1.jsonl.gz"
        shutil.copyfile(fcfs, fcfs.with_name(f"online-only.seed-{seed}.jsonl.gz"))
    text = compare_folders(copy, target)
    row = next(line for line in text.splitlines() if line.startswith("| online-only"))
    cells = [cell.strip() for cell in row.split("|")[2:]]
    assert cells[0].endswith(" *")
    assert "->" in cells[0]
    row = next(line for line in text.splitlines() if line.startswith("| conserve"))
    assert "*" not in row
    assert "(1.00x)" in row


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "other"}, "model stored-model before, other after"), ({"machine": {}}, "machine")],
)
def test_compare_refuses_what_is_not_comparable(
    copy: Path, changes: dict[str, object], message: str
) -> None:
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    change(other, **changes)
    with pytest.raises(ResultError, match=f"not comparable: {message}.*--anyway"):
        compare_folders(copy, other)
    assert f"Warning: {message}" in compare_folders(copy, other, anyway=True)


def test_compare_refuses_another_scale(copy: Path) -> None:
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    scenario = json.loads((other / "run.json").read_text())["scenario"]
    change(other, scenario={**scenario, "duration_s": 99.0}, scale=0.25)
    with pytest.raises(ResultError, match="not comparable: scale 1 before") as refused:
        compare_folders(copy, other)
    assert "duration_s" not in str(refused.value)
    assert "Warning: scale 1 before" in compare_folders(copy, other, anyway=True)


def test_a_result_that_names_no_scale_has_scale_1(copy: Path) -> None:
    assert "scale" not in json.loads((copy / "run.json").read_text())
    assert ResultFolder(copy).description().scale == 1
    explicit = copy.with_name("explicit")
    shutil.copytree(copy, explicit)
    change(explicit, scale=1.0, speed={"prefill_tps": 2400, "stream_tps": 65, "batch_tps": 550})
    assert "conserve" in compare_folders(copy, explicit)
    write_report(explicit)
    measured = "Scale: 1 (measured: 2,400 prompt tokens a second, 65 output tokens"
    assert measured in (explicit / "report.md").read_text()


def test_compare_refuses_another_scenario(copy: Path) -> None:
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    scenario = json.loads((other / "run.json").read_text())["scenario"]
    change(other, scenario={**scenario, "duration_s": 99.0})
    with pytest.raises(ResultError, match="the scenarios differ in duration_s"):
        compare_folders(copy, other)


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"run\.json: cannot be read"):
        write_report(tmp_path)
