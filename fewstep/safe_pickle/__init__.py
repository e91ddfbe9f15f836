"""Snapshots of EDM, EDM2, SiD and SiDA, read as data.

These projects publish networks as Python pickles whose classes travel as source code to be
executed on loading: whoever opens one runs whatever its author wrote. Here such a file is read
without executing anything of it. A pickle machine (`virtual_machine`) knows data only; names of
code become inert records (`records`), of which a short list (`allowed_names`) stands for tensors,
modules and numbers; storages come from nested files or archive members (`storages`); everything is
bounded (`limits`). What remains is a `Snapshot`: class names, constructor arguments, tensors and
digests, from which `fewstep.teachers.edm` and `edm2` rebuild the networks with their own code.

    snapshot = read_snapshot("edm-cifar10-32x32-uncond-vp.pkl")
    ema = snapshot.objects["ema"]
    denoiser = edm.build(ema.init_kwargs, ema.state, class_name=ema.class_name)
"""

from fewstep.safe_pickle.limits import Limits, UnsafeSnapshotError
from fewstep.safe_pickle.snapshot import Snapshot, SnapshotObject, parse_snapshot, read_snapshot

__all__ = [
    "Limits",
    "Snapshot",
    "SnapshotObject",
    "UnsafeSnapshotError",
    "parse_snapshot",
    "read_snapshot",
]
