"""A recorded run in words and tables, and which of many steps are drawn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import noetherflow as nf
from noetherflow.record import names, read_run
from noetherflow.report import curves, readings
from noetherflow.report.charts import thinned
from noetherflow.report.watch_words import layer_rows, number, sentences, symmetry_rows, table
from recorded_runs import WAYS, ordinary, run_of


def words(columns: dict[str, list[float]]) -> str:
    return "\n".join(sentences(run_of(columns)))


def scale(value: float, low: float, high: float) -> dict[str, list[float]]:
    return {"noise/scale": [50.0, value], "noise/scale_low": [40.0, low], "noise/scale_high": [60.0, high]}


def test_the_critical_batch_size_is_said_with_its_interval() -> None:
    text = words(scale(310, 250, 400.4))
    assert text.startswith("At step 1 the noise scale is 310 examples, with the interval 250 to 400. So the critical")
    assert "the critical batch size is about 310 examples" in text
    assert "twice the fewest possible steps, and a doubled batch saves a quarter of the steps" in text
    assert "unbounded" not in text


@pytest.mark.parametrize("high", [math.inf, math.nan])
def test_an_interval_without_an_upper_end_gives_a_lower_bound(high: float) -> None:
    text = words(scale(31_000, 2500, high))
    assert "At step 1 the noise scale is 31,000 examples. Its interval has no upper end: the squared mean" in text
    assert "The critical batch size is at least 2,500 examples." in text
    assert "about 31,000" not in text


@pytest.mark.parametrize("value", [math.inf, math.nan, -5.0])
def test_a_scale_that_is_not_known_is_no_number(value: float) -> None:
    text = words(scale(value, 2500, math.inf))
    assert "At step 1 the noise scale is not known: the squared mean gradient cannot be distinguished from" in text
    assert "Its interval: at least 2,500, unbounded." in text
    assert "critical" not in text
    assert "Its interval: unbounded." in words(scale(value, -3.0, math.inf))


def test_a_scale_without_an_interval_has_none() -> None:
    assert "the noise scale is 310 examples. So the critical" in words({"noise/scale": [3.0, 310.0]})
    band = readings.band(run_of({"noise/scale": [3.0, 310.0]}), "noise/scale")
    assert band is not None
    assert band.unbounded == 0
    assert readings.band(run_of({"loss": [1.0]}), "noise/scale") is None


def test_the_charge_that_moved_most_is_taken_apart() -> None:
    text = "\n".join(sentences(ordinary()))
    # 29/30 of the last factors -1.2, -0.2, 0.8, 1.8, times 2 for s1; their sum is 1.2.
    assert (
        'Of 2 symmetries, the charge that moved most is that of "s1": it changed by +2.32 since step 0, to 6.32.'
        in text
    )
    assert "Of this change, -2.32 by weight decay, -0.387 by gradient noise, +1.55 by mean gradient, " in text
    assert "+3.48 by the optimizer itself." in text
    assert "do not add up" not in text
    assert 'Furthest from equilibrium is "s1": distance 0.38 at step 580, so that its weights typically differ' in text
    assert "by the factor 1.46" in text


def test_parts_that_do_not_add_up_are_said() -> None:
    columns = dict(ordinary().columns)
    columns["charge_mean/s0"] = columns["charge_mean/s0"] * 1.5
    text = "\n".join(sentences(run_of(columns)))
    assert 'The recorded parts do not add up to the change for 1 of the symmetries, among them "s0"' in text


def test_parts_that_began_before_the_record_add_up() -> None:
    """A ledger that runs from step 0, and a record that begins later."""
    columns = {key: values[10:] for key, values in ordinary().columns.items()}
    moved = {symmetry.name: symmetry for symmetry in readings.moved(run_of(columns))}
    assert moved["s1"].change == pytest.approx(2 * 1.2 * 19 / 30, rel=1e-12)
    assert sum(moved["s1"].parts.values()) == pytest.approx(moved["s1"].change, rel=1e-12)


def test_rare_parts_are_shown_where_they_are_not_zero() -> None:
    columns = dict(ordinary().columns)
    count = len(columns["loss"])
    for name in ("s0", "s1"):
        columns |= {f"{kind}/{name}": np.zeros(count) for kind in ("charge_kick", "charge_between")}
        columns[f"charge_change/{name}"] = columns[f"charge/{name}"] - columns[f"charge/{name}"][0]
    # Of s0, what the noise and the mean did was not taken apart.
    columns["charge_kick/s0"] = columns["charge_noise/s0"] + columns["charge_mean/s0"]
    columns["charge_noise/s0"] = columns["charge_mean/s0"] = np.zeros(count)
    run = run_of(columns)
    assert readings.others(run) == ["loss"]
    first, second = readings.moved(run)
    assert list(first.parts) == list(names.PARTS.values())
    assert list(second.parts) == [*names.PARTS.values(), "gradient noise and mean together"]
    assert "do not add up" not in "\n".join(sentences(run))
    parts = next(chart for chart in curves.charts_of(run) if chart.title == "Where the change went")
    assert [len(choice.series) for choice in parts.choices] == [5, 6]
    columns["charge_kick/s0"] = 1.5 * columns["charge_kick/s0"]
    assert "do not add up" in "\n".join(sentences(run_of(columns)))


def test_the_metrics_of_a_meter_are_known_to_the_page(tmp_path: Path) -> None:
    """A recorded training with NoiseScale: every metric has its chart, and the sentences say its estimate."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    pair = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("2.weight", 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    meter = nf.NoiseScale(net, {"pair": pair}, optimizer, every=1)
    record = nf.RunRecord(tmp_path)
    for step in range(12):
        x = torch.randn(16, 4)
        optimizer.zero_grad()
        with meter.step((x, x.sum(1, keepdim=True))):
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        record.append(step, meter.metrics())
    run = read_run(tmp_path)
    assert readings.others(run) == []
    assert {"noise/scale", "noise/scale_preconditioned", "charge/pair"} <= set(run.columns)
    assert set(readings.layers(run)) >= {"0", "2"}
    text = "\n".join(sentences(run))
    assert f"At step 11 the noise scale is {number(meter.estimate.scale)} examples" in text
    assert [row["layer"] for row in layer_rows(run)] == readings.layers(run)
    assert [chart.title for chart in curves.charts_of(run)] == ["Noise scale", "Gradient and noise", "Charges"]


