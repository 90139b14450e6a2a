"""ONNX Runtime sessions on a named provider, and never quietly on another one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import onnxruntime as ort

from edgebudget_runtime.errors import ArtifactError, EdgeBudgetError, UsageError, first_line
from edgebudget_runtime.inputs import Array

CPU = "CPUExecutionProvider"
CPU_TARGET = "onnxruntime-cpu"  # what manifests call files for it
VERSION: str = ort.__version__
# 8-bit products are summed without the 16-bit clipping of x86 processors before VNNI. The engine
# then takes slower kernels on all of x86.
EXACT = ("session.x64quantprecision", "1")
# Providers that come as a package of their own, to be registered before use.
_PLUGINS = {
    "QNNExecutionProvider": "onnxruntime_qnn",
    "WebGpuExecutionProvider": "onnxruntime_ep_webgpu",
}
_registering = Lock()


def open_session(
    file: Path,
    *,
    providers: Sequence[str] = (CPU,),
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
    model: bytes | None = None,
    weights: Mapping[str, bytes] | None = None,
    trace: Path | None = None,
    exact: bool = False,
) -> ort.InferenceSession:
    """Load a model on the first provider; nodes may only go to the providers that are listed.

    `options` are the first provider's own. `model` is what `file` holds, where the caller has
    read it, and `weights` the bytes of the files that it refers to, by the names it uses: the
    engine copies what it needs, while files that it opens itself stay mapped, and the process
    dies when one is cut short. `trace` begins the name of a file that the engine's own profiler
    writes when the session's `end_profiling` is called; it slows every run down. `exact` is for
    graphs that another processor computes: nothing is clipped that it would not clip.

    Raises:
        UsageError: EB175 a provider is not here.
        ArtifactError: EB509 the engine refuses the file, or cannot place a node.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads or default_threads()
    settings.inter_op_num_threads = 1
    # Spinning threads steal the core from each other when other work shares the machine.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        settings.add_session_config_entry(*EXACT)
    if trace is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(trace)
    if CPU not in providers:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    given: dict[str, Any] = {}
    if providers[0] in _PLUGINS and _is_plugin(providers[0]):
        device, defaults = _plugin(providers[0])
        settings.add_provider_for_devices([device], {**defaults, **(options or {})})
    else:
        _check_available(providers)
        given = {
            "providers": list(providers),
            "provider_options": [dict(options or {}), *({} for _ in providers[1:])],
        }
    if weights:
        names, contents = list(weights), list(weights.values())
        settings.add_external_initializers_from_files_in_memory(
            names, contents, [len(c) for c in contents]
        )
    try:
        # enable_fallback=0: by default a provider that fails is replaced by the CPU, silently.
        source = str(file) if model is None else model
        session = ort.InferenceSession(source, settings, enable_fallback=0, **given)
    except Exception as e:  # the engine raises a dozen unrelated types here
        raise ArtifactError(
            "EB509",
            f"ONNX Runtime cannot load {file.name} on {providers[0]}: {first_line(e)}",
            hint="check the file with `edgebudget inspect`, or run it on the CPU",
        ) from e
    if session.get_providers()[0] != providers[0]:
        raise ArtifactError(
            "EB509",
            f"ONNX Runtime put {file.name} on {session.get_providers()[0]}, not {providers[0]}",
            hint="check the provider's options, or run it on the CPU",
        )
    return session


def default_threads() -> int:
    """How many threads a session uses for one input, unless told otherwise."""
    return os.cpu_count() or 1


def run_session(
    session: ort.InferenceSession,
    feed: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    options: ort.RunOptions | None = None,
) -> dict[str, Array]:
    """Run once; names are the model's own. Asking the session for its `outputs` takes time.

    Raises:
        ArtifactError: EB509 the engine failed.
    """
    names = [o.name for o in session.get_outputs()] if outputs is None else outputs
    try:
        values = session.run(names, dict(feed), options)
    except EdgeBudgetError:
        raise
    except Exception as e:  # the engine raises a dozen unrelated types here
        raise ArtifactError(
            "EB509",
            f"ONNX Runtime failed while running: {first_line(e)}",
            hint="check the artifact with `edgebudget eval`",
        ) from e
    return dict(zip(names, values, strict=True))


def _check_available(providers: Sequence[str]) -> None:
    known = ort.get_available_providers()
    for name in providers:
        if name not in known:
            raise UsageError(
                "EB175",
                f"ONNX Runtime has no provider {name!r} here",
                hint=f"one of {', '.join([*known, *_PLUGINS])}",
            )


def _plugin(name: str) -> tuple[Any, dict[str, str]]:
    """The device of a provider that comes as a package, and the options that it needs."""
    package = _PLUGINS[name]
    try:
        plugin = importlib.import_module(package)
    except ImportError as e:
        raise UsageError(
            "EB175",
            f"the provider {name} is not installed",
            hint=f"pip install {package.replace('_', '-')}",
        ) from e
    with _registering:
        if not _devices(name):
            ort.register_execution_provider_library(name, plugin.get_library_path())
    found = _devices(name)
    if not found:
        raise UsageError("EB175", f"the provider {name} finds no device here", hint="use the CPU")
    is_qnn = package == "onnxruntime_qnn"
    return found[0], {"backend_path": plugin.get_qnn_htp_path()} if is_qnn else {}


def _is_plugin(name: str) -> bool:
    """Whether a provider is not built in; once registered, the engine lists a plug-in as if so."""
    return bool(_devices(name)) or name not in ort.get_available_providers()


def _devices(name: str) -> list[Any]:
    return [d for d in ort.get_ep_devices() if d.ep_name == name]
