"""Digits without the command line: train a teacher, distil it, measure both, draw a grid.

A fifth of the demo's training, so that it takes less than a minute; the grids are teacher.png and
student.png in the present folder.
Run: python examples/digits_in_python.py
"""

from dataclasses import replace

import torch
from torch import nn

from fewstep import Generator, Heun, train
from fewstep.data.image_grid import grid
from fewstep.eval.domain_scores import evaluate
from fewstep.recipes.digits import digits, digits_teacher
from fewstep.runs.run import Run

torch.manual_seed(0)
torch.set_num_threads(1)  # on networks this small, two wait more than they compute


def trained(run: Run, teacher: nn.Module | None, net: nn.Module) -> nn.Module:
    """The averaged network at the end of a run, which is not written anywhere."""
    source = run.domain.source(run.model, data_free=not run.method.needs_data)
    settings = {"batch": run.batch, "steps": run.steps, "ema": run.ema, "optim": run.optim}
    for record in train(run.method, teacher, net, source, **settings):
        if record.step % (run.steps // 4) == 0:
            print(f"{type(run.method).__name__} step {record.step} of {run.steps}")
    return record.state.average


teaching, distilling = replace(digits_teacher(), steps=1500), replace(digits(), steps=300)
teacher = trained(teaching, None, teaching.model.build(seed=0))
student = trained(distilling, teacher, teacher)

measures = distilling.domain.sample_metrics()
for name, net, sampler in (
    ("teacher", teacher, Heun()),
    ("student", student, distilling.method.sampler),
):
    generator = Generator(net, sampler, distilling.model.shape, distilling.model.classes)
    *_, scores = evaluate(generator, measures, samples=2000, draws=1)
    print(f"{name}: {sampler.calls} network call(s), fd_digits {scores['fd_digits']:.2f}")
    grid(generator.sample(range(64))).save(f"{name}.png")