def test_the_table_on_a_terminal_has_the_last_values() -> None:
    run = ordinary(symmetries=9)
    cells = {row[0]: row[1:] for row in table(run).rows}
    last = float(run.columns["noise/scale"][-1])
    assert cells["noise scale"] == (f"{last:.3g}", f"at least {last * 0.6:.3g}, unbounded", "580")
    assert cells["Tr Sigma"][0] == f"{3 + math.cos(29):.4g}"
    assert [name for name in cells if name.startswith("charge")] == [f"charge of s{k}" for k in (8, 7, 6, 5, 4)]
    assert [name for name in cells if name.startswith("distance")] == [f"distance of s{k}" for k in (8, 7, 6, 5, 4)]


def test_the_rows_of_layers_and_symmetries() -> None:
    run = ordinary()
    last = float(run.columns["noise/scale"][-1])
    first, second = layer_rows(run)
    assert first["layer"] == "layer.0"
    assert first["noise scale"] == f"{float(f'{2 * last:.3g}'):,.0f} ({last:.0f} to {float(f'{3 * last:.3g}'):,.0f})"
    assert (second["layer"], second["step"], second["Tr Sigma"], second["|G|²"]) == ("layer.1", "580", "30", "–")
    rows = symmetry_rows(run)
    assert [row["symmetry"] for row in rows] == ["s1", "s0"]
    assert rows[1]["distance"] == f"{0.5 * math.exp(-29 / 30):.3g}"
    assert rows[1]["by the optimizer itself"] == f"{1.8 * 29 / 30:+.3g}"
    # A distance without a charge has a row, too.
    assert symmetry_rows(run_of({"distance/d": [0.1, 0.2]}))[0]["distance"] == "0.2"


def test_a_record_of_a_single_step_has_words() -> None:
    text = words({"noise/scale": [3.0], "charge/a": [1.0], "distance/a": [0.5], "noise/trace": [math.nan]})
    assert "1 recorded step, from 0 to 0." in text
    assert 'The charge of "a": it changed by +0 since step 0, to 1.' in text


def test_thinning_keeps_ends_and_extremes() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=50_000).cumsum()
    other = generator.normal(size=50_000)
    other[[17, 31_234]] = 99, -99
    places = thinned([values, other], 600)
    assert len(places) <= 602
    assert (places[0], places[-1]) == (0, 49_999)
    assert (np.diff(places) > 0).all()
    assert {17, 31_234, int(values.argmin()), int(values.argmax())} <= set(places.tolist())
    # The twin: every 100th step loses both spikes.
    assert not {17, 31_234} & set(range(0, 50_000, 100))
    assert thinned([values[:600]], 600).tolist() == list(range(600))


def test_thinning_keeps_long_gaps_and_no_short_gap() -> None:
    values = np.ones(10_000)
    values[[3, 777]] = np.nan
    values[4000:5000] = np.nan
    kept = values[thinned([values], 200)]
    assert 5 < np.isnan(kept).sum() < 15
    starts = np.flatnonzero(np.diff(np.isnan(kept).astype(int)) == 1)
    assert len(starts) == 1


def test_curves_are_those_that_were_recorded() -> None:
    run = ordinary(symmetries=9)
    charts = {chart.title: chart for chart in curves.charts_of(run)}
    assert list(charts) == [
        "Noise scale",
        "Gradient and noise",
        "Charges",
        "Where the change went",
        "Distance to equilibrium",
        "loss",
    ]
    assert [choice.label for choice in charts["Noise scale"].choices] == ["all parameters", "layer.0", "layer.1"]
    together, *single = charts["Charges"].choices
    assert together.label == "moved most: 6 of 9"
    assert [series.label for series in together.series] == [f"s{k}" for k in (8, 7, 6, 5, 4, 3)]
    assert [choice.label for choice in single] == [f"s{k}" for k in range(8, -1, -1)]
    for choice in charts["Where the change went"].choices:
        change, *parts = (series.values for series in choice.series)
        assert len(parts) == len(WAYS)
        np.testing.assert_allclose(change, sum(parts), atol=1e-12)
        np.testing.assert_array_equal(
            change, run.columns[f"charge/{choice.label}"] - run.columns[f"charge/{choice.label}"][0]
        )
    negative = int((run.columns["grad/norm_sq_unbiased"] <= 0).sum())
    assert negative > 0
    assert charts["Gradient and noise"].choices[0].note.startswith(f"{negative} values of zero or less are not drawn")


def test_many_plain_metrics_share_a_chart() -> None:
    charts = curves.charts_of(run_of({f"metric {k}": [1.0, float(k)] for k in range(30)} | {"never": [math.nan] * 2}))
    assert [chart.title for chart in charts] == [*(f"metric {k}" for k in range(8)), "Further metrics"]
    assert [choice.label for choice in charts[-1].choices] == [f"metric {k}" for k in range(8, 30)]
