"""Sent to a device as text: unpacks the parcel from stdin, runs the probe, and tidies up.

Every Python 3 can read this file, so that one that is too old is named as such. The text is the
first argument; the second one is "install" where missing packages may be installed.
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile

OLDEST = (3, 11)
NEEDS = {"numpy": (1, 26), "onnxruntime": (1, 24)}  # as the runtime does
START = "import sys; exec(sys.argv[1])"


def say(what: object) -> None:
    """Tell what is missing."""
    sys.stdout.write(json.dumps({"kind": "missing", "what": what}) + "\n")
    sys.stdout.flush()


def lacking() -> "list[str]":
    """Packages that are not here or too old, as pip names them."""
    found = []
    for name, oldest in NEEDS.items():
        try:
            version = __import__(name).__version__
            here = tuple(int(x) for x in version.split(".")[:2])
        except Exception:  # a broken package is a missing one
            here = (0,)
        if here < oldest:
            found.append("{}>={}.{}".format(name, *oldest))
    return found


def unpack(folder: str) -> str:
    """Fill the folder from stdin; the job."""
    left = struct.unpack(">Q", sys.stdin.buffer.read(8))[0]
    parcel = tempfile.TemporaryFile(dir=folder)
    while left:
        data = sys.stdin.buffer.read(min(left, 1 << 20))
        if not data:
            raise SystemExit(1)
        left -= len(data)
        parcel.write(data)
    with zipfile.ZipFile(parcel) as archive:
        archive.extractall(folder)
        return archive.read("job.json").decode()


def stop(*_: object) -> None:
    """End in order, when told to."""
    raise SystemExit(1)


def work() -> int:
    """Measure in a folder that is gone afterwards; the exit code is the probe's."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, stop)
    folder = tempfile.mkdtemp(prefix="edgebudget-")
    child = None
    try:
        command = [sys.executable, "-m", "edgebudget_runtime.measure.probe", unpack(folder)]
        environment = dict(os.environ, PYTHONPATH=folder)
        child = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL)
        threading.Thread(target=watch, args=(child,), daemon=True).start()
        code = child.wait()
        return code if code >= 0 else 128 - code
    finally:
        if child is not None and child.poll() is None:
            child.kill()
            child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def watch(child: "subprocess.Popen[bytes]") -> None:
    """End the probe when stdin ends: whoever listened is gone."""
    while os.read(0, 1):
        pass
    child.terminate()


def main() -> int:
    """Check what is here, then work."""
    if sys.version_info < OLDEST:
        say(["Python {}.{} or newer".format(*OLDEST)])
        return 0
    missing = lacking()
    if missing and sys.argv[2:] == ["install"]:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *missing]
        if subprocess.call(pip, stdin=subprocess.DEVNULL, stdout=2):
            say([*missing, "(pip could not install them)"])
            return 0
        os.execv(sys.executable, [sys.executable, "-c", START, sys.argv[1], "-"])
    if missing:
        say(missing)
        return 0
    return work()


if __name__ == "__main__":
    sys.exit(main())
