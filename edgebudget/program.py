"""The model under compilation, and the contract of a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from edgebudget.events import Emit
    from edgebudget.target import TargetSpec
    from edgebudget.workload import Data, Task
    from edgebudget_runtime.budget import Budget
    from edgebudget_runtime.cost import Cost

Stage = Literal["module", "graph"]
Equivalence = Literal["exact", "close", "lossy"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor with a concrete shape (batch included) and a numpy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Program:
    """A model part-way through compilation. A pass owns the one it is given.

    `body` is a `torch.nn.Module` in eval mode at stage "module" and an `onnx.ModelProto`
    with static shapes and embedded weights at stage "graph". `inputs` are the shapes the
    cost is stated for.
    """

    stage: Stage
    body: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    facts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Note:
    """One thing a pass did, or declined to do, and why."""

    where: str
    what: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns: the new program and an account of itself.

    `ended_early`: `program` is the best so far, less than the config asked for, so that it is not
    kept for other compiles. After "interrupt" (Ctrl-C) the compile saves it and ends; a pass with
    nothing worth saving lets KeyboardInterrupt through instead.
    """

    program: Program
    did: tuple[Note, ...] = ()
    declined: tuple[Note, ...] = ()
    ended_early: Literal["", "deadline", "interrupt"] = ""


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What the pipeline observed about one step."""

    name: str
    config: dict[str, Any]
    seed: int
    before: Cost
    after: Cost
    did: tuple[Note, ...]
    declined: tuple[Note, ...]
    seconds: float = 0.0
    undone: str = ""  # why do-no-harm took the step back, if it did


@dataclass(frozen=True, slots=True)
class Context:
    """All that a pass may look at besides its program and config.

    `data` never contains the evaluation set. `original` is the untouched model (the teacher).
    `workdir` is this step's own folder: checkpoints left there let a killed step resume.
    `deadline` is a `time.monotonic()` instant after which a pass should return its best so far.
    """

    budget: Budget
    target: TargetSpec
    task: Task
    data: Data
    original: Program
    seed: int
    rng: np.random.Generator
    workdir: Path
    emit: Emit
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """A function plus the contract the pipeline enforces around it.

    `config` is a frozen dataclass whose fields are int, float, str, bool or tuples of those
    (so that a plan round-trips through TOML).
    """

    name: str
    run: Callable[[Program, Any, Context], PassResult]
    config: type
    stage: Stage
    summary: str
    requires: frozenset[str] = frozenset()
    ensures: frozenset[str] = frozenset()
    destroys: frozenset[str] = frozenset()
    equivalence: Equivalence = "lossy"
    version: int = 1
    # What the main knob can reach on a program, cheaply: input scales, or smallest and largest MACs
    # (and microseconds of layers, where the target prices them)
    reach: Callable[[Program, TargetSpec], tuple[float, ...]] | None = None
