"""ExecuTorch programs (`.pte`) with the face of an ONNX Runtime session.

Needs the package executorch (and torch, which that brings) only when such a segment is opened.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any

import numpy as np

from edgebudget_runtime.errors import ArtifactError, TargetError, UsageError, first_line
from edgebudget_runtime.inputs import Array
from edgebudget_runtime.manifest import File, Manifest, Segment, Tensor

SUFFIX = ".pte"
# Engines whose `.pte` files only the device runs: the graph beside the file stands in here.
_ONLY_ON_DEVICE = frozenset({"executorch-ethos-u", "executorch-vulkan"})
_GRAPH = ".graph.onnx"
_INSTALL = 'pip install "edgebudget[executorch]"'
_ONLY = "forward"  # the method of a program that has one; of several, each has its segment's id
_opening = Lock()
_pool: list[int] = []  # how many threads the process's one pool has, once it is in use


def is_needed(manifest: Manifest) -> bool:
    """Whether ExecuTorch runs an artifact."""
    return manifest.target.engine not in _ONLY_ON_DEVICE and any(
        s.file.endswith(SUFFIX) for s in manifest.segments
    )


def stand_in(manifest: Manifest, segment: Segment) -> File | None:
    """The ONNX file that runs in a segment's stead, where its own format needs the device."""
    if manifest.target.engine not in _ONLY_ON_DEVICE or not segment.file.endswith(SUFFIX):
        return None
    wanted = segment.file.removesuffix(SUFFIX) + _GRAPH
    found = next((f for f in segment.files() if f.file == wanted), None)
    if found is None:
        raise ArtifactError(
            "EB509",
            f"{segment.file} needs {manifest.target.device}, and {wanted}, which could stand in "
            "for it here, is not in the artifact",
            hint="run it on the device, or compile again",
        )
    return found


def installed_version() -> str:
    """The version of the package, "" where it is not installed."""
    try:
        return version("executorch")
    except PackageNotFoundError:
        return ""


def bindings() -> Any:
    """The engine itself. Its public face would import the whole compiler first, for seconds."""
    importlib.import_module("torch")  # brings the libraries that the engine is linked to
    return importlib.import_module("executorch.extension.pybindings._portable_lib")


class Method:
    """One method of a loaded program: the one called `name`, else "forward"."""

    def __init__(self, data: bytes, name: str = _ONLY) -> None:
        """Load it from the program's bytes; a file cut short is refused, with the engine's words.

        Raises:
            RuntimeError: the engine refuses it.
        """
        engine = bindings()
        whole = engine.Verification.InternalConsistency
        program = engine._load_program_from_buffer(data, program_verification=whole)
        names = {program.get_method_name(i) for i in range(program.num_methods())}
        self._method = program.load_method(name if name in names else _ONLY)
        self._kept = (data, program)  # a method only borrows its program, and that its bytes
        self._torch = importlib.import_module("torch")

    def run(self, values: Sequence[Array]) -> list[Array]:
        """Run once."""
        # Copies: the engine refuses the strides that numpy gives new axes, and keeps its outputs.
        tensors = [self._torch.from_numpy(np.array(v, order="C")) for v in values]
        return [v.numpy().copy() for v in self._method(tensors)]

    def fill(self, tensors: Sequence[Tensor], max_batch: int) -> None:
        """Run the largest batch once, on zeros.

        XNNPACK (ExecuTorch 1.4.1) answers wrongly when inputs grow beyond the largest it has seen.
        """
        self.run(
            [
                np.zeros([max_batch * (t.shape[0] or 1), *(d or 1 for d in t.shape[1:])], t.dtype)
                for t in tensors
            ]
        )

    def prepared(self, values: Sequence[Array]) -> Callable[[], object]:
        """A function that runs once on these inputs and copies nothing, for timing."""
        tensors = [self._torch.from_numpy(np.array(v, order="C")) for v in values]
        return lambda: self._method(tensors)


class ProgramSession:
    """A loaded program; one run at a time, from any thread."""

    def __init__(self, method: Method, segment: Segment) -> None:
        self._method, self._segment = method, segment
        self._running = Lock()

    def get_inputs(self) -> Sequence[Tensor]:
        """What it takes, in order. The file has no names: these are the manifest's."""
        return self._segment.inputs

    def get_outputs(self) -> Sequence[Tensor]:
        """What it gives, in order."""
        return self._segment.outputs

    def run(
        self, names: Sequence[str], feed: Mapping[str, Array], options: object = None
    ) -> list[Array]:
        """Run once.

        Raises:
            ArtifactError: EB509, the engine failed.
        """
        try:
            with self._running:
                found = self._method.run([feed[t.name] for t in self._segment.inputs])
        except Exception as e:  # the engine raises a dozen unrelated types
            raise ArtifactError(
                "EB509",
                f"ExecuTorch failed while running {self._segment.file}: {first_line(e)}",
                hint="check the artifact with `edgebudget eval`",
            ) from e
        by_name = {t.name: v for t, v in zip(self._segment.outputs, found, strict=True)}
        return [by_name[n] for n in names]


def open_program(data: bytes, segment: Segment, threads: int | None) -> ProgramSession:
    """Load a program from its bytes.

    The engine has one pool of threads in a process, whose size is fixed by the first program.

    Raises:
        TargetError: EB601, ExecuTorch is not installed.
        UsageError: EB174, another number of threads is in use already.
        ArtifactError: EB509, the engine refuses the file.
    """
    if not installed_version():
        raise TargetError("EB601", f"{segment.file} needs the package executorch", hint=_INSTALL)
    with _opening, _quiet():
        _set_threads(threads)
        try:
            method = Method(data, segment.id)
            if segment.max_batch > 1:
                method.fill(segment.inputs, segment.max_batch)
        except Exception as e:  # the engine raises a dozen unrelated types
            raise ArtifactError(
                "EB509",
                f"ExecuTorch {installed_version()} cannot load {segment.file}: {first_line(e)}",
                hint="compile the model again for this version",
            ) from e
    return ProgramSession(method, segment)


def _set_threads(wanted: int | None) -> None:
    if not _pool:
        # Only before any program is loaded: afterwards this aborts the process, or hangs.
        bindings()._unsafe_reset_threadpool(wanted or os.cpu_count() or 1)
        _pool.append(wanted or os.cpu_count() or 1)
    elif wanted is not None and wanted != _pool[0]:
        raise UsageError(
            "EB174",
            f"threads={wanted}, but ExecuTorch runs on {_pool[0]} in this process already",
            hint="use the same number for every runner, or another process",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The engine reports on the processor as it starts, on the process's standard error."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
