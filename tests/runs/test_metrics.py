"""One table names the numbers of a log; what reads it agrees with it."""

from llmkit.runs.metrics import COMPARED, METRICS
from llmkit.runs.report.curves import HOW, charts


def test_every_title_that_is_drawn_in_a_way_of_its_own_has_metrics():
    assert HOW.keys() <= {metric.chart for metric in METRICS.values()}


def test_each_metric_with_a_chart_is_drawn_once():
    drawn = [key for spec in charts(set(METRICS)) for key in spec["lines"]]
    assert sorted(drawn) == sorted(METRICS)  # one without a chart in the table gets one of its own
    [loss] = [spec for spec in charts({"loss", "eval_loss"}) if spec["title"] == "Loss"]
    assert loss["lines"] == {"loss": "training", "eval_loss": "validation"} and loss["wide"]


def test_how_numbers_are_written():
    logged = {"loss": 2.34567, "eval_perplexity": 12345.678, "learning_rate": 0.00123, "trained_tokens": 1234567}
    logged |= {"tokens_per_second": 34567.8, "mfu": 0.4567}
    said = [metric.said.format(metric.write(logged[key])) for key, metric in METRICS.items() if key in logged]
    assert said == [
        "loss 2.3457",
        "perplexity 12,345.68",
        "lr 1.23e-03",
        "34,568 tok/s",
        "1,234,567 trained",
        "mfu 45.7%",
    ]


def test_runs_are_compared_by_what_was_held_out():
    assert [metric.key for metric in COMPARED] == [
        "eval_loss",
        "eval_perplexity",
        "eval_bits_per_byte",
        "hellaswag/acc_norm",
        "eval_preference_accuracy",
    ]
