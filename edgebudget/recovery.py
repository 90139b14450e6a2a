"""Training in a plan: the fine-tune that follows a cut, and short ones that choose the cut.

Untrained, a network on a smaller picture and one with fewer channels are wrong in different ways,
and what is wrong with the first is mended sooner: MobileNetV2 at half its size was further from
the original than with a quarter of its channels' work, and nearer after seventy steps. Where the
untrained quality does not tell candidates apart, each is therefore trained for a little while.
Source of comparing after little and equal work: "Hyperband: A Novel Bandit-Based Approach to
Hyperparameter Optimization", Li et al., 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebudget import registry
from edgebudget.candidates import NEAR, Candidate, best, probe
from edgebudget.events import Said
from edgebudget.plan import Step

if TYPE_CHECKING:
    from edgebudget.evaluate import Predictions
    from edgebudget.pipeline import Built, Setting

# Multiply-accumulates spent on recovery: fixed, so that plans reproduce. Whole channels lost need
# more than a changed input size, after which the weights are still the original's.
_TRAINING_MACS = {"prune_channels": 3e13, "scale_resolution": 3e12}
_MAX_EPOCHS = 30
_BATCH = 64
_LEAST_STEPS = 120
_TRIAL_MACS = 1e12  # of one short training
_LEAST_TRIAL_STEPS = 20
_RIVAL = 0.9  # of the best untrained quality, from which a candidate may still turn out better
_RIVAL_DISTANCE = 2.0  # times the least output error, where no quality is known


def recovery_step(setting: Setting, chosen: Candidate) -> Step | None:
    """A fine-tune of a fixed number of steps for a candidate; None without data to train on."""
    train = setting.workload.data.train
    if train is None or setting.workload.program.stage == "graph":
        return None
    names = {s.name for s in chosen.steps}
    pruned = "prune_channels" in names
    work = _TRAINING_MACS["prune_channels" if pruned else "scale_resolution"]
    each = 3 * chosen.macs * _training_fraction(setting, train.sample(0).inputs)
    samples = min(work / each, _MAX_EPOCHS * len(train))
    batch = max(1, min(_BATCH, len(train), int(samples / _LEAST_STEPS) or 1))
    steps = max(20, int(samples / batch))
    why = f"{steps} steps of batch {batch}: about {work:.0e} multiply-accumulates"
    recover = registry.get("recover")
    # Weights that were not cut only follow the original; labels would pull towards a small set.
    # A cut classifier gains from its teacher's softened answers more than from labels, of which
    # it has seen most: at each of three rates on pictures that the fine-tuning had not seen.
    taught = {} if pruned else {"alpha": 1.0}
    if pruned and setting.workload.task.kind == "classification":
        taught = {"alpha": 0.9, "temperature": 4.0}
    config = recover.config(steps=steps, batch=batch, **taught)
    return Step(recover.name, config, why)


def _training_fraction(setting: Setting, inputs: Any) -> float:
    """How large a training sample is against the model's input (crops of a large picture)."""
    spec = setting.workload.program.inputs[0]
    size = math.prod(inputs[spec.name].shape)
    return float(min(1.0, size / max(1, math.prod(spec.shape[1:]))))


def settled(
    setting: Setting,
    start: Built,
    candidates: Sequence[Candidate],
    cap: float,
    reference: Predictions,
) -> list[Candidate]:
    """The candidates, with what a short training makes of those that nothing else tells apart."""
    close = {c.label for c in rivals(candidates, cap)}
    return [_tried(setting, start, c, reference) if c.label in close else c for c in candidates]


def rivals(candidates: Sequence[Candidate], cap: float) -> list[Candidate]:
    """The best candidate of each kind, where there are several of about the same quality."""
    kinds: dict[tuple[str, ...], list[Candidate]] = {}
    for c in candidates:
        if c.steps and not c.refused and c.amount <= cap and c.distance is not None:
            kinds.setdefault(tuple(s.name for s in c.steps), []).append(c)
    leaders = [x for x in (best(same, cap) for same in kinds.values()) if x is not None]
    nearest = min((_distance(c) for c in leaders), default=0.0)
    if nearest <= NEAR:
        return []
    qualities = [c.quality.value for c in leaders if c.quality is not None]
    if len(qualities) == len(leaders):
        close = [q >= _RIVAL * max(qualities) for q in qualities]
    else:
        close = [_distance(c) <= _RIVAL_DISTANCE * nearest for c in leaders]
    found = [c for c, near in zip(leaders, close, strict=True) if near]
    return found if len(found) > 1 else []


def _distance(candidate: Candidate) -> float:
    return math.inf if candidate.distance is None else candidate.distance


def _tried(
    setting: Setting, start: Built, candidate: Candidate, reference: Predictions
) -> Candidate:
    full = recovery_step(setting, candidate)
    if full is None:
        return candidate
    if setting.late:
        text = f"the time limit has passed: no short training of {candidate.label}"
        setting.emit(Said("warning", text))
        return candidate
    config: Any = full.config
    train = setting.workload.data.train
    assert train is not None, "there is a fine-tune"
    fraction = _training_fraction(setting, train.sample(0).inputs)
    each = 3 * candidate.macs * fraction * config.batch
    steps = min(config.steps, max(_LEAST_TRIAL_STEPS, int(_TRIAL_MACS / each)))
    setting.emit(Said("info", f"{candidate.label}: {steps} steps of training, to compare"))
    short = Step(full.name, replace(config, steps=steps), "a short training, to compare")
    after = probe(setting, start, candidate.label, (*candidate.steps, short), reference)
    return candidate if after.refused else replace(candidate, tried=after.distance)
