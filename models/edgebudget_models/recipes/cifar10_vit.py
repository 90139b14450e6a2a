"""Train `cifar10-vit` from teachers' answers (`recipes.cifar_teachers` makes them).

In two rounds, with COMMAND for `python -m edgebudget_models.recipes.cifar10_vit`:

    COMMAND --data DIR --teachers DIR --out FIRST
    COMMAND --data DIR --teachers DIR --start FIRST --epochs 213 --rate 0.001 --out FILE
"""

from __future__ import annotations

from edgebudget_models.cifar import KEPT_BACK
from edgebudget_models.cifar10_vit import build
from edgebudget_models.recipes.cifar_students import parser, run, started
from edgebudget_models.recipes.distillation import Settings

SETTINGS = Settings(epochs=200, batch=500, rate=1.5e-3, decay=0.05, adam=True)


def main() -> None:
    """The command line of the recipe."""
    arguments = parser(__doc__, SETTINGS).parse_args()
    run(lambda: started(build(), arguments.start), arguments, SETTINGS, KEPT_BACK, half=True)


if __name__ == "__main__":
    main()
