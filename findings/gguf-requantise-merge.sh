#!/usr/bin/env bash
# GGUF: a LoRA merged into a base that came from a 4-bit file is undone by quantising to the same
# type again.
#
# Expected: the same type as the base's file is the natural and the gentlest choice: nothing new is
#           lost.
# Happens:  the base's weights lie exactly on that type's grid, and an update smaller than half a
#           step of it is rounded back to where it was; what differs is little more than the blocks'
#           scales. Another grid keeps most of the update on average, also a coarser one (Q4_0 for a
#           base from Q4_1), since its rounding errors hardly depend on the update, though they are
#           far larger than it. Q8_0 keeps it with little noise.
# Matters:  personal updates are small (1 to 3 % of a weight's size). A person's model exported like
#           this answers as the base does, every tool reports success, and a check by file size or
#           by sane text passes. Ship Q8_0 or the LoRA beside the base, and compare the export with
#           the merged model, not with the base.
#
# Seen 2026-11 with gguf 0.19.0, numpy 2.4.6; random base, low-rank update of 1.4 % of its norm:
#   base from Q4_0, merged and written as Q4_0:   3% of the update is left, error 1.1 x the update
#   base from Q4_0, merged and written as Q4_1:  78% of the update is left, error 4.6 x the update
#   base from Q4_0, merged and written as Q8_0: 100% of the update is left, error 0.4 x the update
#   base from Q4_1, merged and written as Q4_0:  89% of the update is left, error 6.0 x the update
#   base from Q4_1, merged and written as Q4_1:   6% of the update is left, error 1.2 x the update
#   base from Q4_1, merged and written as Q8_0: 100% of the update is left, error 0.4 x the update
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cd "$folder"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize


def through(weights, kind):
    """Return the weights as they are after a file of this type."""
    return dequantize(quantize(weights, kind), kind)


print("gguf", version("gguf"), "numpy", np.__version__)
random = np.random.default_rng(0)
weights = random.standard_normal((512, 512)).astype(np.float32) * 0.05
update = (random.standard_normal((512, 16)) @ random.standard_normal((16, 512))).astype(np.float32)
update *= 0.014 * np.linalg.norm(weights) / np.linalg.norm(update)

kept = {}
for source in (Type.Q4_0, Type.Q4_1):
    base = through(weights, source)
    for target in (Type.Q4_0, Type.Q4_1, Type.Q8_0):
        left = through(base + update, target) - base
        share = float((left * update).sum() / (update**2).sum())
        error = float(np.linalg.norm(left - update) / np.linalg.norm(update))
        kept[source, target] = share
        print(
            f"base from {source.name}, merged and written as {target.name}: "
            f"{share:4.0%} of the update is left, error {error:.1f} x the update"
        )

as_expected = (
    kept[Type.Q4_0, Type.Q4_0] < 0.15
    and kept[Type.Q4_1, Type.Q4_1] < 0.15
    and kept[Type.Q4_1, Type.Q4_0] > 0.7
    and kept[Type.Q4_0, Type.Q4_1] > 0.6
    and all(kept[source, Type.Q8_0] > 0.95 for source in (Type.Q4_0, Type.Q4_1))
)
sys.exit(0 if as_expected else "gguf behaves otherwise now")
PY
