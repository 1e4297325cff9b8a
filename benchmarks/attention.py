"""Time, memory and error of the attention routes at Flux's width: 24 heads x 128, bfloat16, tokens of `tree128`.

    python3 run.py bench attention [--device cpu|cuda] [--patches N ...] [--json]

`merge+source` and `partition+source` read a source besides, as *Reference Gate* does: keys and values of as many patches,
under a gate that is 1 for a half of the patches and 0 for the others and the text. `merge+instead` and `partition+instead`
read it in place of the picture's own keys, as *Source Gate* does. Their ratio is to `plain+source`, the unmasked attention to
as many keys.

Times are ratios to the plain, unmasked attention over the same sequence. The routes take turns, and the ratio is the
median over the turns, so that other load on the machine affects all of them alike. Peak memory is what one call adds to
its inputs, its result included. The error is the largest absolute difference from float64 over some queries of some
heads. A run over all sizes replaces its device's part of benchmarks/attention.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import ROUTES, Regions, Source, masked_attention
from ..kernels.hierarchy import hierarchy
from ..kernels.visibility import region_bias
from ..training.engine.timing import seconds

SIZES = (1024, 4096, 16384)
HEADS, WIDTH, PRESET = 24, 128, "tree128"
TABLE = Path(__file__).with_suffix(".md")
SECONDS_PER_SIZE = 90
TURNS = 30
SOURCE, INSTEAD = "+source", "+instead"  # these endings: with keys and values of a source
NAMES = ("plain", *ROUTES, "plain" + SOURCE, *(route + ending for ending in (SOURCE, INSTEAD) for route in ("merge", "partition")))


class Case:
    """Inputs of one size, the same in every process."""

    def __init__(self, patches: int, device: str) -> None:
        side = round(patches**0.5)
        if side * side != patches:
            raise SystemExit(f"{patches} patches are no square grid; give 1024, 4096 or 16384.")
        made = hierarchy(PRESET)
        self.bias = region_bias(made.boxes(), torch.zeros(made.token_count), (side, side), made.token_count).to(device)
        self.regions = Regions(self.bias)
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, HEADS, self.regions.length, WIDTH)
        self.q, self.k, self.v = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        text = self.regions.length - patches
        gate = torch.zeros(self.regions.length, device=device)
        gate[text : text + patches // 2] = 1
        keys, values = (
            torch.randn((1, HEADS, patches, WIDTH), generator=generator, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        self.sources = {SOURCE: Source(keys, values, gate), INSTEAD: Source(keys, values, gate, (text, self.regions.length))}
        self.more = torch.cat([self.k, keys], 2), torch.cat([self.v, values], 2)

    def call(self, name: str) -> Tensor:
        if name == "plain":
            return F.scaled_dot_product_attention(self.q, self.k, self.v)
        if name == "plain" + SOURCE:
            return F.scaled_dot_product_attention(self.q, *self.more)
        route, ending = split(name)
        return masked_attention(self.q, self.k, self.v, self.regions, route, source=self.sources.get(ending))

    def error(self, name: str, out: Tensor) -> float:
        rows = torch.linspace(0, self.regions.length - 1, 97, device=out.device).long()
        ending = split(name)[1]
        keys, values = self.more if ending else (self.k, self.v)
        q, k, v = self.q[0, ::8, rows].double(), keys[0, ::8].double(), values[0, ::8].double()
        scores = q @ k.transpose(-1, -2) / WIDTH**0.5
        if not name.startswith("plain"):
            scores[..., : self.regions.tokens] += self.bias[rows].double()
            if ending:
                gate = self.sources[ending].gate[0, rows].double()[:, None]
                scores[..., self.regions.length :] += gate.log()
            if ending == INSTEAD:
                first, last = self.sources[ending].instead
                scores[..., first:last] += (1 - gate).log()
        return (out[0, ::8, rows].double() - torch.softmax(scores, dim=-1) @ v).abs().max().item()


def split(name: str) -> tuple[str, str]:
    """The route, and the ending or ""."""
    route, plus, ending = name.partition("+")
    return route, plus + ending


def unavailable(name: str, device: str) -> str | None:
    if name == "flex" and device == "cpu":
        return "fast only where it is compiled for CUDA"
    return None


def peak_mib(name: str, patches: int, device: str, case: Case) -> float | None:
    """MiB that one call adds at its peak. On a CPU the call has a process of its own. None where the system does not
    tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.call(name)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, "-m", __spec__.name, "--memory-of", name, "--patches", str(patches)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def peak_mib_here(name: str, patches: int) -> float | None:
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    Case(64, "cpu").call(name)  # the memory of libraries and thread pools does not count
    case = Case(patches, "cpu")
    reset.write_text("5")  # the high-water mark starts again at what is resident now
    kib = [int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])]
    case.call(name)
    kib.append(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]))
    return (kib[1] - kib[0]) / 1024


