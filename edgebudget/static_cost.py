"""What can be counted without running anything: MACs, parameters, bytes, planned memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebudget_runtime.cost import Cost, Figure, counted

if TYPE_CHECKING:
    from edgebudget.program import Program


def static_cost(program: Program, where: str = "the graph", samples: int = 1) -> Cost:
    """Count a program at its stated input shapes.

    A module has MACs and parameters only: its bytes and memory are known once it is a graph.
    Memory is that of as many `samples` at a time; all else is of one.
    """
    from edgebudget.counter import count

    report = count(program)
    if program.stage == "module":
        return Cost(
            macs=counted(report.macs, "counted on the torch.export graph"),
            params=counted(
                sum(p.numel() for p in program.body.parameters()), "parameters of the module"
            ),
        )
    from edgebudget.memory import plan_memory

    memory = plan_memory(program.body)
    return Cost(
        macs=counted(report.macs, f"counted on {where}"),
        params=counted(report.params, f"initializers of {where}"),
        size_bytes=counted(program.body.ByteSize(), f"bytes of {where}"),
        memory_bytes=planned_memory(
            memory.weight_bytes, memory.peak_activation_bytes, f"at {memory.peak_at}", samples
        ),
    )


def planned_memory(weights: int, peak: int, where: str, samples: int) -> Figure:
    """Bytes of weights, and of the activations of as many samples as may come at a time."""
    times = f"{samples} samples' " if samples > 1 else ""
    return Figure(
        value=float(weights + samples * peak),
        evidence="modelled",
        how=f"weights {weights} B + {times}liveness peak {peak} B {where}; "
        "engine scratch not included",
    )
