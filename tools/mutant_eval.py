"""Faults planted in evaluation; see `mutants`."""

from __future__ import annotations

from mutant import Mutant, faults

INCEPTION = ("parity/test_inception.py",)
FID = ("closed_form/test_fid.py", "closed_form/test_metrics.py")
FEATURES = ("property/test_features.py",)
PROTOCOL = ("end_to_end/test_protocol.py",)

EVALUATION: tuple[Mutant, ...] = (
    *faults(
        "eval/inception.py",
        INCEPTION,
        ("count_include_pad=False", "count_include_pad=True"),
        ("2048, largest=True", "2048, largest=False"),
        ("(length / size)", "((length - 1) / (size - 1))"),
        ("eps=1e-3", "eps=1e-5"),
        ("features @ self.fc.weight.T", "self.fc(features)"),
    ),
    *faults(
        "eval/networks.py", INCEPTION, ("(resize(x) - 128) / 128", "(resize(x) - 127.5) / 127.5")
    ),
    *faults(
        "eval/fid.py",
        FID,
        ("/ (self.count - 1)", "/ self.count"),
        ("self.shift = x.mean(0)", "self.shift = torch.zeros_like(x[0])"),
    ),
    *faults(
        "eval/metrics.py",
        FID,
        (" - xx.trace()", ""),
        ("statistics.pstdev", "statistics.stdev"),
        ("/ x.shape[1] + 1", "/ x.shape[1]"),
        ("count / (k * len(fake))", "count / len(fake)"),
        ("low // m, low // n", "low // n, low // m"),
    ),
    *faults(
        "eval/neighbours.py",
        FID,
        ("square - error).scatter", "square + error).scatter"),
        ("& (square - error <= reach)", "& (square + error <= reach)"),
        ("square[own, first + own] = torch.inf", "pass"),
        ("all_gaps[first + row] = torch.inf", "pass"),
        ("torch.ldexp(x, -spread)", "x"),
    ),
    *faults(
        "eval/features.py",
        FEATURES,
        (
            "KNOWN.get(features.sha256) if isinstance(features, Published) else None",
            'KNOWN.get(getattr(features, "sha256", ""))',
        ),
        ("x * 127.5 + 128", "x * 127.5 + 127.5"),
    ),
    *faults(
        "eval/features.py",
        INCEPTION,
        ("known is not None and samples == SAMPLES", "known is not None"),
    ),
    *faults(
        "eval/judge.py",
        ("pipelines/test_judge.py",),
        ("if not bool(pictures.isfinite().all())", "if False"),
        (
            "alignment(torch.cat(seen), self.texts)",
            "alignment(torch.cat(seen), self.texts.flip(0))",
        ),
    ),
    *faults("eval/torchscript.py", FEATURES, (".hexdigest() != SHA256", ".hexdigest() == 0")),
    *faults(
        "eval/protocol.py",
        PROTOCOL,
        ("run * self.samples + ends[i],", "ends[i],"),
        ("best = min(", "best = max("),
        ('            "model": self.model,\n', ""),
    ),
    *faults(
        "eval/reference.py",
        ("closed_form/test_reference.py",),
        ("whose != features.name", "False"),
        ("torch.randint(number + 1,", "torch.randint(2 * number,"),
    ),
)
