"""The report's chapter on several sub-networks."""

from __future__ import annotations

from edgebudget import report_svg
from edgebudget.frontier import Way, as_candidates, ways
from edgebudget.report_markup import Markup, amount, joined, metric, si, tag
from edgebudget_runtime.manifest import Manifest


def chapter(manifest: Manifest) -> Markup:
    """Every sub-network and operating point; nothing for an artifact of one."""
    found = ways(manifest)
    if len(found) < 2:
        return joined()
    known = [w for w in found if w.quality is not None]
    bounds = [x.bound for x in manifest.limits if x.resource == "macs"]
    plot = joined()
    if known:
        points = as_candidates(tuple(known), manifest.subnetworks[0].id)
        plot = report_svg.scatter(
            points, metric(manifest.workload.metric), min(bounds, default=None)
        )
    titles = ("Sub-network", "MACs", "", "Bytes", "Quality", "95 % interval", "")
    head = tag("thead", tag("tr", *(tag("th", t) for t in titles)))
    body = tag("tbody", *(_row(w) for w in found))
    return joined(
        tag("h2", "One artifact, every budget"),
        tag("p", _sharing(manifest), class_="soft"),
        plot,
        tag("div", tag("table", head, body), class_="scroll"),
    )


def _row(way: Way) -> Markup:
    q = way.quality
    cells = (
        way.id,
        si(way.macs.value or 0.0, "MACs"),
        "mean" if way.mean else "worst case",
        amount("size_bytes", way.size_bytes.value),
        "unknown" if q is None else f"{q.value:.4f}",
        "" if q is None else f"{q.low:.4f} to {q.high:.4f}",
        way.certified or _ended(way),
    )
    return tag("tr", *(tag("td", c) for c in cells))


def _ended(way: Way) -> str:
    return ", ".join(f"{share:.0%} end at {id}" for id, share in way.shares.items() if share > 0)


def _sharing(manifest: Manifest) -> str:
    s = manifest.sharing
    if s is None:
        return ""
    return (
        f"Sub-networks share weights: {amount('size_bytes', float(s.stored_bytes))} hold all of "
        f"them, {s.stored_bytes / max(1, s.largest_bytes):.2f} times the largest alone; apart they "
        f"would take {amount('size_bytes', float(s.separate_bytes))}. Operating points leave the "
        "chain early where an input is easy; their costs are means."
    )
