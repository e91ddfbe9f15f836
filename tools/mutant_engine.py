"""Faults in what a run does beside learning: rules, adapters, and what saves memory."""

from __future__ import annotations

from mutant import Mutant, faults

RULES = ("property/test_rules.py",)
LORA = ("closed_form/test_lora.py",)
RECOMPUTE = ("property/test_recompute.py",)
OFFLOAD = ("property/test_offload.py",)
HELD = ("end_to_end/test_held.py",)

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
        ('_now["again"] = _now["again"], True', '_now["again"] = _now["again"], False'),
        ("            self.before = before\n", "            pass\n"),
        ("if not all(map(torch.equal, before", "if all(map(torch.equal, before"),
    ),
    *faults(
        "offload.py",
        OFFLOAD,
        ("            self.net.to(REST)\n", "            pass\n"),
        ("parameter.device if wanted else REST", "parameter.device"),
        ("        if not self.awake:\n", "        if self.awake:\n"),
    ),
    *faults(
        "adam8.py",
        ("closed_form/test_adam8.py",),
        ('state["step"] += 1', 'state["step"] += 2'),
        ("for signed in (True, False)]", "for signed in (True, True)]"),
        ("p.numel() < SMALLEST", "p.numel() > SMALLEST"),
    ),
    *faults(
        "adam8.py",
        ("end_to_end/test_adam8.py",),
        ("t.to(p.device) if t.ndim", "t.to(p) if t.ndim"),
        ("    refuse_missing()\n", "    pass\n"),
    ),
    *faults(
        "precision.py",
        ("closed_form/test_held.py",),
        ("layer.forward = partial(_held, layer)", "pass"),
        ("layer.weight.data.to(torch.bfloat16)", "layer.weight.data.to(torch.float16)"),
    ),
    *faults("session.py", HELD, ('if run.frozen == "bf16":', 'if run.frozen == "fp32":')),
    *faults(
        "runner.py",
        HELD,
        ('self.run.frozen == "bf16" and self.run.lora is None', "self.run.lora is None"),
        ('    if run.frozen == "bf16":\n        hold', "    if True:\n        hold"),
    ),
    *faults(
        "plan/choices.py",
        ("plan/test_choices.py",),
        ("chosen.lora, chosen.bits == 8, row.seconds", "chosen.lora, row.seconds"),
        ("if bits == 32 or not lora", "if True"),
    ),
)
