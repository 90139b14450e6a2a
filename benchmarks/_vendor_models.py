"""Networks of `transformers`, built from configurations, and clean equivalents.

The clean ones are written by hand with the same layers and the paddings that an NPU likes.
MobileNetV2 has the weights of the zoo's: with random ones, what two engines round differently
in the first layers grows from block to block, far more than in a trained network. The others are
shallow enough for random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edgebudget_models import catalogue

CLASSES = 1000
TRAINED = "mobilenet-v2"  # the network below that has trained weights


class Scores(nn.Module):
    """A classifier of `transformers` with pictures in and scores out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, classes]."""
        scores: Tensor = self.model(pixel_values=image).logits
        return scores


def stirred(model: nn.Module) -> nn.Module:
    """Random normalization statistics: fresh ones would fold to nothing.

    Convolutions keep the variance of what they read: with the small weights of a configuration,
    deep networks give every picture the same scores, and comparing those would show nothing.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return model.eval()


def trained(model: nn.Module) -> nn.Module:
    """The weights of the zoo's network of that name, layer for layer.

    Its ten classes are the first; the others' weights are drawn with the spread of these.
    """
    theirs = catalogue.get(TRAINED).load(None).state_dict()
    mine = model.state_dict()
    if len(mine) != len(theirs):
        raise ValueError(f"{len(mine)} tensors, the zoo's network has {len(theirs)}")
    for (name, place), (other, value) in zip(mine.items(), theirs.items(), strict=True):
        if place.shape == value.shape:
            place.copy_(value)
        elif place.shape[1:] == value.shape[1:] and len(place) == CLASSES:
            place.normal_(float(value.mean()), float(value.std()))
            place[: len(value)] = value
        else:
            raise ValueError(f"{name} is no {other}")
    return model.eval()


def _unit(cin: int, cout: int, k: int, stride: int, groups: int, last: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), last)


class _Inverted(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = cin * expand
        widen = [_unit(cin, inner, 1, 1, 1, nn.ReLU6())] if expand > 1 else []
        self.body = nn.Sequential(
            *widen,
            _unit(inner, inner, 3, stride, inner, nn.ReLU6()),
            _unit(inner, cout, 1, 1, 1, nn.Identity()),
        )
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class _Basic(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _unit(cin, cout, 3, stride, 1, nn.ReLU()), _unit(cout, cout, 3, 1, 1, nn.Identity())
        )
        same = stride == 1 and cin == cout
        self.short = nn.Identity() if same else _unit(cin, cout, 1, stride, 1, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class _Pooled(nn.Module):
    def __init__(self, body: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        # Not `.mean((2, 3))`: without kept axes the last map is written transposed, 40 M cycles.
        pooled = nn.functional.adaptive_avg_pool2d(self.body(image), 1).flatten(1)
        scores: Tensor = self.head(pooled)
        return scores


def _clean_mobilenet_v2() -> nn.Module:
    body: list[nn.Module] = [_unit(3, 32, 3, 2, 1, nn.ReLU6()), _Inverted(32, 16, 1, 1)]
    channels = 16
    for cout, count, stride in (
        (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1),
    ):  # fmt: skip
        for i in range(count):
            body.append(_Inverted(channels, cout, stride if i == 0 else 1, 6))
            channels = cout
    return trained(_Pooled([*body, _unit(320, 1280, 1, 1, 1, nn.ReLU6())], 1280))


def _clean_mobilenet_v1() -> nn.Module:
    body: list[nn.Module] = [_unit(3, 32, 3, 2, 1, nn.ReLU6())]
    channels = 32
    for cout, stride in (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5,
        (1024, 2), (1024, 1),
    ):  # fmt: skip
        body.append(_unit(channels, channels, 3, stride, channels, nn.ReLU6()))
        body.append(_unit(channels, cout, 1, 1, 1, nn.ReLU6()))
        channels = cout
    return stirred(_Pooled(body, 1024))


def _clean_resnet() -> nn.Module:
    body: list[nn.Module] = [_unit(3, 64, 7, 2, 1, nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for cout, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        body += [_Basic(channels, cout, stride), _Basic(cout, cout, 1)]
        channels = cout
    return stirred(_Pooled(body, 512))


def _mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(tf_padding=True, num_labels=CLASSES, layer_norm_eps=1e-5)
    return trained(Scores(MobileNetV2ForImageClassification(config)))


def _mobilenet_v1() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(tf_padding=True, num_labels=CLASSES)
    return stirred(Scores(MobileNetV1ForImageClassification(config)))


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return stirred(Scores(ResNetForImageClassification(config)))


# name -> as it comes, and by hand
PAIRS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    TRAINED: (_mobilenet_v2, _clean_mobilenet_v2),
    "mobilenet-v1": (_mobilenet_v1, _clean_mobilenet_v1),
    "resnet-18": (_resnet, _clean_resnet),
}
