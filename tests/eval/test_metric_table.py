"""What the table says of a metric is what the scores are."""

from __future__ import annotations

import torch

from fewstep.eval.domain_scores import SampleMetrics, score
from fewstep.eval.metric_table import DISTANCE, METRICS, metric
from fewstep.runs.early_stopping import Best


def test_every_score_is_in_the_table_and_goes_the_way_it_says() -> None:
    """Copies of the data against noise: each that has a good way is better for the copies."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 6, generator=generator)
    held = torch.randn(100, 6, generator=generator)
    labels = (real[:, 0] > 0).long()

    def features(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, (x[:, 0] > 0).long()

    metrics = SampleMetrics("fd_here", real, held, labels[:100], features, float("inf"))
    good = score(real + 0.1 * torch.randn(300, 6, generator=generator), labels, metrics)
    bad = score(3 + 0.2 * torch.randn(300, 6, generator=generator), labels, metrics)
    assert len(good) >= 7
    for name in good:
        way = metric(name, "fd_here").better
        assert name in METRICS or name == "fd_here"
        if way:
            assert (good[name] > bad[name]) == (way == "higher"), name


def test_early_stopping_reads_it() -> None:
    for name in METRICS:
        assert Best(f"quick.{name}").sign == (1 if metric(name).better == "higher" else -1)
    assert Best("quick.fd_digits").sign == -1
    assert metric("fd_digits", "fd_digits") == DISTANCE
    assert metric("something").meaning == ""
