"""Records: what is written is read back exactly; what is not a record is refused by file, line and field."""

import dataclasses
import json
import math
import subprocess
import sys
import typing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridtheory.errors import UserError
from probes import jsonl, rundir
from probes import records as R
from probes import records_smoothness as S

finite = st.floats(allow_nan=False, allow_infinity=False)


def strategy_for(hint):
    """Values of a record field's type. nan is left out only because it is not equal to itself; it has its own test."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return st.none() | st.booleans() | st.integers() | finite | st.text(max_size=8)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(strategy_for(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), strategy_for(args[1]), max_size=2)
    if origin is tuple and args[-1] is ...:
        return st.lists(strategy_for(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy_for, args))
    if args:  # X | None
        return st.one_of(*[st.none() if a is type(None) else strategy_for(a) for a in args])
    if dataclasses.is_dataclass(hint):
        return instances(hint)
    return {int: st.integers(), str: st.text(max_size=8), bool: st.booleans(), float: finite | st.just(math.inf)}[hint]


def instances(cls):
    hints = {name: strategy_for(hint) for name, hint in typing.get_type_hints(cls).items()}
    if cls is R.Header:
        hints["schema"] = st.just(R.SCHEMA)
    return st.builds(cls, **hints)


any_record = st.one_of(*[st.deferred(lambda cls=cls: instances(cls)) for cls in R.KINDS.values()])


def header(**changes) -> R.Header:
    model = R.ModelInfo("m", "00", 10)
    data = R.DataInfo("d", "11", rows=4)
    base = R.Header("smoothness", 0, model, data, [R.BlockInfo("base", "base", 10)])
    return dataclasses.replace(base, **changes)


def secant(step: int = 0) -> R.Secant:
    return R.Secant(step, "base", "random", 2.0, 1.0, 1e-3, 3.0, 2.5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_record)
def test_round_trip_is_exact(record):
    line = jsonl.encode(record)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name} in {line}"))
    assert jsonl.decode(line) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_strings(value):
    line = jsonl.encode(R.Point(0, 0, value, 1.0, {}))
    assert json.loads(line)["loss"] == str(value)
    assert str(jsonl.decode(line).loss) == str(value)


def test_numpy_scalars_and_arrays_become_plain_numbers():
    density = S.Density(np.array([1.0, 2.0]), np.array([0.25, 0.75], dtype=np.float32), n=np.int64(3))
    record = R.Point(0, 0, np.float32(0.5), np.float64(2), {"base": S.BlockPoint(1.0, density=density)})
    back = jsonl.decode(jsonl.encode(record))
    assert back.loss == 0.5
    assert back.blocks["base"].density == S.Density([1.0, 2.0], [0.25, 0.75], 3)


def test_a_value_that_cannot_be_read_back_is_refused_when_written():
    with pytest.raises(ValueError, match=r"point\.loss: float was expected"):
        jsonl.encode(R.Point(0, 0, None, 1.0, {}))
    with pytest.raises(TypeError, match="object cannot be written"):
        jsonl.encode(header(options={"x": object()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pont"}, "unknown kind 'pont'"),
        ({"colour": 1}, "secant: unknown field 'colour'"),
        ({"step": None}, "secant.step: int was expected, None came"),
        ({"step": 1.5}, "secant.step: int was expected, 1.5 came"),
        ({"step": True}, "secant.step: int was expected, True came"),
        ({"move": "sideways"}, "secant.move: one of 'trajectory', 'gradient', 'random', 'joint' was expected"),
        ({"radius": "big"}, "secant.radius: float was expected, 'big' came"),
        ({"block": 3}, "secant.block: str was expected"),
    ],
)
def test_what_is_not_a_record_is_refused_by_field(change, message):
    good = json.loads(jsonl.encode(secant()))
    with pytest.raises(ValueError, match=message):
        jsonl.decode(json.dumps({**good, **change}))


def test_other_refusals():
    good = json.loads(jsonl.encode(secant()))
    del good["radius"]
    for line, message in [
        (json.dumps(good), "field 'radius' is missing"),
        ("{", "not JSON"),
        ("[1]", "not a record"),
        ('{"kind": "warning", "text": NaN}', "bare NaN"),
        (jsonl.encode(header()).replace('"schema": 0', '"schema": 99'), "schema 99, but this version reads schema 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            jsonl.decode(line)


def test_reading_names_file_and_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(jsonl.encode(header()) + "\n" + '{"kind": "secant", "step": 1}\n')
    with pytest.raises(UserError, match=r"records\.jsonl, line 2: secant: field 'block' is missing"):
        rundir.load(tmp_path)
    path.write_text(jsonl.encode(secant()) + "\n")
    with pytest.raises(UserError, match="line 1: a file of records starts with its header"):
        rundir.load(tmp_path)


def test_a_line_separator_inside_a_string_does_not_cut_the_line(tmp_path):
    warning = R.Warning("one\u2028two\u0085three")
    with rundir.RunFolder(tmp_path / "run") as run:
        for record in (header(), secant(), warning):
            run.append(record)
    assert rundir.load(tmp_path / "run")[-1] == warning


def test_no_folder_before_the_first_measurement(tmp_path):
    folder = tmp_path / "deep" / "run"
    with rundir.RunFolder(folder) as run:
        run.append(header())
        run.append(R.Preflight("ok", []))
        assert not folder.parent.exists()
        run.append(secant())
        assert [type(r) for r in rundir.load(folder)] == [R.Header, R.Preflight, R.Secant]


def test_a_folder_with_a_run_or_with_other_files_is_refused(tmp_path):
    with rundir.RunFolder(tmp_path / "run") as run:
        run.append(header())
        run.append(secant())
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        rundir.RunFolder(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        rundir.RunFolder(tmp_path / "other")
    with pytest.raises(UserError, match="is a file"):
        rundir.RunFolder(tmp_path / "other" / "thesis.tex")


@pytest.mark.parametrize("lost", [1, 2, 7])
def test_resume_drops_a_line_that_was_cut_short(tmp_path, lost):
    folder = tmp_path / "run"
    with rundir.RunFolder(folder) as run:
        for record in (header(), secant(0), R.Secant(1, "bäse", "random", 1, 1, 1, 1, 1)):
            run.append(record)
    path = folder / rundir.RECORDS
    path.write_bytes(path.read_bytes()[:-lost])
    assert rundir.load(folder) == [header(), secant(0)]
    with rundir.RunFolder(folder, resume=True) as run:
        assert run.done == [header(), secant(0)]
        assert "cut short" in run.dropped
        run.append(header(started="later", host="elsewhere", argv=["x"]))
        run.append(secant(2))
    assert rundir.load(folder) == [header(), secant(0), secant(2)]


def test_a_run_is_whole_once_its_end_says_so(tmp_path):
    assert not rundir.whole(tmp_path)
    path = tmp_path / rundir.RECORDS
    for text, whole in (("", False), ('{"kind": "hea', False), (f"{jsonl.encode(header())}\n", False)):
        path.write_text(text)
        assert rundir.whole(tmp_path) is whole
    path.write_text(f"{jsonl.encode(header())}\n{jsonl.encode(R.End('finished'))}\n")
    assert rundir.whole(tmp_path)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        rundir.whole(tmp_path)


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    wanted = [header(), R.Preflight("ok", []), R.Warning("w"), secant(0), secant(1), R.End("finished")]
    folder = tmp_path / "run"
    with rundir.RunFolder(folder) as run:
        assert all(run.append(r) for r in wanted[:4])
        run.append(R.End("interrupted"))
    with rundir.RunFolder(folder, resume=True) as run:
        assert not rundir.finished(run.done)
        assert [run.append(r) for r in (header(started="later"), *wanted[1:])] == [
            False,
            False,
            False,
            False,
            True,
            True,
        ]
    assert rundir.load(folder) == wanted
    assert rundir.finished(rundir.load(folder))


def test_resume_refuses_another_measurement(tmp_path):
    folder = tmp_path / "run"
    with rundir.RunFolder(folder) as run:
        run.append(header(options={"points": 3}))
        run.append(secant())
    with (
        rundir.RunFolder(folder, resume=True) as run,
        pytest.raises(UserError, match=r"options\.points: 3 then, 4 now"),
    ):
        run.append(header(options={"points": 4}))
    with pytest.raises(UserError, match="holds no run"):
        rundir.RunFolder(tmp_path / "nothing", resume=True)


def test_two_processes_do_not_write_one_folder(tmp_path):
    with rundir.RunFolder(tmp_path / "run") as run:
        run.append(header())
        run.append(secant())
        with pytest.raises(UserError, match="being written by another process"):
            rundir.RunFolder(tmp_path / "run", resume=True)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with rundir.RunFolder(tmp_path / "run") as run:
        run.append(header())
        run.append(secant(0))

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(rundir.os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            run.append(secant(1))
    assert rundir.load(tmp_path / "run") == [header(), secant(0)]


def test_whole_files_appear_complete_or_not_at_all(tmp_path):
    with rundir.RunFolder(tmp_path / "run") as run:
        run.append(header())
        run.append(secant())
        run.write("report.md", lambda path: path.write_text("old"))

        def fail(path):
            path.write_text("half")
            raise RuntimeError("power")

        with pytest.raises(RuntimeError):
            run.write("report.md", fail)
    assert (tmp_path / "run" / "report.md").read_text() == "old"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["records.jsonl", "report.md"]


def test_stable_leaves_out_what_may_differ():
    assert jsonl.stable(header(host="a", started="t", argv=["p"], git="c")) == jsonl.stable(header())
    assert jsonl.stable(header(seed=1)) != jsonl.stable(header())


def test_default_folder_is_short_and_free(tmp_path):
    first = rundir.default_folder("smoothness", "/models/My Model", "data/x.csv", tmp_path)
    assert first.name == "smoothness-My-Model-x.csv"
    first.mkdir()
    assert rundir.latest_folder("smoothness", "org/My Model", "x.csv", tmp_path) == first
    assert rundir.default_folder("smoothness", "org/My Model", "x.csv", tmp_path).name == first.name + "-2"
    assert rundir.latest_folder("smoothness", "other", "x.csv", tmp_path) is None


def test_records_are_read_where_torch_is_not():
    code = "import sys; sys.modules.update(torch=None, transformers=None); import probes.rundir, probes.records"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kind_is_documented():
    text = (__import__("pathlib").Path(__file__).parents[1] / "docs" / "records.md").read_text()
    for kind, cls in R.KINDS.items():
        assert f"`{kind}`" in text
        for f in dataclasses.fields(cls):
            assert f"`{f.name}`" in text, f"docs/records.md does not name {kind}.{f.name}"
