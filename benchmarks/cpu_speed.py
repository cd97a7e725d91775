#!/usr/bin/env python3
"""The native engine against llama.cpp (and llama-bench builds of others) on models of the same shapes.

    pip install -e '.[dev]' gguf llama-cpp-python
    python benchmarks/cpu_speed.py [--quick] [--shapes 0.6B 1.7B] [--peer ik:IQ2_BN=BINARY,MODEL.gguf@0.6B]
    python benchmarks/cpu_speed.py --render        tables and chart again, from results/cpu-speed.json

The exactness tests run first; a failure ends it. Every engine and format is a process of its own (cpu_worker.py).
Within a round each is timed once, one after the other, so that a busy moment of the machine meets all of them; the
figures are medians over rounds, ratios are medians of the ratios inside a round. Read bandwidth is measured in the
same rounds. KV caches are float16 everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import cpu_render  # noqa: E402

RESULT = ROOT / "results/cpu-speed.json"
NATIVE = {  # name -> layout, head
    "2bit+screened4": ("2bit", "screened4"),
    "base3+screened4": ("base3", "screened4"),
    "2bit+screened": ("2bit", "screened"),
    "2bit+float": ("2bit", "float"),
}
QUICK = ("2bit+screened4", "base3+screened4", "F16", "Q4_0", "TQ2_0", "TQ2_0-eQ4_K")


class Worker:
    """A process of cpu_worker.py."""

    def __init__(self, arguments: list[str], isa: str | None) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        if isa:
            environment["BITDISTILL_ISA"] = isa
        command = [sys.executable, str(Path(__file__).with_name("cpu_worker.py")), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        """Its facts and peak memory; the process is gone afterwards."""
        facts = self.ask(do="end")
        self.process.wait()
        return facts


class LlamaBench:
    """A llama-bench binary of another engine: one process for each timing."""

    def __init__(self, binary: str, model: str, threads: int) -> None:
        self.command = [binary, "-m", model, "-t", str(threads), "-r", "1", "-o", "json"]
        self.facts: dict[str, Any] = {"weight_bytes": Path(model).stat().st_size}

    def ask(self, do: str, tokens: int, sequences: int = 1) -> dict[str, Any]:
        """As Worker.ask."""
        p, n = (tokens, 0) if do == "prefill" else (0, tokens)
        out = subprocess.run(
            [*self.command, "-p", str(p), "-n", str(n)], check=True, capture_output=True, text=True
        )
        return {"seconds": tokens / json.loads(out.stdout)[0]["avg_ts"]}

    def end(self) -> dict[str, Any]:
        """As Worker.end; its memory is not measured."""
        return self.facts


def run_shape(args: argparse.Namespace, shape: str, threads: int) -> dict[str, Any]:
    """All engines on one shape with a number of threads."""
    import shapes

    from bitdistill.engine import _native

    folder = args.models / shape
    student = str(shapes.write_student(shape, folder / "student"))
    f16 = shapes.write_f16(shape, folder / "F16.gguf")
    engines: dict[str, Worker | LlamaBench] = {}
    wanted = args.only or (QUICK if args.quick else None)
    context = str(args.context)
    for name, (layout, head) in NATIVE.items():
        if wanted is None or name in wanted:
            engines[f"bitdistill {name}"] = Worker(
                ["native", student, str(threads), context, layout, head], args.isa
            )
    for name in ["F16", *shapes.gguf_types(shape)]:
        if wanted is None or name in wanted:
            path = f16 if name == "F16" else shapes.write_quantized(f16, name, threads)
            engines[f"llama.cpp {name}"] = Worker(["llama", str(path), str(threads), context], None)
    for peer in args.peer:
        name, _, rest = peer.partition("=")
        binary, _, model = rest.partition(",")
        model, _, its_shape = model.partition("@")
        if its_shape in ("", shape):
            engines[name] = LlamaBench(binary, model, threads)

    seconds: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": [], "decode8": []} for name in engines
    }
    bandwidth: list[float] = []
    for number in range(args.rounds + 1):  # the first is a warm-up
        bandwidth.append(_native.read_bandwidth(threads))
        for do in ("decode", "prefill", "decode8"):
            for name, engine in engines.items():
                if do == "decode8" and not name.startswith("bitdistill"):
                    continue
                if do == "prefill":
                    answer = engine.ask(do="prefill", tokens=args.prefill if number else 64)
                elif do == "decode":
                    answer = engine.ask(do="decode", tokens=args.decode if number else 8)
                else:
                    answer = engine.ask(do="decode", tokens=args.decode // 4 if number else 2, sequences=8)
                if number:
                    seconds[name][do].append(answer["seconds"])
        print(f"{shape}, {threads} threads: round {number} of {args.rounds}", file=sys.stderr)
    if args.fill:
        for name, engine in engines.items():
            if name.startswith("bitdistill"):
                engine.ask(do="prefill", tokens=args.context - 1)
    return {
        "shape": shape,
        "threads": threads,
        "filled_tokens": args.context - 1 if args.fill else 0,
        "prefill_tokens": args.prefill,
        "decode_tokens": args.decode,
        "read_bandwidth_bytes_per_s": bandwidth[1:],
        "engines": {name: {"seconds": seconds[name], **engine.end()} for name, engine in engines.items()},
    }


def run_tests() -> dict[str, Any]:
    """The exactness tests of kernels and models; SystemExit if one fails."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]  # -v: the last line counts
    paths = ["tests/native/test_kernels.py", "tests/native/test_engine.py"]
    print("exactness tests first ...", file=sys.stderr)
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nthe engine is not exact: no timing")
    return {"paths": paths, "outcome": done.stdout.strip().splitlines()[-1]}


