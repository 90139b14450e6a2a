"""Train `mobilenet-v2`: at 128 pixels first, which is cheaper, then at its own 224.

`python -m edgebudget_models.recipes.mobilenet_v2 --data DIR --out FILE`
"""

from __future__ import annotations

from edgebudget_models.mobilenet_v2 import ENTRY
from edgebudget_models.recipes.picture_training import Settings, run

SETTINGS = Settings(epochs=95, sizes=((0.7, 128), (1.0, 224)), rate=0.2, decay=1e-4, smoothing=0.1)

if __name__ == "__main__":
    run(ENTRY, SETTINGS, __doc__)
