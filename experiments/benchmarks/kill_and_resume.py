"""Kill a run with signal 9 at random moments, resume it, and compare it with a run that was left alone, bit for bit.

    python -m experiments.benchmarks.kill_and_resume from_scratch --kills 18 --steps 60 --checkpoint-every 7
    python -m experiments.benchmarks.kill_and_resume smollm2_arithmetic --kills 2 --steps 6 --checkpoint-every 2

Each trial starts a new run, kills it once at a moment drawn from the length of the whole, and resumes it. What must be
equal: the fingerprint of policy and optimiser, and the bytes of metrics.jsonl, samples.jsonl and samples.json.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = ("metrics.jsonl", "samples.jsonl", "samples.json")


def command(name: str, run: str, folder: Path, fields: list[str]) -> list[str]:
    """The words that start a run, or go on with it."""
    return [sys.executable, "-m", "experiments", "run", name, "--id", run, "--runs-folder", str(folder), *fields]


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of what must be equal."""
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in FILES}
    return hashes | {"state": json.loads((folder / "summary.json").read_text())["state_sha256"][:16]}


def killed_at(words: list[str], seconds: float) -> str | None:
    """Start a run and kill it after some seconds; the last line it printed, or None if it was faster."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=seconds)
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.seek(0)
        return (output.read().strip().splitlines() or ["(nothing printed yet)"])[-1]


def main() -> int:
    """Run the trials; 0 if all of them ended as the uninterrupted run did."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare them with one left alone.")
    parser.add_argument("experiment")
    parser.add_argument("--kills", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    arguments, fields = parser.parse_known_args()
    moments, different = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def words(run: str) -> list[str]:
            return command(arguments.experiment, run, folder, fields)

        # The first run compiles; the second one shows how long a run takes once that is done.
        for run in ("compiling", "alone"):
            start = time.perf_counter()
            subprocess.run(words(run), check=True, capture_output=True)
            length = time.perf_counter() - start
        expected = fingerprint(folder / arguments.experiment / "alone")
        print(f"left alone: {length:.0f} s, {expected}", flush=True)
        trials = iter(range(10 * arguments.kills))
        for done in range(arguments.kills):
            last = None
            while last is None:
                trial, moment = next(trials), moments.uniform(0.05, 0.95) * length
                last = killed_at(words(f"killed-{trial}"), moment)
            subprocess.run(words(f"killed-{trial}"), check=True, capture_output=True)
            same = fingerprint(folder / arguments.experiment / f"killed-{trial}") == expected
            different += not same
            print(
                f"{done + 1:2d}: killed after {moment:5.1f} s ({last[:40]}): {'same' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{arguments.kills - different} of {arguments.kills} killed and resumed runs equal the one left alone")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
