"""A run, described completely: frozen, typed, overridable field by field, stored as JSON.

A `Run` is a frozen dataclass of frozen dataclasses, kept in run.json. Method, model, domain and
number of steps are required; every other field has a default. The docstring of the class is
printed by `--help`, so what it refuses is said at its check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fewstep.diffusion.model import Model
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Method
from fewstep.domains.domain import Domain
from fewstep.nets.lora import LoRA
from fewstep.runs.early_stopping import Best, Spikes
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim
from fewstep.training.power_ema import PowerEMA
from fewstep.training.precision import Held, Precision


@dataclass(frozen=True)
class Run:
    """One training run: what `train` and `distill` execute and `report` shows."""

    method: Method
    """The algorithm and all its settings."""
    model: Model
    """The network; a student is the teacher's network, so `distill` takes it from there."""
    domain: Domain
    """The data, and how samples are measured."""
    steps: int
    """Training steps."""
    batch: int = 128
    """Samples in one update."""
    accumulate: int = 1
    """Equal parts a batch is computed in; more parts, less memory, the same result."""
    optim: Optim = Optim()
    """The optimiser of the result, and of every net without another."""
    fake_optim: Optim | None = None
    """Another optimiser for the nets that serve it, such as the fake score."""
    ema: EMA = EMA()
    """The moving average that becomes the result."""
    power: PowerEMA = PowerEMA()
    """Further averages, stored with each checkpoint, from which 'fewstep ema' makes any other."""
    seed: int = 0
    """Keys every random number of the run."""
    sample_every: int = 100
    """Steps between pictures and gauges."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_every: int = 0
    """Checkpoints of multiples of so many steps are never deleted; 0: the newest two are left."""
    best: Best = Best()
    """Which look's model is kept in the folder best/, and when the run ends early."""
    spikes: Spikes = Spikes()
    """When losses and gradient norms count as having left their usual range."""
    patience: int = 10
    """Non-finite updates in a row that are skipped before the run stops."""
    precision: Precision = "fp32"
    """Precision of matrix products while training; weights and losses stay in float32."""
    frozen: Held = "fp32"
    """Precision of weights that are never trained: the teacher's, with adapters all but these."""
    recompute: bool = False
    """Compute activations again when a gradient needs them: less memory, the same numbers."""
    compile: bool = False
    """Compile the networks by torch.compile, for faster steps after slow first ones."""
    offload: bool = False
    """Keep the teacher in main memory while it is not called; for moments see Optim.offload."""
    lora: LoRA | None = None
    """Adapters that are trained in place of whole networks, such as LoRA(64)."""

    @property
    def distils(self) -> bool:
        """Whether a teacher is distilled, rather than trained."""
        return self.method.output == "student"

    @property
    def last_step(self) -> int:
        """The step the run ends at: `steps`, or earlier where its method is finished."""
        length = self.method.length
        return self.steps if length is None else min(self.steps, length)

    @property
    def result(self) -> Model:
        """The network that is shipped: `model`, unless the method makes another of it."""
        return self.method.result(self.model)

    def optims(self, nets: Iterable[str]) -> dict[str, Optim]:
        """The optimiser of each network called `nets`: `fake_optim` for all but the result."""
        other = self.fake_optim or self.optim
        return {net: self.optim if net == self.method.output else other for net in nets}

    def __post_init__(self) -> None:
        """Raise ValueError for sizes out of range and for settings that exclude each other.

        Sizes below 1, a `batch` that `accumulate` does not divide, a `keep_every` that is no
        multiple of `save_every`, a seed outside 0 .. 2^63 - 1; bf16 frozen weights without a bf16
        distillation, `compile` with `recompute`, LoRA without a teacher or with `offload`, a
        negative prompt unguided.
        """
        for name in ("steps", "batch", "accumulate", "sample_every", "save_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"Run.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ValueError(
                f"Run.keep_every {self.keep_every} is not a multiple of save_every "
                f"{self.save_every}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Run.seed must be 0 to 2^63 - 1, got {self.seed}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"Run.batch {self.batch} is not a multiple of Run.accumulate {self.accumulate}"
            )
        if self.frozen == "bf16" and not (self.distils and self.precision == "bf16"):
            raise ValueError(
                "frozen weights are held in bf16 where a teacher is distilled in --precision "
                f"bf16, and this run {f'is in {self.precision}' if self.distils else 'trains one'}"
            )
        if self.compile and self.recompute:
            raise ValueError(
                "a compiler chooses itself what is kept for a gradient; leave out --compile, or "
                "give --no-recompute"
            )
        if self.lora is not None and not self.distils:
            raise ValueError("LoRA adapts the network of a teacher, and this run trains one")
        unguided = isinstance(getattr(self.method, "guidance", None), Unguided)
        negative: str = getattr(self.domain, "negative", "")
        if unguided and negative:
            raise ValueError(
                f"a negative prompt is what guidance leads away from, and {self.method} has none; "
                "give some, such as --method.guidance 'LSG(4.5)'"
            )
        if self.lora is not None and self.offload:
            raise ValueError("LoRA shares the weights of the teacher; leave out --offload")
