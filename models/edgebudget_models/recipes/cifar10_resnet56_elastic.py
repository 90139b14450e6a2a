"""Train `cifar10-resnet56-elastic` from teachers' answers (`recipes.cifar_teachers` makes them).

In two rounds, with COMMAND for `python -m edgebudget_models.recipes.cifar10_resnet56_elastic`:

    COMMAND --data DIR --teachers DIR --static 9 --epochs 215 --rate 0.1 --out BODY
    COMMAND --data DIR --teachers DIR --start BODY --out FILE

`--static BLOCKS` trains a plain residual network of that many blocks a stage. The network to
compare with takes both rounds without exits: `--static 9 --start BODY` instead of the second.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from edgebudget_models.cifar import KEPT_BACK
from edgebudget_models.cifar_elastic_net import BLOCKS, TAPS, ElasticResNet, Tap
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_models.recipes.cifar_students import parser, run, started
from edgebudget_models.recipes.distillation import Settings
from edgebudget_models.recipes.ladder_student import Student

# Exits at the last two were trained along, no better than the second, and left out.
TRAINED_TAPS = (*TAPS, Tap(6, 0, 1), Tap(12, 0, 1))
SETTINGS = Settings(epochs=172, batch=250, rate=0.05, decay=5e-4)
WEIGHTS = (0.5, 0.5, 0.5, 0.5, 1.0)
SHARE = 0.3  # of the last exit in the last answer


def student(body: CifarResNet) -> Student:
    """The network around a body, before its exits are trained."""
    net = ElasticResNet(TRAINED_TAPS)
    tensors = {k: v for k, v in body.state_dict().items() if not k.startswith("linear.")}
    net.load_state_dict(tensors, strict=False)
    return Student(net, body.linear)


def finished(trained: nn.Module) -> ElasticResNet:
    """The packaged network: the first exits, and the last answer from body and ladder."""
    assert isinstance(trained, Student)
    tensors = trained.net.state_dict()
    net = ElasticResNet(TAPS)
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    net.to(trained.head.weight.device).join(trained.head, SHARE)
    return net.eval()


def main() -> None:
    """The command line of the recipe."""
    made = parser(__doc__, SETTINGS)
    made.add_argument("--static", type=int, metavar="BLOCKS")
    arguments = made.parse_args()

    def body() -> CifarResNet:
        return started(CifarResNet(arguments.static or BLOCKS), arguments.start)

    if arguments.static is not None:
        run(body, arguments, SETTINGS, KEPT_BACK)
    else:
        settings = replace(SETTINGS, weights=WEIGHTS)
        run(lambda: student(body()), arguments, settings, KEPT_BACK, finish=finished)


if __name__ == "__main__":
    main()