def machine() -> dict[str, Any]:
    """CPU, cores and load, as far as the system says."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": len(os.sched_getaffinity(0))}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for key, _, value in (line.partition(":") for line in info.read_text("utf-8").splitlines()):
            if key.strip() in ("model name", "cpu family", "model"):
                facts.setdefault(key.strip(), value.strip())
    facts["load_average"] = os.getloadavg()[0]
    return facts


def gemv(binary: Path, threads: int) -> str:
    """What bench_gemv prints: ternary products alone."""
    return subprocess.run([binary, str(threads), "15"], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=ROOT / "build/models", help="where models are made")
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "1.7B"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--fill",
        action="store_true",
        help="fill the context before peak memory is read (llama.cpp reserves its own at the start)",
    )
    parser.add_argument("--isa", help="instruction set of the native engine")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=BINARY,MODEL[@SHAPE]")
    parser.add_argument("--gemv", type=Path, metavar="BENCH_GEMV", help="also run this build of bench_gemv")
    parser.add_argument("--only", nargs="+", metavar="FORMAT", help=f"of {', '.join(NATIVE)}, F16, Q8_0, ...")
    parser.add_argument("--quick", action="store_true", help="six formats, 3 rounds, decode 48, prefill 256")
    parser.add_argument("--skip-tests", action="store_true", help="recorded in the result")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true", help="only draw tables and chart from the result")
    parser.add_argument("--make-models", action="store_true", help="only make the models")
    args = parser.parse_args()
    if args.only and "F16" not in args.only:
        parser.error("--only: F16 must be among the formats, the summary compares with it")
    if args.render:
        cpu_render.write(args.out)
        return
    if args.quick:
        args.rounds, args.decode, args.prefill = 3, 48, 256
    if args.make_models:
        import shapes

        for shape in args.shapes:
            shapes.write_student(shape, args.models / shape / "student")
            f16 = shapes.write_f16(shape, args.models / shape / "F16.gguf")
            for name in shapes.gguf_types(shape):
                shapes.write_quantized(f16, name, os.cpu_count() or 1)
        return
    options = {
        k: v
        for k, v in vars(args).items()
        if k not in ("models", "out", "gemv") and v != parser.get_default(k)
    }
    command = " ".join(["benchmarks/cpu_speed.py", *(f"{k}={v}" for k, v in options.items())])
    result: dict[str, Any] = {"command": command, "machine": machine()}
    result["date"] = time.strftime("%Y-%m-%d")
    result["tests"] = {"outcome": "skipped"} if args.skip_tests else run_tests()
    if args.gemv:
        result["gemv"] = {str(threads): gemv(args.gemv, threads) for threads in args.threads}
    import llama_cpp

    result["versions"] = {"llama-cpp-python": llama_cpp.__version__}
    result["runs"] = []
    for shape in args.shapes:
        for threads in args.threads:
            result["runs"].append(run_shape(args, shape, threads))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for run in result["runs"]:
        print(cpu_render.table(run))
    print(f"{args.out}: median bandwidth", [median(r["read_bandwidth_bytes_per_s"]) for r in result["runs"]])


if __name__ == "__main__":
    main()
