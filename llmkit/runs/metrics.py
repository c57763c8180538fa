"""The numbers that a run logs: what each is called and how it is written, in one table.

The progress line, the report, the model card and the command line read it. A number that is logged and does not stand
here is in the log all the same, and in the report as a chart of its own.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number of a log.

    Attributes:
        key: in the log.
        name: in tables.
        spec: of its format.
        said: how the progress line says it, with `{}` for the number; nothing where it does not.
        best: which of several runs is the better one, where they can be compared by it.
        chart, curve: the title of its chart in the report, and what its line is called there.
    """

    key: str
    name: str
    spec: str
    said: str = ""
    best: Literal["lowest", "highest"] | None = None
    chart: str = ""
    curve: str = ""

    def write(self, value: float) -> str:
        """The number as people read it."""
        return format(value, self.spec)


# In the order of the progress line, and of the report's figures and charts.
METRICS = {
    metric.key: metric
    for metric in (
        Metric("loss", "training loss", ".4f", "loss {}", chart="Loss", curve="training"),
        Metric("eval_loss", "validation loss", ".4f", "validation loss {}", "lowest", "Loss", "validation"),
        Metric("eval_perplexity", "perplexity", ",.2f", "perplexity {}", "lowest", "Validation perplexity"),
        Metric("eval_bits_per_byte", "bits per byte", ".4f", "{} bits/byte", "lowest", "Validation bits per byte"),
        Metric(
            "hellaswag/acc_norm",
            "HellaSwag acc_norm",
            ".4f",
            "HellaSwag {} (acc_norm)",
            "highest",
            "HellaSwag",
            "acc_norm",
        ),
        Metric("hellaswag/acc", "HellaSwag acc", ".4f", chart="HellaSwag", curve="acc"),
        Metric(
            "eval_preference_accuracy",
            "preference accuracy",
            ".1%",
            "prefers {}",
            "highest",
            "Preference accuracy",
            "the preferred answer is likelier",
        ),
        Metric(
            "eval_preference_accuracy_per_token",
            "preference accuracy per token",
            ".1%",
            chart="Preference accuracy",
            curve="the preferred answer is likelier per token",
        ),
        Metric(
            "eval_rewards/accuracies",
            "reward accuracy",
            ".1%",
            "reward accuracy {}",
            chart="Preference accuracy",
            curve="it has gained more on the reference",
        ),
        Metric("rewards/accuracies", "reward accuracy in training", ".1%", chart="Preference accuracy"),
        Metric("eval_rewards/margins", "reward margin", ".3f", "margin {}", chart="Reward margin", curve="validation"),
        Metric("rewards/margins", "reward margin in training", ".3f", "margin {}", chart="Reward margin"),
        Metric("eval_rewards/chosen", "reward of preferred answers", ".3f", chart="Rewards", curve="preferred"),
        Metric("eval_rewards/rejected", "reward of rejected answers", ".3f", chart="Rewards", curve="rejected"),
        Metric(
            "eval_chosen_change",
            "preferred answers against the reference (nats per token)",
            "+.4f",
            "preferred {} nats/token",
            chart="Against the reference (nats per token)",
            curve="preferred answers",
        ),
        Metric(
            "eval_rejected_change",
            "rejected answers against the reference (nats per token)",
            "+.4f",
            "rejected {}",
            chart="Against the reference (nats per token)",
            curve="rejected answers",
        ),
        Metric("eval_logps/chosen", "log-probability of preferred answers", ".2f", chart="Log-probability of answers"),
        Metric(
            "eval_logps/rejected", "log-probability of rejected answers", ".2f", chart="Log-probability of answers"
        ),
        Metric(
            "eval_answer_tokens", "tokens of an answer", ".1f", "answers of {} tokens", chart="Tokens of an answer"
        ),
        Metric("eval_answers_ended", "answers that end", ".0%", "{} end", chart="Answers that end"),
        Metric("learning_rate", "learning rate", ".2e", "lr {}", chart="Learning rate", curve="learning rate"),
        Metric("lr/muon", "learning rate of Muon's part", ".2e", chart="Learning rate", curve="of Muon's part"),
        Metric("grad_norm", "gradient norm", ".2f", "grad norm {}", chart="Gradient norm"),
        Metric("tokens_per_second", "tokens per second", ",.0f", "{} tok/s", chart="Tokens per second"),
        Metric("trained_tokens", "tokens trained on", ",", "{} trained"),
        Metric("mfu", "MFU", ".1%", "mfu {}", chart="Model FLOPs utilization (MFU)"),
        Metric("mean_token_accuracy", "token accuracy", ".1%", chart="Token accuracy", curve="training"),
        Metric(
            "eval_mean_token_accuracy",
            "validation token accuracy",
            ".1%",
            chart="Token accuracy",
            curve="validation",
        ),
        Metric("entropy", "entropy", ".3f", chart="Entropy", curve="training"),
        Metric("eval_entropy", "validation entropy", ".3f", chart="Entropy", curve="validation"),
        Metric("memory_gib", "peak memory", ".2f", chart="Peak memory (GiB)", curve="main memory"),
        Metric("gpu_memory_gib", "peak GPU memory", ".2f", chart="Peak memory (GiB)", curve="GPU"),
        Metric("cpu_utilization", "CPU utilization", ".0%", chart="Utilization", curve="CPU"),
        Metric("gpu_utilization", "GPU utilization", ".0%", chart="Utilization", curve="GPU"),
    )
}
COMPARED = [metric for metric in METRICS.values() if metric.best]
