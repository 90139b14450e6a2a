"""An Android phone, through the real adb client and ONNX Runtime's own benchmark program.

Phones have no Python: `onnxruntime_perf_test`, built for the phone from ONNX Runtime's sources,
runs each segment there. NOTE says what every profile says as well: no phone was at hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from edgebudget.energy import android
from edgebudget_runtime import codec, engine, integrity
from edgebudget_runtime.cost import Figure
from edgebudget_runtime.device_id import Device
from edgebudget_runtime.errors import TargetError
from edgebudget_runtime.manifest import Manifest, Segment
from edgebudget_runtime.measure import layers, meter
from edgebudget_runtime.measure.battery import Gauge
from edgebudget_runtime.measure.conditions import unknown
from edgebudget_runtime.measure.job import Job

NOTE = "measured through adb with onnxruntime_perf_test; edgebudget was never tested on a phone"
_PLACE = "/data/local/tmp"
_TRACED = 20
_BURST_S = 10  # of running for its energy: phones renew a gauge every second or more
_IDLE_S = 20.0
_GAUGE_S = 0.5  # every sample is a round trip
_LOST = ("not found", "offline", "no devices", "closed", "protocol fault", "disconnected")


class Adb:
    """A phone that `adb devices` lists."""

    def __init__(self, serial: str, runner: Path | None, silence_s: float) -> None:
        self.name = f"adb:{serial}"
        self._serial, self._runner, self._silence_s = serial, runner, silence_s
        self._started = False

    def lines(self, job: Job, folder: Path) -> Iterator[str]:
        """What the probe would tell, made from what the benchmark program writes.

        Raises:
            ArtifactError: EB500 to EB507 the folder is not a whole artifact.
            TargetError: EB640 the phone cannot be reached, EB641 there is no benchmark program
                for it, EB643 it was lost, EB644 the program failed there, EB645 it cannot run
                this engine.
        """
        manifest = Manifest.load(folder)
        if job.provider != engine.CPU:
            raise TargetError(
                "EB645", f"{job.provider} cannot be timed over adb", hint="use --target cpu"
            )
        self._started = False
        self._reach()
        runner = self._checked_runner()
        self._started = True
        place = f"{_PLACE}/edgebudget-{secrets.token_hex(6)}"
        try:
            self._send(manifest, folder, runner, place)
            yield from self._measure(job, manifest, runner, place)
        finally:
            self._run("shell", f"rm -rf {place}", check=False)
        yield _line("end")

    def _measure(self, job: Job, manifest: Manifest, runner: Path, place: str) -> Iterator[str]:
        yield _line("device", device=dataclasses.asdict(self._device(runner, job.threads)))
        yield _line("note", text=NOTE)
        yield self._state("before")
        alone = {s.path[0]: s.id for s in manifest.subnetworks if len(s.path) == 1}
        if any(len(s.path) > 1 for s in manifest.subnetworks):
            yield _line("note", text="over adb, paths of several segments are not timed as one")
        each = max(job.seconds / len(manifest.segments), 1.0)
        for segment in manifest.segments:
            ms = self._times(segment, job, place, ["-m", "duration", "-t", f"{each:.0f}"])
            paths = {alone[segment.id]: ms} if segment.id in alone else {}
            yield _line("times", paths=paths, segments={segment.id: ms})
        yield _line("memory", figure=_plain(unknown("not read over adb")))
        yield self._state("after")
        if job.layers:
            for segment in manifest.segments:
                yield self._layers(segment, job, place)
        if job.energy:
            yield from self._energy(job, manifest, alone, place)

    def _reach(self) -> None:
        """Whether the phone is there and lets us in.

        Raises:
            TargetError: EB640 it does not.
        """
        state = self._run("get-state", check=False)
        if state.returncode == 0 and state.stdout.strip() == "device":
            return
        said = _words(state)
        hints = {
            "unauthorized": "unlock the phone and allow this computer",
            "offline": "plug it in again, or `adb reconnect`",
        }
        hint = next((h for word, h in hints.items() if word in said), "`adb devices` lists them")
        raise TargetError("EB640", f"{self.name} cannot be reached: {said}", hint=hint)

    def _checked_runner(self) -> Path:
        if self._runner is None or not self._runner.is_file():
            what = "" if self._runner is None else f" at {self._runner}"
            raise TargetError(
                "EB641",
                f"{self.name} needs ONNX Runtime's onnxruntime_perf_test, and there is none{what}",
                hint="build it from ONNX Runtime's sources (build.sh --android --build_shared_lib)"
                " and name it with --runner; libraries beside it are sent along",
            )
        return self._runner

    def _send(self, manifest: Manifest, folder: Path, runner: Path, place: str) -> None:
        names = dict.fromkeys(f.file for s in manifest.segments for f in s.files())
        files = {name: integrity.locate(folder, name) for name in names}
        folders = sorted({f"{place}/{name}".rpartition("/")[0] for name in names})
        self._run("shell", f"mkdir -p {' '.join(map(shlex.quote, folders))}")
        for name, path in files.items():
            self._run("push", str(path), f"{place}/{name}")
        for library in (runner, *sorted(runner.parent.glob("*.so"))):
            self._run("push", str(library), f"{place}/{library.name}")
        self._run("shell", f"chmod 755 {place}/{shlex.quote(runner.name)}")

    def _device(self, runner: Path, threads: int | None) -> Device:
        """The phone; the engine's version is not told, so that the program's hash stands in."""

        def ask(command: str) -> str:
            return self._run("shell", command).stdout.strip()

        cores = ask("nproc")
        build = hashlib.sha256(runner.read_bytes()).hexdigest()[:12]
        count = int(cores) if cores.isdigit() else 1
        return Device(
            cpu=ask("getprop ro.soc.model") or ask("getprop ro.product.model"),
            cores=count,
            arch=ask("getprop ro.product.cpu.abi"),
            system=f"Android {ask('getprop ro.build.version.release')}",
            engine=engine.CPU,
            engine_version=f"perf_test {build}",
            threads=threads or count,
        )

    def _state(self, when: str) -> str:
        found = android.battery(self._run("shell", "dumpsys battery").stdout).temperature_c
        why = "the battery service tells no temperature"
        figure = unknown(why)
        if found is not None:
            figure = Figure(value=found, evidence="measured", how="the battery's own sensor")
        return _line("state", figures={f"temperature_{when}_c": _plain(figure)})

    def _times(self, segment: Segment, job: Job, place: str, how: list[str]) -> list[float]:
        """Milliseconds of each run of a segment."""
        name = Path(str(self._runner)).name
        threads = [] if job.threads is None else ["-x", str(job.threads)]
        options = ["-I", "-S", "1", "-e", "cpu", "-C", "session.intra_op.allow_spinning|0"]
        command = [f"./{name}", *options, *threads, *how, segment.file, "result.csv"]
        done = self._run(
            "shell",
            f"cd {place} && rm -f result.csv && LD_LIBRARY_PATH=. {shlex.join(command)} "
            ">out.txt 2>&1 && cat result.csv || (tail -n 3 out.txt >&2; exit 1)",
            check=False,
        )
        if done.returncode:
            self._fail(done, f"{segment.id} cannot be run on {self.name}")
        ms = [x for x in map(_milliseconds, done.stdout.splitlines()) if x is not None]
        if not ms:
            raise TargetError(
                "EB644",
                f"onnxruntime_perf_test on {self.name} told no time of {segment.id}",
                hint="use a build of ONNX Runtime 1.24 or newer",
            )
        return ms

    def _layers(self, segment: Segment, job: Job, place: str) -> str:
        self._times(segment, job, place, ["-m", "times", "-r", str(_TRACED), "-p", "trace"])
        # The engine adds the time to the name.
        told = self._run("shell", f"cd {place} && cat trace*.json && rm -f trace*.json").stdout
        with tempfile.TemporaryDirectory(prefix="edgebudget-") as name:
            file = Path(name) / "trace.json"
            file.write_text(told, encoding="utf-8")
            kernels = layers.read(file)
        listed = [dataclasses.asdict(k) for k in kernels]
        return _line("layers", segment=segment.id, kernels=listed)

    def _energy(
        self, job: Job, manifest: Manifest, alone: dict[str, str], place: str
    ) -> Iterator[str]:
        state = android.battery(self._run("shell", "dumpsys battery").stdout)
        gauge = Gauge("the phone's battery", self._watts, period_s=_GAUGE_S)
        why = state.why
        if state.discharging and self._watts() is None:
            why = f"{android.SUPPLY}/current_now and voltage_now are not readable"
        if why:
            yield _line("idle", figure=_plain(unknown(why)))
            return
        gauge.start()
        try:
            idle = meter.idle_power(gauge, _IDLE_S)
            yield _line("idle", figure=_plain(idle))
            for id, path in alone.items():
                run = partial(self._some, manifest.segment(id), job, place)
                found = meter.inference(gauge, run, idle, 5 * _BURST_S)
                net, gross = _plain(found.net_mj), _plain(found.gross_mj)
                yield _line("energy", path=path, net=net, gross=gross)
                yield _line("note", text=f"the energy of {path} includes loading it every "
                            f"{_BURST_S} s")  # fmt: skip
        finally:
            gauge.stop()

    def _some(self, segment: Segment, job: Job, place: str) -> int:
        """Run a segment for some seconds; how often."""
        return len(self._times(segment, job, place, ["-m", "duration", "-t", str(_BURST_S)]))

    def _watts(self) -> float | None:
        return android.watts(self._run("shell", android.GAUGE, check=False).stdout)

    def _run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One command of adb's.

        Raises:
            TargetError: EB640 there is no adb, EB643 no answer or the phone is gone, EB644.
        """
        client = shutil.which("adb")
        if client is None:
            raise TargetError(
                "EB640", "there is no adb here", hint="install Android's platform tools"
            )
        try:
            done = subprocess.run(
                [client, "-s", self._serial, *arguments],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=self._silence_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TargetError(
                "EB643",
                f"{self.name} gave no sign of life for {self._silence_s:g} s",
                hint="look at the phone",
            ) from None
        if check and done.returncode:
            self._fail(done, f"`adb {arguments[0]}` failed on {self.name}")
        return done

    def _fail(self, done: subprocess.CompletedProcess[str], what: str) -> None:
        said = _words(done)
        if self._started and any(word in said for word in _LOST) and "device" in said:
            raise TargetError("EB643", f"{self.name} was lost: {said}", hint="plug it in again")
        raise TargetError("EB644", f"{what}: {said}", hint="try the command by hand with adb shell")


def _milliseconds(line: str) -> float | None:
    """Of one line of the benchmark program's file: model, seconds, memory, load, number."""
    fields = line.rsplit(",", 4)
    try:
        return float(fields[1]) * 1e3 if len(fields) == 5 and float(fields[1]) > 0 else None
    except ValueError:
        return None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """The first line that adb or the phone said."""
    text = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return text[0] if text else f"exit {done.returncode}"


def _line(kind: str, **what: Any) -> str:
    return json.dumps({"kind": kind, **what}) + "\n"


def _plain(figure: Figure) -> Any:
    return codec.encode(Figure, figure)
