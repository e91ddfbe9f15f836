"""The arena: every method on the same teachers, under the same budget, tuned equally often.

    python -m benchmarks.arena mixture --methods SiD,DMD2 --seeds 0-2
    python -m benchmarks.arena digits
    python -m benchmarks.arena page

    entries.py      the methods, and the search space of each family
    scenes.py       teachers and how samples are measured
    budget.py       how many steps the budget of forward passes pays for
    trials.py       one trial: train, score on two draws of noise
    solvers.py      solvers of the teacher, and students that nothing was taught
    baselines.py    their trials
    records.py      trials as files that cannot be mistaken for others
    leaderboard.py  what the trials say, with intervals
    pages.py        docs/arena.md and docs/choosing.md, made of the leaderboard

Rules: the same student and the same budget, in forward passes of the teacher's network, forward
and backward; three trials of tuning for everybody (`entries.SPACES`), compared on validation noise
with seed 0; the best one's settings with all seeds, reported on test noise.
"""
