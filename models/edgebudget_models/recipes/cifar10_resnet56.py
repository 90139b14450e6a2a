"""Train `cifar10-resnet56`.

`python -m edgebudget_models.recipes.cifar10_resnet56 --data DIR --out FILE`
"""

from __future__ import annotations

from edgebudget_models.cifar10_resnet56 import ENTRY
from edgebudget_models.recipes.picture_training import Settings, run

SETTINGS = Settings(epochs=90, sizes=((1.0, 32),))

if __name__ == "__main__":
    run(ENTRY, SETTINGS, __doc__)
