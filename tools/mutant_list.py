"""The faults that `mutants` plants: one line each, plausible, and wrong."""

from __future__ import annotations

from mutant import Mutant, faults
from mutant_engine import ENGINE
from mutant_eval import EVALUATION
from mutant_family import FAMILY

GRADIENTS = ("closed_form/test_gradients.py",)
LOSSES = ("closed_form/test_losses.py",)
PATHS = ("closed_form/test_paths.py",)
TIMES = ("closed_form/test_times.py",)
DRAWS = ("closed_form/test_draws.py",)
SAMPLERS = ("closed_form/test_samplers.py",)
TEACHERS = ("closed_form/test_teachers.py",)
DENOISERS = ("closed_form/test_denoisers.py",)
SOURCE = ("closed_form/test_source.py",)
LOOP = ("closed_form/test_loop.py",)
METHODS = ("property/test_methods.py",)
TOGETHER = ("distributed/test_training.py",)
PRECISION = ("closed_form/test_precision.py",)
CHECKPOINT = ("end_to_end/test_checkpoint.py",)

MUTANTS: tuple[Mutant, ...] = (
    *faults(
        "losses/score.py",
        GRADIENTS,
        ("    delta = real - fake\n", "    delta = (real - fake).detach()\n"),
        ("delta * ((own - x)", "delta * ((own.detach() - x)"),
        ("(1 - alpha) * delta)", "alpha * delta)"),
        ("slope(scale * (fake - real))", "slope(scale * (fake - real)).detach()"),
        ("-weight * scale * slope", "-weight * slope"),
        ("(weight * (fake - real)).detach() * x", "weight * (fake - real) * x"),
    ),
    *faults(
        "losses/score.py",
        LOSSES,
        ("weight * (fake - real)", "weight * (real - fake)"),
        ("flatten(1).mean(1)", "flatten(1).sum(1)"),
        ("weight * (prediction - x0) ** 2", "(weight * (prediction - x0)) ** 2"),
    ),
    *faults(
        "losses/distance.py",
        LOSSES,
        ("return (y**2).flatten(1).sum(1)", "return (y**2).flatten(1).mean(1)"),
        ("y / (squared_norm(y) + self.c**2).sqrt()", "y / (squared_norm(y) + self.c).sqrt()"),
        ("square ** (self.p / 2 - 1)", "square ** (self.p / 2 - 0.5)"),
        (".clamp_min(torch.finfo(y.dtype).tiny)", ""),
        ("y.abs() ** (self.p - 1) * y.sign()", "y.abs() ** (self.p - 1)"),
    ),
    *faults(
        "losses/distance.py",
        GRADIENTS,
        (
            "(squared_norm(y) + self.c**2).sqrt()\n",
            "(squared_norm(y) + self.c**2).sqrt().detach()\n",
        ),
    ),
    *faults(
        "losses/weight.py",
        LOSSES,
        ("alpha**self.a * sigma**self.s", "alpha**self.s * sigma**self.a"),
        ("/ (sigma**2 * sd2)", "/ (sigma**2 + sd2)"),
        ("gap = (x - real).detach()", "gap = x - real"),
        ("itemsize < 4", "itemsize < 1"),
        ("clamp_min(self.floor)", "add(self.floor)"),
    ),
    *faults(
        "path.py",
        PATHS,
        ("/ sigma**2", "/ sigma"),
        ("alpha * d_sigma - sigma * d_alpha", "alpha * d_sigma + sigma * d_alpha"),
        ("(alpha * xt - sigma * v) / (alpha**2 + sigma**2)", "alpha * xt - sigma * v"),
        ("d_alpha * x0 + d_sigma", "d_sigma"),
        ("torch.lerp(left, right, t - low)", "torch.lerp(left, right, low - t)"),
        ("np.log(-np.expm1(log_abar))", "np.log(1 - log_abar)"),
        ("np.linspace(low, high, self.steps) ** 2", "np.linspace(low, high, self.steps)"),
        ("t.ndim != 1 or t.shape[0] != x.shape[0]", "t.ndim != 1"),
        ("same_shape(x0=x0, eps=eps)", "pass"),
        ("return t.log() / 4", "return t.log() / 2"),
        ("t = t.contiguous()", "pass"),
        ("ratio * xt + (alpha_s - ratio * alpha) * x0", "ratio * xt + (alpha_s - ratio) * x0"),
        ("sigma > 0, sigma_s / torch.where(sigma > 0, sigma, 1), 1)", "sigma > 0, sigma_s, 1)"),
        ("self.scale(expand(t, xs)) / 2", "self.scale(expand(s, xs)) / 2"),
        ("alpha_s * sigma / sigma_s - alpha", "alpha_s * sigma / sigma_s - alpha_s"),
        ("(sigma - ratio * sigma_s) * (sigma +", "(sigma - sigma_s) * (sigma +"),
    ),
    *faults(
        "times.py",
        TIMES,
        ("u * (self.tmax / 1000) * (hi - lo)", "u * (hi - lo)"),
        ("ndtri(u)).exp()", "ndtri(u) ** 2).exp()"),
        ("ndtri(u)).sigmoid()", "ndtri(u)).tanh()"),
        ("(u * n).long()", "(u * (n - 1)).long()"),
    ),
    *faults(
        "draws.py",
        DRAWS,
        ("range(10)", "range(9)"),
        ("(0xD2511F53, 0xCD9E8D57)", "(0xCD9E8D57, 0xD2511F53)"),
        (".to(dtype) + 0.5) * 2.0**-23", ".to(dtype)) * 2.0**-23"),
        ("(-2 * u[:, :half].log())", "(-u[:, :half].log())"),
        ("2 * math.pi * u[:, half:]", "2 * math.pi * u[:, :half]"),
        ("zero + low, zero + high", "zero + low, zero"),
        ("{self.seed}:{self.prefix}{purpose}", "{self.seed}:{purpose}"),
        ("* high) >> 32", "* (high - 1)) >> 32"),
    ),
    *faults(
        "sample.py",
        SAMPLERS,
        ("(1 - k / self.steps)", "(1 - k / (self.steps + 1))"),
        ('f"eps{k}"', '"eps"'),
        ("denoiser(x, s, cond), t, s)", "denoiser(x, t, cond), t, s)"),
        ("return denoiser(x, grid[-1], cond)", "return x"),
        ("self.order * (self.steps - 1) + 1", "self.order * self.steps"),
        ("torch.linspace(1, 0,", "torch.linspace(1, 0.01,"),
        ("if self.order == 2:", "if self.order == 1:"),
    ),
    *faults(
        "teachers/gaussian.py",
        TEACHERS,
        ("alpha * self.variances / variance", "self.variances / variance"),
        ("offset**2 / variance + variance.log()", "offset**2 / variance"),
        ("other & (cond[:, None] < count)", "other & (cond[:, None] <= count)"),
        ("(var_s / var_t).sqrt()", "(var_s / var_t)"),
        ("(k1 + 2 * k2 + 2 * k3 + k4)", "(k1 + 2 * k2 + k3 + 2 * k4)"),
        ("* self.variances[cond].sqrt()", "* self.variances[cond]"),
        ("self(xt, t, cond) - xt) / sigma**2", "self(xt, t) - xt) / sigma**2"),
        ("torch.multinomial(p, count", "torch.multinomial(torch.ones_like(p), count"),
    ),
    *faults(
        "denoisers.py",
        DENOISERS,
        ("skip = alpha * self.sigma_data**2", "skip = self.sigma_data**2"),
        ("return xt / (alpha**2", "return xt * (alpha**2"),
        ("self.path.label(t.expand(xt.shape[0]))", "t.expand(xt.shape[0])"),
        ("sigma * self.sigma_data / variance", "sigma / variance"),
    ),
    *faults(
        "model.py",
        DENOISERS,
        ("torch.manual_seed(seed)", "torch.manual_seed(0)"),
        ("EDM(net, self.path, self.sigma_data)", "EDM(net, self.path)"),
    ),
    *faults(
        "data/source.py",
        SOURCE,
        ('f"epoch{epoch}/"', '"epoch"'),
        ('draws.uniform("drop") < self.drop', 'draws.uniform("drop") > self.drop'),
        ("draws.index // size, draws.index % size", "draws.index % size, draws.index % size"),
    ),
    *faults(
        "ema.py",
        LOOP,
        ("(kept, new, 1 - beta)", "(kept, new, beta)"),
        ("min(self.halflife, self.ramp * images)", "max(self.halflife, self.ramp * images)"),
        ("buffer.copy_(other)", "pass"),
    ),
    *faults(
        "optim.py",
        LOOP,
        ("(step + 1) / self.warmup", "step / self.warmup"),
        ("(1 - math.cos(math.pi * left))", "(1 + math.cos(math.pi * left))"),
        ("if self.weight_decay:", "if False:"),
    ),
    *faults(
        "training.py",
        LOOP,
        ("state.drawn += batch", "state.drawn += 1"),
        ("if turn.net == method.output:", "if True:"),
        ("if state.streak >= patience:", "if state.streak > patience:"),
        ('in ("loss", "grad_norm") if', 'in ("loss",) if'),
        ("if config.clip < math.inf:", "if False:"),
        ("if config.clip_value < math.inf:", "if False:"),
        (".train(key == name)", ".train(True)"),
        ('group["lr"] = rate', 'group["lr"] = config.lr'),
        ("optimizer.zero_grad(set_to_none=True)", "pass"),
        ("if state.skipped == skipped:", "if True:"),
        ("state.images += batch", "state.images += 1"),
    ),
    *faults(
        "gradient.py",
        LOOP,
        ("(loss.total * scale / task.parts).backward()", "loss.total.backward()"),
        ("value.detach() / task.parts", "value.detach()"),
    ),
    *faults(
        "training.py",
        METHODS,
        ("teacher.requires_grad_(False).eval()", "teacher.eval()"),
    ),
    *faults(
        "parallel.py",
        TOGETHER,
        ("        values /= size()\n", ""),
        ("rank() * count : (rank() + 1) * count", "0:count"),
        ("dist.all_reduce(present, dist.ReduceOp.MAX)", "pass"),
        ("    if bucket:\n        yield bucket\n", ""),
    ),
    *faults(
        "precision.py",
        PRECISION,
        ("room = self.value > 1", "room = True"),
        ("max(1.0, self.value / 2), 0", "max(1.0, self.value / 2), self.clean"),
        ("2 * self.value, 0", "self.value, 0"),
    ),
    *faults(
        "gradient.py",
        PRECISION,
        ("if scale != 1:", "if False:"),
    ),
    *faults(
        "training.py",
        PRECISION,
        ('"loss" not in bad', '"loss" in bad'),
        ("state.streak += not absorbed", "state.streak += 1"),
    ),
    *faults(
        "checkpoint.py",
        CHECKPOINT,
        ("setattr(state, key, int(facts[key]))", "pass"),
        ("find(folder)[:-keep]", "find(folder)[: -keep - 1]"),
        ("for path in reversed(find(folder)):", "for path in find(folder):"),
    ),
    *faults(
        "fake_score.py",
        LOSSES,
        ("with torch.no_grad():", "with torch.enable_grad():"),
        ("self.weight(x, x, n.alpha, n.sigma)", "self.weight(x, x, n.sigma, n.alpha)"),
        ("guided(net, n.xt,", "guided(net, n.xt.detach(),"),
        ("guided(teacher, n.xt,", "guided(teacher, n.xt.detach(),"),
        ('draws.normal("eps",', 'draws.normal("z",'),
    ),
    *faults(
        "fake_score.py",
        METHODS,
        ("guided(teacher, n.xt, n.t, batch.cond,", "guided(teacher, n.xt, n.t, None,"),
    ),
    *faults("methods/sid.py", LOSSES, ("fake, self.alpha, weight", "fake, 1.0, weight")),
    *faults(
        "methods/sid.py",
        METHODS,
        (
            'return fake, Turn("student", partial(self.student_loss, rollout))',
            'return Turn("student", partial(self.student_loss, rollout)), fake',
        ),
    ),
    *faults(
        "methods/sim.py",
        LOSSES,
        ("scale = self.scale(", "scale = self.weight("),
        ("self.distance, scale, weight", "self.distance, scale"),
    ),
    *faults(
        "methods/diff_instruct.py", LOSSES, ("p.real, p.fake, weight)", "p.fake, p.real, weight)")
    ),
    *faults(
        "methods/diff_instruct.py", METHODS, ("with torch.no_grad():", "with torch.enable_grad():")
    ),
    *faults("methods/pretrain.py", LOSSES, ("self.weight(x0, x0, n.alpha, n.sigma)", "1.0")),
    *faults("methods/pretrain.py", METHODS, ("x0 = need_data(self, batch)", "x0 = batch.z")),
    *ENGINE,
    *EVALUATION,
    *FAMILY,
)
