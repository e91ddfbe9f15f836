"""Faults of what the score-identity family shares: guidance, critic, rollouts, starts."""

from __future__ import annotations

from mutant import Mutant, faults

GUIDANCE = ("closed_form/test_guidance.py",)
GUIDED = ("closed_form/test_guided_gradients.py",)
ROLLOUTS = ("closed_form/test_rollouts.py",)
ADVERSARIAL = ("closed_form/test_adversarial.py",)
SIDA = ("closed_form/test_sida.py",)
START = ("closed_form/test_start.py",)
DMD2 = ("closed_form/test_dmd2.py",)
HEAD = ("closed_form/test_head.py", "closed_form/test_head_runs.py")

FAMILY: tuple[Mutant, ...] = (
    *faults(
        "head.py",
        HEAD,
        ("while max(sides) > 4:", "while max(sides) > 2:"),
        ("channels >= 4 * n", "channels >= n"),
        (".mT.flatten(0, 1)", ".flatten(0, 1)"),
        ("torch.manual_seed(0)", "pass"),
        ("mean(1, keepdim=True)", "sum(1, keepdim=True)"),
        ("return out, self.head(features)", "return out, self.head(features.detach())"),
    ),
    *faults(
        "critic.py",
        HEAD,
        ('nets["fake"] = Headed(nets["fake"])', "pass"),
    ),
    *faults(
        "methods/dmd2.py",
        DMD2,
        ("kl(x, p.real, p.fake, weight)", "kl(x, p.fake, p.real, weight)"),
        ("self.weight(x, p.real,", "self.weight(x, p.fake,"),
        ('need_draws(batch).under("gan")', "need_draws(batch)"),
        ("cond = None if is_zero", "cond = batch.cond if is_zero"),
        ("self.gan * fooling", "fooling"),
        ("(critic,) * self.ratio", "(critic,)"),
    ),
    *faults(
        "methods/diff_instruct.py",
        DMD2,
        ("(fake,) * self.ratio", "(fake,)"),
    ),
    *faults(
        "guidance.py",
        GUIDANCE,
        (
            "return free + kappa * (conditional - free)",
            "return conditional + kappa * (free - conditional)",
        ),
        (
            "return Scales(self.kappa, self.kappa, self.kappa, 1.0)",
            "return Scales(self.kappa, self.kappa, self.kappa, self.kappa)",
        ),
        (
            "Scales(self.fake_loss, self.fake, self.own,",
            "Scales(self.fake_loss, self.own, self.fake,",
        ),
        ("return Scales(0.0, 0.0, 0.0, 1.0)", "return Scales(1.0, 0.0, 0.0, 1.0)"),
        ('uniform("fake/drop") < self.drop', 'uniform("fake/drop") > self.drop'),
        ("or all(is_zero(k) for k in ours)", ""),
        (
            "ours = kappas.fake_loss, kappas.fake, kappas.own",
            "ours = kappas.fake_loss, kappas.fake, kappas.fake",
        ),
        (
            "torch.where(dropped, torch.zeros_like(kappa), kappa)",
            "torch.where(dropped, torch.ones_like(kappa), kappa)",
        ),
        (
            "(first if alone else net)(xt, t, None, *more)",
            "(first if alone else net)(xt, t, cond, *more)",
        ),
        (
            "if not all(is_one(kappa) for kappa in kappas):\n        alone",
            "if True:\n        alone",
        ),
        (
            'self.low) * need_draws(batch).uniform("kappa")',
            'self.low) * need_draws(batch).uniform("t")',
        ),
        ("if cond is None and not all", "if False and not all"),
    ),
    *faults(
        "guidance.py",
        GUIDED,
        (
            "return free + kappa * (conditional - free)",
            "return free + kappa * (conditional - free.detach())",
        ),
    ),
    *faults(
        "critic.py",
        ADVERSARIAL,
        ("real = noised(teacher.path, x0,", "real = noised(teacher.path, x0.flip(0),"),
        ("self.scale / x[0].numel()", "self.scale"),
        ("judging = self.judging(", "judging = self.weight("),
        ("discriminator(on_real, on_fake)", "discriminator(on_fake, on_real)"),
        ("encode(real.xt, real.t, cond, *", "encode(fake.xt, real.t, cond, *"),
        ("(on_fake < 0)", "(on_fake > 0)"),
    ),
    *faults(
        "critic.py",
        GUIDANCE,
        ("cond = None if is_zero(kappa) else batch.cond", "cond = batch.cond"),
        ("kappa = guidance.learning(batch)", "kappa = guidance.scales(batch).fake_loss"),
    ),
    *faults(
        "losses/adversarial.py",
        ADVERSARIAL,
        ("F.softplus(-real) + F.softplus(fake)", "F.softplus(real) + F.softplus(-fake)"),
        ("F.softplus(fake)) / 2", "F.softplus(fake))"),
        ("F.softplus(-fake.clamp(-bound, bound))", "F.softplus(-fake)"),
        ('loss.mean() if average == "batch"', 'loss.mean() if average == "sample"'),
        ("flat.mean(2) if", "flat.mean(1) if"),
        ("features.float() if features.dtype.itemsize < 4 else", ""),
    ),
    *faults(
        "methods/sida.py",
        ADVERSARIAL,
        ("weight = self.gan_weight(x,", "weight = self.weight(x.flip(0),"),
        ("self.share * self.gan * adversarial", "self.gan * adversarial"),
        ("logits(p.features, self.fake.pool)", "logits(p.features.detach(), self.fake.pool)"),
    ),
    *faults(
        "methods/sida.py",
        SIDA,
        ("if step < self.student_from:", "if step <= self.student_from:"),
        ("step >= self.adversarial_from", "step > self.adversarial_from"),
        ("(1 - self.share) * score", "score"),
    ),
    *faults(
        "sample.py",
        ROLLOUTS,
        (
            "with torch.no_grad():\n            for call",
            "with torch.enable_grad():\n            for call",
        ),
        ("self._input(k - 1, denoiser", "self._input(k % self.steps, denoiser"),
        ("torch.full_like(t, ladder[k - 1])", "torch.full_like(t, ladder[0])"),
        ('if self.noise == "ddim":', 'if self.noise == "fixed":'),
        ('if self.noise == "fresh":', "if False:"),
        ("** self.rho", "** (1 / self.rho)"),
        ("self.t_init > path.t_max or", "False or"),
        ("self.steps > self.t_init)", "self.steps >= self.t_init)"),
    ),
    *faults(
        "fake_score.py",
        ROLLOUTS,
        ("torch.tensor([step])).integers", "torch.tensor([step // 2])).integers"),
        ("1 + int(k)", "sampler.calls - int(k) // 2"),
        ('if matching == "final" or', 'if matching == "uniform" or'),
        ("return cls(sampler, sampler.calls)", "return cls(sampler, 1)"),
        ("self.sampler.part(self.k, student", "self.sampler.part(self.sampler.calls, student"),
    ),
    *faults(
        "fake_score.py",
        GUIDANCE,
        ("[kappas.fake, kappas.own]", "[kappas.own, kappas.fake]"),
        ("batch.cond, [kappas.real])", "batch.cond, [kappas.fake])"),
        ("kappas = [guidance.learning(batch)]", "kappas = [guidance.scales(batch).fake_loss]"),
    ),
    *faults(
        "core.py",
        START,
        ("_alike(teacher, net) else net", "_alike(teacher, net) else teacher"),
        ('{"student": deepcopy(net),', '{"student": deepcopy(fake),'),
        ("type(a) is type(b) and", ""),
        ("shapes[0] == shapes[1] and", ""),
    ),
    *faults(
        "nets/mlp.py",
        SIDA,
        ("self.blocks[self.middle :]", "self.blocks[self.middle + 1 :]"),
        ("self.middle = (blocks + 1) // 2", "self.middle = blocks // 2"),
    ),
    *faults(
        "denoisers.py",
        SIDA,
        (
            "tapped(self.net).encode(*self.inputs(xt, t, cond))",
            "tapped(self.net).encode(*self.inputs(xt, t, None))",
        ),
    ),
    *faults(
        "methods/sida.py",
        ("property/test_methods.py",),
        ("needs_data: ClassVar[bool] = True", "needs_data: ClassVar[bool] = False"),
    ),
)
