"""The report says what the records say: same numbers, nothing invented, nothing hidden."""

import json
import math
import re
import tomllib
from dataclasses import replace

import pytest
from made_up_run import made_up_run

from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from probes import figures, jsonl, markdown, rundir, trainer_toml
from probes import records as R
from probes import records_smoothness as S
from probes.report import RULES, Report


@pytest.fixture(scope="module")
def report() -> Report:
    # Through the text form: what a report sees is what was written, not what was made.
    return Report.of([jsonl.decode(jsonl.encode(r)) for r in made_up_run("group")])


@pytest.fixture(scope="module")
def document(report) -> dict:
    return json.loads(json.dumps(report.json(), allow_nan=False))


def test_report_json_has_the_fields_of_its_schema(document):
    assert set(document) >= {
        "schema",
        "model",
        "preflight",
        "blocks",
        "points",
        "coupling",
        "learning_rates",
        "cost",
        "warnings",
    }
    assert document["schema"] == 0
    for block in document["blocks"]:
        assert set(block) >= {"name", "group", "d", "L0", "L1", "intervals", "violation_rate", "points"}
    assert set(document["learning_rates"]) == set(RULES)
    for rule in document["learning_rates"].values():
        assert set(rule) == {"base", "peft", "ratio"}


def test_report_json_numbers_are_those_of_the_records(report, document):
    records = made_up_run("group")
    for rule in RULES:
        (envelope,) = [r for r in records if isinstance(r, R.Rates) and r.rule == rule and r.where == "envelope"]
        (first,) = [r for r in records if isinstance(r, R.Rates) and r.rule == rule and r.where == "first"]
        for group in ("base", "peft", "ratio"):
            assert document["learning_rates"][rule][group]["value"] == getattr(envelope, group).value
            assert document["learning_rates"][rule][group]["first"]["value"] == getattr(first, group).value
    fits = [r for r in records if isinstance(r, R.Fit)]
    for block in document["blocks"]:
        (fit,) = [
            f for f in fits if (f.block, f.data, f.method, f.argument) == (block["name"], "secant", "envelope", "full")
        ]
        assert (block["L0"], block["L1"], block["points"]) == (fit.L0, fit.L1, fit.n)
        assert block["violation_rate"] == fit.violation_rate
        assert block["identified"] == fit.identified
        assert len(block["fits"]) == 5
    points = [r for r in records if isinstance(r, R.Point)]
    assert [p["blocks"]["base"]["lam_max"]["value"] for p in document["points"]] == [
        p.blocks["base"].lam_max.value for p in points
    ]
    assert document["coupling"]["value"] == points[-1].coupling.value
    assert document["cost"]["actual"]["gradients"] == 201
    # An infinite loss change survives as a string, and the JSON has no bare Infinity (json.dumps above refuses it).
    assert document["points"][0]["finite_scale"]["base"]["change"][-1] == "inf"


def test_every_value_of_the_rule_table_stands_in_the_text(report):
    text = report.markdown()
    for rule in RULES:
        for where in ("first", "envelope"):
            for group in ("base", "peft", "ratio"):
                rate = report.rate(rule, group, where)
                if rate.value is not None:
                    assert markdown.number(rate.value) in text
    assert "orders of magnitude" in text


def test_what_is_not_resolved_or_not_identified_is_said_in_words(report):
    assert "**not identified**: gradient norms span a factor 2.1" in report.markdown()
    point = report.points[0]
    blurred = replace(
        point.blocks["base"], trace=Estimate(10.0, stderr=9.0, n=4, resolved=False, note="9.0 is above 3.3")
    )
    changed = replace(point, blocks={**point.blocks, "base": blurred})
    text = Report.of([changed if r is point else r for r in report.records]).markdown()
    assert "10.0 ± 9.0 (**not resolved**)" in text
    assert "point 0, `base`, tr H: 9.0 is above 3.3" in text
    assert "not resolved" not in report.markdown()


def test_warnings_come_before_the_numbers(report):
    text = report.markdown()
    assert "2 of 16 rows were longer than 64 tokens" in text
    assert text.index("Read this before") < text.index("## Learning rates")
    twice = Report.of(
        [*report.records, R.Warning("2 of 16 rows were longer than 64 tokens and were truncated", "data")]
    )
    assert len(twice.warnings) == 1