def measure(patches: int, device: str) -> tuple[list[dict], dict[str, str]]:
    """The results of one size, and the unavailable routes with the reason."""
    case = Case(patches, device)
    missing = {name: reason for name in NAMES if (reason := unavailable(name, device))}
    errors, first = {}, {}
    for name in NAMES:
        if name in missing:
            continue
        try:
            errors[name] = case.error(name, case.call(name))
            first[name] = seconds(lambda name=name: case.call(name), device, 1)
        except (RuntimeError, ValueError, ImportError) as failure:  # no kernel, no compiler, no memory
            missing[name] = str(failure).strip().splitlines()[0]
    calls = max(1, min(50, round(0.02 / first["plain"])))
    turns = max(1, min(TURNS, round(SECONDS_PER_SIZE / (calls * sum(first.values())))))
    ratios = {name: [] for name in first}
    order = list(first)
    for turn in range(turns):
        print(f"\r{patches} patches: turn {turn + 1} of {turns}", end="", file=sys.stderr, flush=True)
        taken = {name: seconds(lambda name=name: case.call(name), device, calls) for name in order}
        for name in order:
            plain = "plain" + (SOURCE if split(name)[1] else "")
            ratios[name].append(taken[name] / taken.get(plain, math.nan))
        order = order[1:] + order[:1]
    print(file=sys.stderr)
    results = [
        {
            "device": device,
            "patches": patches,
            "tokens": case.regions.tokens,
            "route": name,
            "ratio": round(statistics.median(ratios[name]), 3),
            "peak_mib": peak if peak is None else round(peak, 1),
            "max_error": float(f"{errors[name]:.2g}"),
        }
        for name in first
        for peak in [peak_mib(name, patches, device, case)]
    ]
    return results, missing


def machine(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def section(device: str, results: list[dict], missing: dict[int, dict[str, str]], command: str) -> str:
    lines = [
        f"## {device}",
        "",
        f"{machine(device)}; {date.today()}; `{command}`",
        "",
        "| patches | tokens | route | time / plain | peak MiB | largest error |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    for patches, reasons in missing.items():
        for line in (result for result in results if result["patches"] == patches):
            peak = "not measured" if line["peak_mib"] is None else f"{line['peak_mib']:.0f}"
            numbers = f"{line['ratio']:.2f} | {peak} | {line['max_error']:.1e}"
            lines.append(f"| {patches} | {line['tokens']} | {line['route']} | {numbers} |")
        for name, reason in reasons.items():
            lines.append(f"| {patches} | {hierarchy(PRESET).token_count} | {name} | not available: {reason} | | |")
    return "\n".join(lines) + "\n"


def write(device: str, text: str) -> None:
    """Replace the device's section of the table and keep the other one's."""
    head = (
        "# Masked attention\n\n"
        f"24 heads x 128, bfloat16, `{PRESET}` under its hard visibility, batch 1, forward only. *Time* is the\n"
        "median ratio to the plain, unmasked attention, measured in turns in one run. *Peak* is what one call adds\n"
        "to its inputs, its result included. *Error* is the largest absolute difference from float64 over 97\n"
        "queries of 3 heads (for *plain*, from the unmasked softmax). Routes *+source* read as many patches of a\n"
        "source besides, *+instead* in place of the picture's own, under a gate that is 1 for half of the patches; their\n"
        "time is the ratio to *plain+source*, the unmasked attention to as many keys.\n\n"
    )
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    sections = {part.split("\n", 1)[0]: f"## {part.strip()}\n" for part in old.split("\n## ")[1:]}
    sections[device] = text
    TABLE.write_text(head + "\n".join(sections[name] for name in sorted(sections)), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="run.py bench attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patches", type=int, nargs="+", default=list(SIZES), help="the table wants all of them")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; use --device cpu.")
    with torch.inference_mode():
        if options.memory_of:
            print(json.dumps(peak_mib_here(options.memory_of, options.patches[0])))
            return 0
        results, missing = [], {}
        for patches in options.patches:
            lines, missing[patches] = measure(patches, options.device)
            results += lines
    text = section(options.device, results, missing, " ".join(["python3 run.py bench attention", *argv]))
    print(text)
    if set(SIZES) <= set(options.patches):
        write(options.device, text)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
