"""Read what a run left behind: its settings, its log, its scores, its student.

Run: python examples/read_a_run.py runs/sid    (after: fewstep distill ... --out runs/sid)
"""

import sys
from pathlib import Path

from fewstep import load_student
from fewstep.config import decode
from fewstep.runs.run_folder import RunFolder

folder = RunFolder(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
facts = folder.facts()
method = decode(facts["run"]["method"])
print(f"{facts['recipe']}: {method}")

rows = [row for row in folder.lines("log.jsonl") if "step" in row]
print(f"{rows[-1]['step']} steps, last student loss {rows[-1]['student/loss']:.4g}")
norms = [row["student/grad_norm"] for row in rows if "student/grad_norm" in row]
if norms:
    print(f"gradient norms from {min(norms):.3g} to {max(norms):.3g}")

student = load_student(folder.path)
pictures = student.sample(range(4))
print(f"student: {student.sampler.calls} network call(s), pictures of {tuple(pictures.shape[1:])}")
print(f"first pixels of sample 0: {pictures[0].flatten()[:4].tolist()}")
