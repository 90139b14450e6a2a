"""The report of an artifact: one HTML page that needs nothing else, not even a script."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgebudget import report_layers, report_svg
from edgebudget.layer_loads import Anatomy
from edgebudget.report_frontier import chapter
from edgebudget.report_markup import (
    NAMES,
    Markup,
    amount,
    details,
    escaped,
    joined,
    metric,
    ratio,
    si,
    tag,
)
from edgebudget.report_style import CSS
from edgebudget_runtime import manifest as m
from edgebudget_runtime.cost import RESOURCES, Evidence, Figure, Resource

_MANY = 6  # notes of a pass shown before the rest is folded away
_EVIDENCE: dict[Evidence, str] = {
    "measured": "Counted on the exported file, or observed by running it. The line below the "
    "figure says which, on what device and how often.",
    "simulated": "From the vendor's own emulator or compiler, without the real device.",
    "modelled": "From a formula or a fitted predictor: an estimate.",
    "unknown": "Nothing here can tell. An unknown cost never satisfies a limit.",
}


def render(manifest: m.Manifest, anatomy: Anatomy | None = None) -> str:
    """The whole page. Equal manifests (and anatomies of their files) give equal pages."""

    def nodes(manifest: m.Manifest) -> Markup:
        return report_layers.chapter(anatomy or Anatomy(()), manifest.placement)

    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"edgebudget: {manifest.name}"),
        tag("style", Markup(CSS)),
    )
    sections = (
        _limits, _summary, chapter, _candidates, _layers, _placement, nodes, _passes, _notes,
        _provenance,
    )  # fmt: skip
    body = tag("main", _header(manifest), *(section(manifest) for section in sections), _legend())
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _header(manifest: m.Manifest) -> Markup:
    target = manifest.target
    limits = [x.holds for x in manifest.limits] + [x.holds for x in manifest.quality_limits]
    missed = limits.count(False)
    if not limits:
        kind, said = "good", "No limit was asked for"
    elif missed:
        kind, said = "bad", f"{missed} of {len(limits)} limits not proven"
    else:
        only = "The limit holds" if len(limits) == 1 else f"All {len(limits)} limits hold"
        kind, said = "good", f"{only}, proven on the exported file"
    return joined(
        tag("p", "edgebudget report", class_="kind"),
        tag("h1", manifest.name),
        tag(
            "p",
            f"{manifest.workload.task}, for {target.name} through {target.engine}: {target.device}",
            class_="soft",
        ),
        tag("div", tag("strong", said), _sentence(manifest), class_=f"verdict {kind}"),
        _tiles(manifest),
    )


def _sentence(manifest: m.Manifest) -> str:
    sub = manifest.subnetworks[0]
    before, after = manifest.baseline.cost.macs.value, sub.cost.macs.value
    parts = []
    if before is not None and after is not None:
        parts.append(f"{amount('macs', before)} became {amount('macs', after)}")
    if sub.quality is not None and sub.original_quality is not None:
        was, now = sub.original_quality, sub.quality
        parts.append(f"{metric(now.metric)} went from {was.value:.4f} to {now.value:.4f}")
    elif sub.quality is None:
        parts.append("quality was not evaluated: there was no evaluation data")
    return "; ".join(parts) + "."


def _tiles(manifest: m.Manifest) -> Markup:
    before, after = manifest.baseline.cost, manifest.subnetworks[0].cost
    tiles: list[Markup] = []
    for name in RESOURCES:
        was, now = before.get(name).value, after.get(name).value
        if now is None or name in ("params", "fallback_nodes"):
            continue
        change = ratio(was, now)
        below = "" if was is None else f"from {amount(name, was)}"
        tiles.append(
            _tile(amount(name, now), NAMES[name], below + (f", {change}" if change else ""))
        )
    sub = manifest.subnetworks[0]
    if sub.quality is not None:
        below = "" if sub.original_quality is None else f"from {sub.original_quality.value:.4f}"
        tiles.append(_tile(f"{sub.quality.value:.4f}", metric(sub.quality.metric), below))
    return tag("div", *tiles, class_="tiles")


def _tile(value: str, label: str, below: str) -> Markup:
    return tag("div", tag("span", label), tag("b", value), tag("span", below), class_="tile")


def _limits(manifest: m.Manifest) -> Markup:
    rows = [_limit_row(x) for x in manifest.limits]
    rows += [_quality_row(x, manifest.workload.metric) for x in manifest.quality_limits]
    if not rows:
        return joined()
    titles = ("Limit", "Asked", "Proven", "Evidence", "")
    return joined(tag("h2", "The budget"), _table(titles, rows, numbers={1, 2}))


def _limit_row(x: m.ProvenLimit) -> list[str]:
    value = x.proven.value
    share = value / x.bound if value is not None and x.bound else None
    statistic = "" if x.statistic == "max" else f" ({x.statistic})"
    return [
        joined(NAMES[x.resource], statistic, _small(details(x.proven, x.resource))),
        f"≤ {amount(x.resource, x.bound)}",
        joined(
            amount(x.resource, value), "" if share is None else report_svg.meter(share, x.holds)
        ),
        _badge(x.proven.evidence),
        _verdict(x.holds),
    ]


def _quality_row(x: m.ProvenQuality, measure: str) -> list[str]:
    if x.kind == "max_drop":
        name, asked = f"Loss of {metric(measure)}", f"≤ {100 * x.bound:.4g} %"
        proven = "unknown" if x.value is None else f"{100 * x.value:.3g} %"
        share = x.value / x.bound if x.value is not None and x.bound else None
        shown = joined(proven, "" if share is None else report_svg.meter(share, x.holds))
    else:
        name, asked = metric(measure), f"≥ {x.bound:.4g}"
        shown = escaped("unknown" if x.value is None else f"{x.value:.4f}")
    evidence: Evidence = "unknown" if x.value is None else "measured"
    return [joined(name, _small(x.how)), asked, shown, _badge(evidence), _verdict(x.holds)]


def _summary(manifest: m.Manifest) -> Markup:
    before, after = manifest.baseline.cost, manifest.subnetworks[0].cost
    rows = []
    for name in RESOURCES:
        was, now = before.get(name), after.get(name)
        if was.value is None and now.value is None:
            continue
        rows.append(
            [
                joined(NAMES[name], _small(details(now, name))),
                _valued(name, was),
                _valued(name, now),
                ratio(was.value, now.value),
            ]
        )
    rows += _quality_rows(manifest.subnetworks[0])
    titles = ("", "Original", "Compiled", "Change")
    said = "MACs are the multiply-accumulates of one input; FLOPs are twice that number."
    return joined(
        tag("h2", "Before and after"),
        _table(titles, rows, numbers={1, 2, 3}),
        tag("p", said, class_="soft"),
    )


def _quality_rows(sub: m.SubNetwork) -> list[list[str]]:
    if sub.quality is None:
        return []
    was, now = sub.original_quality, sub.quality
    change = "" if was is None else f"{now.value - was.value:+.4f}".replace("-", "−")  # noqa: RUF001
    how = f"{now.how} · n = {now.count} · 95 % interval below"
    rows: list[list[str]] = [
        [joined(metric(now.metric), _small(how)), _scored(was), _scored(now), change],
    ]
    for name in sorted(now.others):
        if name.removesuffix("_low").removesuffix("_high") in now.others.keys() - {name}:
            continue  # an interval's end, shown with its metric
        before = joined() if was is None else _other(was, name)
        rows.append([metric(name), before, _other(now, name), ""])
    return rows


def _other(quality: m.Quality, name: str) -> Markup:
    value, ends = quality.others.get(name), (f"{name}_low", f"{name}_high")
    if value is None:
        return joined()
    low, high = (quality.others.get(end) for end in ends)
    interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
    return joined(f"{value:.4f}", _small(interval))


def _scored(quality: m.Quality | None) -> Markup:
    if quality is None:
        return joined()
    return joined(f"{quality.value:.4f}", _small(f"{quality.low:.4f} to {quality.high:.4f}"))


def _valued(name: Resource, figure: Figure) -> Markup:
    if figure.value is None:
        return _badge(figure.evidence)
    return joined(amount(name, figure.value), " ", _badge(figure.evidence))


def _candidates(manifest: m.Manifest) -> Markup:
    points = manifest.candidates
    if not any(c.quality is not None for c in points):
        return joined()
    bounds = [x.bound for x in manifest.limits if x.resource == "macs"]
    rows: list[list[str]] = [
        [
            joined(c.label, " ", tag("span", "chosen", class_="badge yes"))
            if c.chosen
            else c.label,
            si(c.macs, "MACs"),
            "not probed" if c.quality is None else f"{c.quality:.4f}",
        ]
        for c in sorted(points, key=lambda c: c.macs)
    ]
    return joined(
        tag("h2", "What was considered"),
        tag(
            "p",
            "Each point is a model that was probed before any training. The line joins those that "
            "no other beats in both quality and cost.",
            class_="soft",
        ),
        report_svg.scatter(points, metric(manifest.workload.metric), min(bounds, default=None)),
        _folded("All candidates", _table(("Candidate", "MACs", "Quality"), rows, numbers={1, 2})),
    )


def _layers(manifest: m.Manifest) -> Markup:
    before, after = manifest.layers_before, manifest.layers_after
    if not any(x.macs for x in (*before, *after)):
        return joined()
    rows: list[list[str]] = [_layer_row(a, b) for a, b in report_layers.paired(before, after)]
    titles = ("Layer", "Operator", "MACs before", "MACs after", "Parameters after", "Number type")
    return joined(
        tag("h2", "Where the cost is"),
        report_svg.columns(before, after),
        report_svg.legend((*before, *after)),
        _folded(f"All {len(rows)} layers", _table(titles, rows, numbers={2, 3, 4})),
    )


def _layer_row(was: m.Layer | None, now: m.Layer | None) -> list[str]:
    layer = now or was
    assert layer is not None
    return [
        layer.name,
        layer.op,
        "" if was is None else si(was.macs),
        "" if now is None else si(now.macs),
        "" if now is None else si(now.params),
        layer.dtype if was is None or was.dtype == layer.dtype else f"{was.dtype} → {layer.dtype}",
    ]


def _placement(manifest: m.Manifest) -> Markup:
    place = manifest.placement
    if place is None:
        return joined(tag("h2", "Where it runs"), tag("p", "The engine does not say."))
    own = place.counts.get(place.processor, 0)
    total = sum(place.counts.values())
    counts = [(place.processor, own)]
    counts += [(k, v) for k, v in sorted(place.counts.items()) if k != place.processor]
    listed = ", ".join(f"{n} on {k}" for k, n in counts)
    rows: list[list[str]] = [[x.name, x.op, x.processor, x.why] for x in place.fallback]
    return joined(
        tag("h2", "Where it runs"),
        tag("p", f"{own} of {total} nodes run on the target's own processor: {listed}."),
        report_svg.split(counts),
        _table(("Node elsewhere", "Operator", "Runs on", "Reason"), rows) if rows else "",
    )


def _passes(manifest: m.Manifest) -> Markup:
    if not manifest.passes:
        return joined()
    return joined(tag("h2", "What was done"), *(_step(p) for p in manifest.passes))


def _step(p: m.PassEntry) -> Markup:
    was, now = p.before.macs.value, p.after.macs.value
    change = ratio(was, now)
    effect = "" if not change or change == "same" else f"{amount('macs', now)} ({change})"
    config = json.dumps(p.config, sort_keys=True, ensure_ascii=False)
    return tag(
        "div",
        tag("h3", tag("code", p.name), tag("span", effect) if effect else ""),
        tag("p", joined("Taken back: ", p.undone), class_="soft") if p.undone else "",
        _noted("Did", p.did),
        _noted("Declined", p.declined),
        _folded("Settings", tag("p", tag("code", f"{config}, seed {p.seed}"))),
        class_="step undone" if p.undone else "step",
    )


def _noted(title: str, notes: Sequence[m.Note]) -> Markup:
    if not notes:
        return joined()
    items = [
        tag("li", tag("code", n.where) if n.where else "", " " if n.where else "", n.what,
            _small(n.why))
        for n in notes
    ]  # fmt: skip
    rest = items[_MANY:]
    return joined(
        tag("p", f"{title}:"),
        tag("ul", *items[:_MANY]),
        _folded(f"{len(rest)} more", tag("ul", *rest)) if rest else "",
    )


def _notes(manifest: m.Manifest) -> Markup:
    if not manifest.notes:
        return joined()
    return joined(tag("h2", "Notes"), tag("ul", *(tag("li", n) for n in manifest.notes)))


def _provenance(manifest: m.Manifest) -> Markup:
    found = manifest.provenance
    files = [f for s in manifest.segments for f in s.files()]
    rows: list[list[str]] = [
        ["Original model", _hash(manifest.workload.digest)],
        *([f"Data: {role}", _hash(digest)] for role, digest in sorted(found.data.items())),
        *([f"{f.file}, {amount('size_bytes', f.bytes)}", _hash(f.sha256)] for f in files),
        ["Versions", ", ".join(f"{k} {v}" for k, v in sorted(found.versions.items()))],
        ["Seed", str(found.seed)],
    ]
    said = "recipe.toml beside this page repeats the compile. Equal inputs give equal bytes."
    return joined(
        tag("h2", "Where it comes from"),
        tag("p", said, class_="soft"),
        _table(("", "SHA-256 or value"), rows),
    )


def _legend() -> Markup:
    rows: list[list[str]] = [[_badge(kind), text] for kind, text in _EVIDENCE.items()]
    return joined(tag("h2", "How to read the evidence"), _table(("Evidence", "Meaning"), rows))


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int] | None = None
) -> Markup:
    def cells(kind: str, row: Sequence[str]) -> Markup:
        right = numbers or set()
        return tag(
            "tr", *(tag(kind, c, class_="n" if i in right else None) for i, c in enumerate(row))
        )

    head, body = cells("th", titles), [cells("td", row) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _folded(title: str, content: Markup) -> Markup:
    return tag("details", tag("summary", title), content)


def _small(text: str) -> Markup:
    return tag("small", text) if text else joined()


def _badge(evidence: Evidence) -> Markup:
    return tag("span", evidence, class_=f"badge {evidence}")


def _verdict(holds: bool) -> Markup:
    return tag(
        "span", "holds" if holds else "not proven", class_=f"badge {'yes' if holds else 'no'}"
    )


def _hash(digest: str) -> Markup:
    return tag("span", digest, class_="hash")