def test_worst_case_factor_is_the_quotient(report):
    worst, measured = report.rate("worst_case", "base").value, report.rate("measured", "base").value
    (found,) = re.findall(r"prescribes a rate (\S+) times smaller", report.markdown())
    assert found == markdown.number(measured / worst, 2)


def test_trainer_toml_parses_and_carries_the_recommendation(report):
    parsed = tomllib.loads(report.trainer_toml())
    found = report.recommendation
    assert parsed["rates"] == {"eta_base": found.base.value, "eta_peft": found.peft.value, "ratio": found.ratio.value}
    assert parsed["bound_by"] == {"eta_base": "noise_limited", "eta_peft": "measured", "ratio": "quotient of the two"}
    assert parsed["settings"] == found.settings
    assert tuple(parsed["intervals"]["eta_base"]) == found.base.interval
    assert parsed["source"]["model_sha256"] == report.header.model.sha256


def test_trainer_toml_without_a_rate_carries_no_number_for_it(report):
    empty = S.Rate(None, note="the loss rose\nat every rate = 1")
    changed = replace(report.recommendation, base=empty, ratio=None)
    again = Report.of([changed if isinstance(r, R.Recommendation) else r for r in report.records])
    assert set(tomllib.loads(again.trainer_toml())["rates"]) == {"eta_peft"}
    assert "# eta_base: none (the loss rose at every rate = 1)" in again.trainer_toml()
    none = Report.of([r for r in report.records if not isinstance(r, R.Recommendation)])
    assert tomllib.loads(none.trainer_toml()) == {}


@pytest.mark.parametrize(
    "text", ['a"b', "back\\slash", "tab\tand\nnewline", "ünïcode 🙂", "\x00\x1f\x7f", "[table]", "# no"]
)
def test_toml_strings_survive(text):
    assert tomllib.loads(f"x = {trainer_toml.value(text)}") == {"x": text}
    assert tomllib.loads(f"x = 1 {trainer_toml.comment(text)}") == {"x": 1}


