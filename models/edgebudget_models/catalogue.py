"""The zoo's table of contents; listing it loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgebudget_models.entry import ZooEntry

_NAMES = (
    "digits",
    "uhd-iqa",
    "cifar10-resnet20",
    "cifar10-resnet56",
    "cifar10-resnet56-elastic",
    "cifar10-mobilenet-elastic",
    "cifar10-vit",
    "mobilenet-v2",
)


def names() -> tuple[str, ...]:
    """The models of the zoo."""
    return _NAMES


def get(name: str) -> ZooEntry:
    """The entry called `name`; KeyError when there is none."""
    if name not in _NAMES:
        raise KeyError(name)
    module = import_module(f"edgebudget_models.{name.replace('-', '_')}")
    entry: ZooEntry = module.ENTRY
    return entry
