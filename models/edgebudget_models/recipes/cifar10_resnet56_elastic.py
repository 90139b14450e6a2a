"""Train `cifar10-resnet56-elastic` from teachers' answers (`recipes.cifar_teachers` makes them).

In two rounds, with COMMAND for `python -m edgebudget_models.recipes.cifar10_resnet56_elastic`:

    COMMAND --data DIR --teachers DIR --static 9 --epochs 215 --rate 0.1 --out BODY
    COMMAND --data DIR --teachers DIR --start BODY --out FILE

`--static BLOCKS` trains a plain residual network of that many blocks a stage. The network to
compare with takes both rounds without exits: `--static 9 --start BODY` instead of the second.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from edgebudget_models.cifar10_resnet56_elastic import KEPT_BACK
from edgebudget_models.cifar_elastic_net import BLOCKS, TAPS, ElasticResNet, Tap
from edgebudget_models.cifar_resnet_net import CifarResNet
from edgebudget_models.recipes.cifar_students import parser, run, started
from edgebudget_models.recipes.distillation import Settings

# Exits at the last two were trained along, no better than the second, and left out.
TRAINED_TAPS = (*TAPS, Tap(6, 0, 1), Tap(12, 0, 1))
SETTINGS = Settings(epochs=172, batch=250, rate=0.05, decay=5e-4)
WEIGHTS = (0.5, 0.5, 0.5, 0.5, 1.0)
SHARE = 0.3  # of the last exit in the last answer


class Student(nn.Module):
    """The network with a body that answers for itself while training.

    Were the last answer trained on body and ladder at once, it would lean on the ladder, which is
    sooner good, and the body would learn less.
    """

    def __init__(self, body: CifarResNet) -> None:
        super().__init__()
        self.net = ElasticResNet(TRAINED_TAPS)
        self.head = body.linear
        tensors = {k: v for k, v in body.state_dict().items() if not k.startswith("linear.")}
        self.net.load_state_dict(tensors, strict=False)
        self.net.linear.requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Scores of the exits, the last by the body alone."""
        answers, x, _ = self.net.early(image)
        return (*answers, self.head(self.net.pooled(self.net.late(x))))


def finished(student: nn.Module) -> ElasticResNet:
    """The packaged network: the first exits, and the last answer from body and ladder."""
    assert isinstance(student, Student)
    trained = student.net.state_dict()
    net = ElasticResNet(TAPS)
    net.load_state_dict({name: trained[name] for name in net.state_dict()})
    net.to(student.head.weight.device).join(student.head, SHARE)
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
        run(lambda: Student(body()), arguments, settings, KEPT_BACK, finish=finished)


if __name__ == "__main__":
    main()
