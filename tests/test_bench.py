"""tests/bench: the speed benchmarks still run, on small inputs."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "seg_speed --size 64 --bs 2 --rounds 1", "det_speed --variant n --size 64 --bs 2 --images 2 --brief 2 --rounds 1",
    "cls_speed --net efficientnetv2_b0 --size 64 --bs 2 --rounds 1"])
def test_a_benchmark_prints_ratios(command):
    name, *flags = command.split()
    done = subprocess.run([sys.executable, "-m", f"tests.bench.{name}", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum("ratio" in line for line in done.stdout.splitlines()) >= 3
