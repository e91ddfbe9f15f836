"""Faults in what a run does beside learning: rules, adapters, recomputation, offloading."""

from __future__ import annotations

from mutant import Mutant, faults

RULES = ("property/test_rules.py",)
LORA = ("closed_form/test_lora.py",)
RECOMPUTE = ("property/test_recompute.py",)
OFFLOAD = ("property/test_offload.py",)

ENGINE: tuple[Mutant, ...] = (
    *faults(
        "rules.py",
        RULES,
        ("self.sign * (value - before[0]) > 0", "value < before[0]"),
        ("and large) else -1", "and not large) else -1"),
        ("before[2] + 1] if before", "before[2]] if before"),
        ("best[2] >= self.patience", "best[2] > self.patience"),
        ("math.isfinite(value) and (", "("),
    ),
    *faults(
        "lora.py",
        LORA,
        ("self.alpha / self.rank", "self.alpha"),
        ("change = self.scale * (up", "change = (up"),
        ("alpha=self.scale)", "alpha=1.0)"),
        ("torch.zeros(weight.shape[0], rank", "torch.ones(weight.shape[0], rank"),
        ("                module._parameters.pop(name, None)\n", ""),
        ("        return self\n\n\ndef _share", "        return self.clone()\n\n\ndef _share"),
    ),
    *faults(
        "nets/recompute.py",
        RECOMPUTE,
        ("return checkpoint(call, *args,", "return call(*args) or checkpoint(call, *args,"),
        ("return nullcontext(), _repeating()", "return nullcontext(), nullcontext()"),
    ),
    *faults(
        "offload.py",
        OFFLOAD,
        ("            self.net.to(REST)\n", "            pass\n"),
        ("parameter.device if wanted else REST", "parameter.device"),
        ("        if not self.awake:\n", "        if self.awake:\n"),
    ),
)
