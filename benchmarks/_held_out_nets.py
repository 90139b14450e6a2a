"""Networks that no calibration has seen, as torch modules with the input shape of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as f

Shape = tuple[int, ...]
Made = tuple[str, Callable[[], nn.Module], Shape]


class Scores(nn.Module):
    """The logits of a `transformers` classifier, alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x).logits
        return logits


class Wide(nn.Module):
    """A residual network of three stages whose first has `width` channels."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        stages, channels = [], width
        for stage in range(3):
            for i in range(blocks):
                out = width * 2**stage
                stages.append(_Residual(channels, out, 2 if stage and not i else 1))
                channels = out
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 100)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(f.relu(self.stem(x))).mean((2, 3)))
        return y


class _Residual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout))
        self.b = nn.Sequential(nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout))
        self.short = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return f.relu(self.b(f.relu(self.a(x))) + self.short(x))


class SqueezeExcite(nn.Module):
    """Inverted bottlenecks with squeeze and excitation, in the manner of MobileNetV3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            _Excited(width * a, width * b, s, k)
            for a, b, s, k in ((1, 1, 1, 3), (1, 2, 2, 3), (2, 2, 1, 5), (2, 4, 2, 5), (4, 4, 1, 3))
        )
        self.head = nn.Linear(4 * width, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = f.hardswish(self.stem(x))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class _Excited(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, size: int) -> None:
        super().__init__()
        inner = 4 * cin
        self.wide = nn.Conv2d(cin, inner, 1)
        self.deep = nn.Conv2d(inner, inner, size, stride, size // 2, groups=inner)
        self.down, self.up = nn.Conv2d(inner, inner // 4, 1), nn.Conv2d(inner // 4, inner, 1)
        self.out = nn.Conv2d(inner, cout, 1)
        self.same = cin == cout and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = f.hardswish(self.deep(f.hardswish(self.wide(x))))
        y = y * f.hardsigmoid(self.up(f.relu(self.down(y.mean((2, 3), keepdim=True)))))
        y = self.out(y)
        return x + y if self.same else y


class Dense(nn.Module):
    """Two dense blocks with a transition."""

    def __init__(self, growth: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, 1, 1)
        channels = 2 * growth
        self.first, channels = _dense_block(channels, growth, layers)
        self.between = nn.Conv2d(channels, channels // 2, 1)
        self.second, channels = _dense_block(channels // 2, growth, layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.first:
            x = torch.cat([x, layer(x)], 1)
        x = f.avg_pool2d(self.between(f.relu(x)), 2)
        for layer in self.second:
            x = torch.cat([x, layer(x)], 1)
        y: Tensor = self.head(f.relu(x).mean((2, 3)))
        return y


def _dense_block(channels: int, growth: int, layers: int) -> tuple[nn.ModuleList, int]:
    block = nn.ModuleList()
    for _ in range(layers):
        block.append(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1),
                nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, 1, 1),
            )
        )  # fmt: skip
        channels += growth
    return block, channels


class Fuse(nn.Module):
    """Down and up again, with a skip: the shape of a segmentation network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, 1, 1)
        self.b = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.c = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.d = nn.Conv2d(3 * width, width, 3, 1, 1)
        self.e = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = f.relu(self.a(x))
        b = f.relu(self.c(f.relu(self.b(a))))
        up = f.interpolate(b, scale_factor=2.0, mode="nearest")
        y: Tensor = self.e(f.relu(self.d(torch.cat([a, up], 1))))
        return y


def _zoo(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from edgebudget_models import catalogue

        module: nn.Module = catalogue.get(name).build()
        return module

    return make


def _transformers(name: str, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        return Scores(getattr(transformers, f"{name}ForImageClassification")(config))

    return make


def networks() -> Iterator[Made]:
    """Name, maker and input shape of each."""
    for side in (224, 160, 96):
        yield f"zoo mobilenet-v2 {side}", _zoo("mobilenet-v2"), (1, 3, side, side)
    for name, side in (("cifar10-resnet20", 32), ("cifar10-resnet20", 80), ("cifar10-resnet56", 32),
                       ("cifar10-vit", 32)):  # fmt: skip
        yield f"zoo {name} {side}", _zoo(name), (1, 3, side, side)
    vit = {"num_labels": 10, "patch_size": 16}
    yield "transformers ViT 96 px", _transformers(
        "ViT", image_size=96, hidden_size=192, num_hidden_layers=4, num_attention_heads=3,
        intermediate_size=768, **vit,
    ), (1, 3, 96, 96)  # fmt: skip
    yield "transformers ViT 160 px", _transformers(
        "ViT", image_size=160, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=256, **vit,
    ), (1, 3, 160, 160)  # fmt: skip
    yield "transformers ResNet", _transformers(
        "ResNet", embedding_size=32, hidden_sizes=[64, 128, 256], depths=[1, 2, 1], num_labels=10
    ), (1, 3, 128, 128)  # fmt: skip
    yield "transformers MobileNetV2 0.5", _transformers(
        "MobileNetV2", depth_multiplier=0.5, num_labels=10
    ), (1, 3, 128, 128)  # fmt: skip
    yield "residual width 24", lambda: Wide(24, 2), (1, 3, 48, 48)
    yield "residual width 64", lambda: Wide(64, 2), (1, 3, 32, 32)
    yield "residual width 40, 3 blocks", lambda: Wide(40, 3), (1, 3, 40, 40)
    yield "squeeze-excite width 16", lambda: SqueezeExcite(16), (1, 3, 128, 128)
    yield "squeeze-excite width 32", lambda: SqueezeExcite(32), (1, 3, 96, 96)
    yield "dense growth 16", lambda: Dense(16, 4), (1, 3, 48, 48)
    yield "fuse width 24", lambda: Fuse(24), (1, 3, 112, 112)
