"""What a forecast says in words: the slope of the loss as a reason, each reason once, errors that are too large."""

from noetherflow.equilibrium import Status
from noetherflow.forecasting.estimate import Change, Estimate, change_of, unknown
from noetherflow.forecasting.learning import Learning
from noetherflow.forecasting.said import ending, once, too_wide
from noetherflow.forecasting.schedule import Need, Warmup
from noetherflow.report import forecast_words
from some_forecasts import ordinary


def test_the_reason_of_a_model_that_learns_is_the_slope_of_its_loss_and_what_to_do() -> None:
    trace, orbit = Estimate(5.378, 39.0), -1.47
    falling = Learning(64.0, Estimate(-2e-4, 0.0, 5e-5), -0.1, trace, orbit)
    assert falling.dominates
    assert falling.reason == (
        "the loss still falls, by 0.0002 +- 5e-05 per step: train on, and ask for another forecast when the loss "
        "has stopped falling"
    )
    assert str(falling).startswith("the loss falls by 0.0002 +- 5e-05 per step; within 64 steps, learning alone")
    # The twin: a loss of which no fall is known, beside a change of Tr H beyond two errors.
    turning = Learning(64.0, Estimate(-2e-4, 0.0, 5e-4), -0.1, Estimate(9.0, 0.1, 4.0), orbit)
    assert turning.dominates
    assert "loss still falls" not in turning.reason
    assert turning.reason == f"the model still learns ({turning}): train on, and ask for another forecast"
    assert str(turning).startswith("within 64 steps")


def test_an_error_beyond_its_number_names_what_makes_it_smaller() -> None:
    known = change_of(Estimate(136.7, 17.0), Estimate(33.16, 59.0, 11.0))
    assert too_wide([("Tr H", known)]) == [
        "the error of Tr H at the equilibrium exceeds the number: more random vectors (vectors=...) make it smaller"
    ]
    assert "more batches" in too_wide([("Tr H", change_of(Estimate(1.0, 0.0, 2.0), Estimate(3.0)))])[0]
    # The twin: an error below its number, and none.
    assert not too_wide(
        [("Tr H", change_of(Estimate(136.7, 17.0), Estimate(-33.16, 30.0))), ("x", Change(*[unknown("why")] * 3))]
    )


def test_a_reason_stands_once() -> None:
    reasons = ["long reason", "reason"]
    assert once(["a: long reason", "b: long reason", "c: reason"], reasons) == [
        "a: long reason",
        "b: see above",
        "c: reason",
    ]
    assert once(["a: reason", "b: long reason"], reasons) == ["a: reason", "b: long reason"]
    assert once(["a: long reason", "plain"], reasons, given=True) == ["a: see above", "plain"]


def test_the_page_says_how_the_search_ended_in_words_of_the_reader() -> None:
    texts = forecast_words.sentences(ordinary())
    assert texts[-1] == "The equilibrium was reached: noise and weight decay balance along every symmetry."
    # The twin: a search that ended elsewhere does not say so.
    for status in Status:
        assert ("was reached" in ending(status)) == (status is Status.CONVERGED)
    stopped = forecast_words.sentences(ordinary(status=Status.NOT_CONVERGED))
    assert stopped[-1] == "The iteration stopped before every drift was zero."


def test_a_warmup_of_a_single_learning_rate_has_no_length() -> None:
    constant = ordinary(warmup=Warmup(Need.WARMUP, ((0, 0.0123),), "the way in time is not known"))
    text = next(text for text in forecast_words.sentences(constant) if text.startswith("A warmup is needed"))
    assert text.endswith("(the way in time is not known). The learning rate of the warmup is 0.0123.")
    assert any("The warmup takes 1,000 steps." in text for text in forecast_words.sentences(ordinary()))