def test_names_cannot_break_the_text():
    records = made_up_run("group")
    head = replace(records[0], blocks=[replace(records[0].blocks[0], name="a|b<c>$x$"), records[0].blocks[1]])
    text = Report.of([head, *records[1:]]).markdown()
    columns = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| `")}
    assert columns  # every row of one table has the columns of its head
    assert markdown.cell("a|b<c>") == "a\\|b&lt;c>"


def test_a_run_that_stopped_says_so_and_still_reports():
    report = Report.of(made_up_run("group", complete=False))
    text = report.markdown()
    assert "did not finish" in text
    assert "ended before rates could be derived" in text
    assert report.json()["learning_rates"]["measured"] == {"base": None, "peft": None, "ratio": None}
    assert report.json()["run"]["finished"] is False


def test_no_report_without_a_measurement():
    with pytest.raises(UserError, match="no measurement"):
        Report.of(made_up_run()[:3])
    with pytest.raises(UserError, match="no header"):
        Report.of(made_up_run()[3:])


def test_cost_of_a_resumed_run_is_the_sum_of_its_parts(report):
    more = R.Cost("actual", 9, 1, 5, seconds=1.5, memory_bytes=4 << 29)
    total = Report.of([*report.records, more]).cost("actual")
    assert (total.gradients, total.products, total.values) == (210, 172, 910)
    assert (total.seconds, total.memory_bytes) == (80.0, 4 << 29)


def test_frames_are_tidy(report):
    frames = report.frames()
    assert len(frames["points"]) == 3 * 2
    base = frames["points"].query("block == 'base' and point == 1").iloc[0]
    block = report.points[1].blocks["base"]
    assert base["lam_max"] == block.lam_max.value
    assert base["lam_max_upper"] == block.lam_max.upper
    assert base["trace_stderr"] == block.trace.stderr
    assert base["trace_at_mu"] == block.at_scale.estimates["trace"].value
    assert len(frames["secants"]) == len(report.secants)
    assert set(frames["rates"]["rule"]) == set(RULES)


DRAWN = ("learning_rates", "smoothness", "spectrum", "density", "displacement", "finite_scale")


def test_save_writes_every_file_and_the_records_read_back(tmp_path, report):
    report.save(tmp_path / "run")
    names = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    wanted = {"records.jsonl", "report.md", "report.json", "trainer.toml"}
    assert names == wanted | {f"figures/{name}.{kind}" for name in DRAWN for kind in ("png", "pdf")}
    assert all(f"figures/{name}.png" in (tmp_path / "run" / "report.md").read_text() for name in DRAWN)
    assert Report.load(tmp_path / "run").json() == report.json()
    pdf = (tmp_path / "run" / "figures" / "spectrum.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"/Type3" not in pdf


def test_many_blocks_are_drawn_and_told():
    report = Report.of(made_up_run("layer"))
    assert set(figures.drawn(report)) == set(DRAWN)
    panels = figures.drawn(report)["smoothness"].axes
    assert sum(ax.axison for ax in panels) == len(report.blocks) + 1  # and the run's own moves
    assert all(f"`{b.name}`" in report.markdown() for b in report.blocks)


def test_the_legend_of_smoothness_lists_what_is_drawn():
    def legend(*records: R.Record) -> set[str]:
        return {t.get_text() for t in figures.drawn(Report.of(records))["smoothness"].legends[0].get_texts()}

    whole = made_up_run("group")
    assert {"upper envelope", "quantile fit", figures.SPECTRUM, "secant, random"} <= legend(*whole)
    unknown = [replace(r, identified=False) if isinstance(r, R.Fit) else r for r in whole]
    kept = [r for r in unknown if not (isinstance(r, R.Secant) and r.move == "random") and not isinstance(r, R.Point)]
    lines = legend(*kept)
    assert figures.UNIDENTIFIED in lines
    assert not {"upper envelope", "quantile fit", figures.SPECTRUM, "secant, random"} & lines


def test_figures_that_have_no_data_are_left_out():
    report = Report.of(made_up_run("group"))
    bare = [
        replace(p, phi={}, finite_scale={}, blocks={n: replace(b, density=None) for n, b in p.blocks.items()})
        for p in report.points
    ]
    kept = [r for r in report.records if not isinstance(r, R.Point | R.Rates | R.Recommendation)]
    drawn = figures.drawn(Report.of([*kept, *bare]))
    assert set(drawn) == {"smoothness", "spectrum"}
    text = Report.of([*kept, *bare]).markdown()
    assert {f"figures/{name}.png" for name in drawn} == set(re.findall(r"figures/\w+\.png", text))


def test_figures_survive_numbers_that_a_log_axis_cannot_show():
    report = Report.of(made_up_run("group"))
    nothing = Estimate(0.0, stderr=0.0, upper=0.0, confidence=0.99)
    broken = Estimate(math.nan, stderr=math.nan, resolved=False)
    point = report.points[0]
    odd = replace(
        point,
        grad_norm=0.0,
        blocks={
            "base": replace(point.blocks["base"], lam_min=nothing, trace=broken),
            "peft": replace(
                point.blocks["peft"], lam_max=nothing, lam_min=nothing, trace=replace(nothing, value=-3.0), density=None
            ),
        },
        phi={"base": S.Phi([1e-3, 1e-2], [-1e-9, math.inf], [0.0, math.inf], 2)},
        finite_scale={
            "base": S.FiniteScale([1e-5, 1e-4], [math.inf, math.inf], [0.0, 0.0], 1e-5, (0.0, math.inf), 1.0, 2, True)
        },
    )
    secant = R.Secant(0, "base", "random", 0.0, 0.0, 0.0, None, 0.0)
    head = report.header
    drawn = figures.drawn(Report.of([head, odd, secant]))
    with figures.style():
        for figure in drawn.values():
            figure.draw_without_rendering()
    assert {"spectrum", "finite_scale"} <= set(drawn)


def test_load_of_an_interrupted_folder(tmp_path):
    with rundir.RunFolder(tmp_path / "run") as run:
        for record in made_up_run("group", complete=False):
            run.append(record)
    assert not Report.load(tmp_path / "run").finished


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (2.1e-4, "2.10e-4"),
        (-0.5, "-0.500"),
        (math.inf, "∞"),
        (None, "–"),
        (6.02e23, "6.02e23"),
    ],
)
def test_numbers_for_people(x, text):
    assert markdown.number(x) == text
