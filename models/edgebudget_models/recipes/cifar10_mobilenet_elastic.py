"""Train `cifar10-mobilenet-elastic` from teachers' answers (`recipes.cifar_teachers` makes them).

In two rounds, with COMMAND for `python -m edgebudget_models.recipes.cifar10_mobilenet_elastic`:

    COMMAND --data DIR --teachers DIR --static --rate 0.2 --out BODY
    COMMAND --data DIR --teachers DIR --start BODY --out FILE

`--static` trains the body alone. The network to compare with takes both rounds without exits:
`--static --start BODY` instead of the second. `--taps` moves the exits.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from torch import nn

from edgebudget_models.cifar import KEPT_BACK
from edgebudget_models.cifar_mobilenet_net import TAPS, CifarMobileNet, ElasticMobileNet
from edgebudget_models.recipes.cifar_students import parser, run, started
from edgebudget_models.recipes.distillation import Settings
from edgebudget_models.recipes.ladder_student import Student

SETTINGS = Settings(epochs=200, batch=250, rate=0.1, decay=2e-4)
SHARE = 0.3  # of the last exit in the last answer


def student(body: CifarMobileNet, taps: tuple[int, ...] = TAPS) -> Student:
    """The network around a body, before its exits are trained."""
    net = ElasticMobileNet(taps)
    net.features.load_state_dict(body.features.state_dict())
    return Student(net, body.linear)


def finished(trained: nn.Module) -> ElasticMobileNet:
    """The packaged network: the last answer from body and ladder."""
    assert isinstance(trained, Student)
    assert isinstance(trained.net, ElasticMobileNet)
    trained.net.join(trained.head, SHARE)
    return trained.net.eval()


def main() -> None:
    """The command line of the recipe."""
    made = parser(__doc__, SETTINGS)
    made.add_argument("--static", action="store_true", help="the body alone")
    made.add_argument("--taps", type=_taps, default=TAPS, help="exits after these parts")
    arguments = made.parse_args()

    def body() -> CifarMobileNet:
        return started(CifarMobileNet(), arguments.start)

    if arguments.static:
        run(body, arguments, SETTINGS, KEPT_BACK)
        return
    weights = (*(0.5 for _ in arguments.taps), 1.0)
    run(
        lambda: student(body(), arguments.taps),
        arguments,
        replace(SETTINGS, weights=weights),
        KEPT_BACK,
        finish=finished,
    )


def _taps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from None


if __name__ == "__main__":
    main()
