"""A face detector from elsewhere to int8: do its boxes survive?

Calibrated on photographs without regard to faces, scored on the pictures beside the model: every
box of the float model above score 0.7 is matched by its anchor, by its best IoU, and (the rest
having been suppressed) by its best IoU again. The NPU's integer graph runs on the CPU engine;
where the QNN engine is installed, its placement is asked too.

    python -m benchmarks.ptq_ultraface --data DIR --photos DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from benchmarks._quantizing import CPU, NPU, context, in_random_order, quantize_static
from benchmarks.harness import ROOT, data_folder, save
from edgebudget.detection import DetectionAgreement
from edgebudget.load_model import load_model
from edgebudget.session import CpuSession
from edgebudget.workload import Array, Sample
from edgebudget_passes import clean_graph, quantize_int8

_THRESHOLD, _SUPPRESSED, _LOST = 0.7, 0.3, 0.5
_MEAN_IOU, _LIMIT_S = 0.95, 120.0
_PHOTOS = 200
_FILES = ("version-RFB-320.onnx", "version-RFB-320_simplified.onnx")
# The simplified file leaves the decoding of boxes out, so it is done here: anchor sizes in
# pixels by stride, and what centre and size offsets are multiplied by.
_ANCHORS = {8: (10, 16, 24), 16: (32, 48), 32: (64, 96), 64: (128, 192, 256)}
_WIDTH, _HEIGHT = 320, 240
_CENTRE, _SIZE = 0.1, 0.2


class Photos:
    """Pictures as the detector takes them: 320x240 RGB, (x - 127) / 128."""

    name = "photos"

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> Sample:
        with Image.open(self._files[index]) as picture:
            small = picture.convert("RGB").resize((320, 240), Image.Resampling.BILINEAR)
        value = (np.asarray(small, np.float32) - 127.0) / 128.0
        return Sample({"input": np.ascontiguousarray(value.transpose(2, 0, 1))})

    def digest(self) -> str:
        return f"{self.name}/{len(self)}"


def main(arguments: list[str]) -> int:
    """Quantize the detector for both targets, and compare boxes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptq_ultraface", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/ultraface")
    parser.add_argument("--photos", type=Path, default=data_folder() / "imagenet-samples")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    test, train = (Photos(sorted(f.glob("*.jpg"))) for f in (options.data, options.photos))
    if not len(test) or not len(train):
        sys.stderr.write("skipped: no detector or no photographs (give --data and --photos)\n")
        return 0
    few = Photos(sorted(options.photos.glob("*.jpg"))[:: max(1, len(train) // _PHOTOS)])
    result: dict[str, Any] = {}
    for file in _FILES:
        result[file] = _file(options.data / file, few, test, options.threads)
    ok = {}
    for file in _FILES:
        for target in ("cpu", "npu"):
            row = result[file]["rows"][f"edgebudget {target}"]
            ok[f"{file} {target}: mean IoU {_MEAN_IOU}"] = row["best_iou"] >= _MEAN_IOU
            ok[f"{file} {target}: no box lost"] = row["lost"] == 0
            ok[f"{file} {target}: within 2 minutes"] = row["seconds"] <= _LIMIT_S
    save("ptq_ultraface", {**result, "calibration": len(few), "ok": ok})
    for text, good in ok.items():
        sys.stderr.write(f"{'ok  ' if good else 'MISS'} {text}\n")
    return 0 if all(ok.values()) else 1


def _file(path: Path, train: Photos, test: Photos, threads: int) -> dict[str, Any]:
    program = load_model(str(path)).program
    task = DetectionAgreement()
    start = time.perf_counter()
    cleaned = clean_graph.run(program, clean_graph.PASS.config(), context(train, CPU, task))
    cleaning = time.perf_counter() - start
    models: dict[str, onnx.ModelProto] = {"float": cleaned.program.body}
    rows: dict[str, dict[str, Any]] = {"float": {}}
    for target in (CPU, NPU):
        start = time.perf_counter()
        done = quantize_int8.run(
            cleaned.program, quantize_int8.Config(), context(train, target, task)
        )
        row = f"edgebudget {target.family}"
        models[row] = done.program.body
        rows[row] = {
            "seconds": cleaning + time.perf_counter() - start,
            "did": [f"{n.where}: {n.what} ({n.why})" for n in done.did],
        }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        models["ORT U8S8"] = quantize_static(models["float"], train, "QUInt8", Path(folder))
        rows["ORT U8S8"] = {"seconds": time.perf_counter() - start}
    sessions = {
        k: CpuSession(m.SerializeToString(), threads=threads, exact=False)
        for k, m in models.items()
    }
    outputs = {k: _outputs(s, test, decode="simplified" in path.name) for k, s in sessions.items()}
    feed = {"input": test.sample(0).inputs["input"][None]}
    times = in_random_order({k: [partial(s.run, feed)] for k, s in sessions.items()}, rounds=100)
    for name, figures in rows.items():
        figures.update(times[name], bytes=models[name].ByteSize())
        figures.update(_compare(outputs["float"], outputs[name]))
    rows["edgebudget npu"]["note"] = "timed on the CPU engine, which has no 16-bit kernels"
    rows["edgebudget npu"]["placement"] = _placement(models["edgebudget npu"])
    return {"rows": rows}


def _outputs(session: CpuSession, test: Photos, *, decode: bool) -> list[dict[str, Array]]:
    found = []
    for i in range(len(test)):
        out = session.run({"input": test.sample(i).inputs["input"][None]})
        found.append({**out, "boxes": _decoded(out["boxes"])} if decode else out)
    return found


def _decoded(offsets: Array) -> Array:
    """Corners from offsets [1, 4420, 4] to the anchors, all in shares of the picture."""
    rows = []
    for stride, sizes in _ANCHORS.items():
        across, down = -(-_WIDTH // stride), -(-_HEIGHT // stride)
        for y in range(down):
            for x in range(across):
                centre = ((x + 0.5) / across, (y + 0.5) / down)
                rows += [(*centre, size / _WIDTH, size / _HEIGHT) for size in sizes]
    anchors = np.clip(np.array(rows), 0.0, 1.0)
    middle = offsets[..., :2] * _CENTRE * anchors[:, 2:] + anchors[:, :2]
    half = np.exp(offsets[..., 2:] * _SIZE) * anchors[:, 2:] / 2.0
    return np.concatenate([middle - half, middle + half], axis=-1)


def _compare(floats: list[dict[str, Array]], found: list[dict[str, Array]]) -> dict[str, Any]:
    """Boxes of the float model above the threshold against those found."""
    same: list[float] = []
    best: list[float] = []
    after: list[float] = []
    for a, b in zip(floats, found, strict=True):
        wanted, got = a["scores"][0, :, 1] > _THRESHOLD, b["scores"][0, :, 1] > _THRESHOLD
        ours, theirs = b["boxes"][0], a["boxes"][0]
        same += _iou(theirs[wanted], ours[wanted]).tolist()
        best += _best(theirs[wanted], ours[got])
        kept = [
            _suppress(o["boxes"][0][w], o["scores"][0, w, 1]) for o, w in ((a, wanted), (b, got))
        ]
        after += _best(kept[0], kept[1])
    return {
        "boxes": len(best),
        "same_anchor_iou": float(np.mean(same)),
        "best_iou": float(np.mean(best)),
        "lost": sum(x < _LOST for x in best),
        "boxes_after_suppression": len(after),
        "iou_after_suppression": float(np.mean(after)),
        "worst_after_suppression": min(after),
        "lost_after_suppression": sum(x < _LOST for x in after),
    }


def _iou(a: Array, b: Array) -> Array:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    inside = np.clip(high - low, 0, None).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    shared: Array = inside / np.maximum(areas[0] + areas[1] - inside, 1e-12)
    return shared


def _best(wanted: Array, found: Array) -> list[float]:
    if not len(found):
        return [0.0] * len(wanted)
    return [float(_iou(box, found).max()) for box in wanted]


def _suppress(boxes: Array, scores: Array) -> Array:
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(float(_iou(boxes[i], boxes[j])) < _SUPPRESSED for j in kept):
            kept.append(int(i))
    return boxes[kept]


def _placement(model: onnx.ModelProto) -> dict[str, int] | str:
    """Nodes by processor as QNN places them, or why that is unknown."""
    from edgebudget.target_registry import get

    target = get("npu")
    known = target.available()
    if not known.ok:
        return f"unknown: {known.why}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        nodes = target.placement(file).nodes
    return {p: sum(n.processor == p for n in nodes) for p in sorted({n.processor for n in nodes})}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
