#!/usr/bin/env python3
"""The native engine against llama.cpp (and llama-bench builds of others) on models of the same shapes.

    pip install -e '.[dev]' gguf llama-cpp-python
    python benchmarks/cpu_speed.py [--quick] [--shapes 0.6B 1.7B] [--build ik_llama.cpp=FOLDER:IQ2_BN,IQ2_BN_R4]
    python benchmarks/cpu_speed.py --render        tables and chart again, from results/cpu-speed.json

The exactness tests run first; a failure ends it. Every engine and format is a process of its own (cpu_worker.py).
Within a round each is timed once, one after the other, so that a busy moment of the machine meets all of them; the
figures are medians over rounds, ratios are medians of the ratios inside a round. Read bandwidth is measured in the
same rounds. KV caches are float16 everywhere, but where a format ends in `kv8` (int8; llama.cpp's q8_0).
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import signal
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
NATIVE = {  # name -> layout, head, keys and values
    "2bit+screened4": ("2bit", "screened4", "float16"),
    "base3+screened4": ("base3", "screened4", "float16"),
    "2bit+screened": ("2bit", "screened", "float16"),
    "2bit+float": ("2bit", "float", "float16"),
    "2bit+screened4+kv8": ("2bit", "screened4", "int8"),
    "base3+screened4+kv8": ("base3", "screened4", "int8"),
}
QUICK = ("2bit+screened4", "base3+screened4", "F16", "Q4_0", "TQ2_0", "TQ2_0-eQ4_K")


class Worker:
    """A process of cpu_worker.py."""

    def __init__(
        self, arguments: list[str], isa: str | None, policy: str = "passive", libraries: Path | None = None
    ) -> None:
        environment = {**os.environ, "OMP_WAIT_POLICY": policy}
        if libraries:
            environment["LLAMA_CPP_LIB_PATH"] = str(libraries.resolve())
        if isa:
            environment["BITDISTILL_ISA"] = isa
        command = [sys.executable, str(Path(__file__).with_name("cpu_worker.py")), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        atexit.register(self.process.kill)  # a run that fails leaves no stopped process
        self.facts = self._answer()
        self._stop()

    def _stop(self) -> None:
        # Waiting OpenMP threads may spin: a process that is not being timed must not run at all.
        self.process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r}: ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if request["do"] != "end":
            self._stop()
        return answer

    def end(self) -> dict[str, Any]:
        """Its facts and peak memory; the process is gone afterwards."""
        facts = self.ask(do="end")
        self.process.wait()
        return facts


def build_isa(binary: Path) -> str:
    """Instruction sets that the libllama of a llama-bench binary says it was compiled for; "" if it has none apart."""
    from cpu_worker import instruction_sets

    listed = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout.splitlines()
    paths = [line.split()[2] for line in listed if "libllama.so" in line]
    if not paths:
        return ""
    ask = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).llama_print_system_info; f.restype = ctypes.c_char_p; "
    done = subprocess.run(
        [sys.executable, "-c", ask + "print(f().decode())", paths[0]],
        check=True,
        capture_output=True,
        text=True,
    )
    return instruction_sets(done.stdout)


class LlamaBench:
    """A llama-bench binary of another engine: one process for each timing, warmed up by itself."""

    def __init__(self, binary: Path, model: Path, threads: int, policy: str) -> None:
        self.environment = {**os.environ, "OMP_WAIT_POLICY": policy}
        self.command = [str(binary), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
        self.facts: dict[str, Any] = {"weight_bytes": model.stat().st_size, "peak_rss_bytes": 0}
        self.facts |= {"isa": build_isa(binary), "kv": "float16"}

    def ask(self, do: str, tokens: int, sequences: int = 1) -> dict[str, Any]:
        """As Worker.ask."""
        p, n = (tokens, 0) if do == "prefill" else (0, tokens)
        command = [*self.command, "-p", str(p), "-n", str(n)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.environment
        )
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: ended with code {process.returncode}")
        self.facts["peak_rss_bytes"] = max(self.facts["peak_rss_bytes"], usage.ru_maxrss * 1024)
        return {"seconds": tokens / json.loads(out[out.index("[") :])[0]["avg_ts"]}

    def end(self) -> dict[str, Any]:
        """As Worker.end."""
        return self.facts


def busy_share(seconds: float = 0.5) -> float:
    """What share of one CPU others used in the next `seconds` (nothing of the benchmark runs between timings)."""

    def ticks() -> int:
        fields = Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]
        return sum(int(n) for i, n in enumerate(fields) if i not in (3, 4))  # all but idle and iowait

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def settle(limit: float) -> float:
    """Wait until others leave the machine alone, `limit` seconds at most; the seconds waited."""
    start = time.perf_counter()
    while limit > 0 and busy_share() > 0.15 and time.perf_counter() - start < limit:
        pass
    return time.perf_counter() - start


def wait_policy(args: argparse.Namespace, model: Path, threads: int) -> str:
    """How llama.cpp's OpenMP threads wait for each other where it decodes faster: both are tried."""
    if args.omp is not None or threads == 1:
        return args.omp or "passive"
    seconds = {}
    for policy in ("active", "passive"):
        worker = Worker(["llama", str(model), str(threads), "512", "float16"], None, policy)
        worker.ask(do="decode", tokens=8)
        times = []
        for _ in range(3):
            settle(args.wait_idle)
            times.append(worker.ask(do="decode", tokens=24)["seconds"])
        seconds[policy] = median(times)
        worker.end()
    print(f"{model.name}, {threads} threads: seconds by OMP_WAIT_POLICY {seconds}", file=sys.stderr)
    return min(seconds, key=lambda policy: seconds[policy])


def peer_builds(
    args: argparse.Namespace, shape: str, f16: Path, threads: int, policy: str
) -> dict[str, LlamaBench]:
    """llama-bench of each --build on files that its own llama-quantize makes from the F16 file."""
    import shapes

    engines = {}
    for build in args.build:
        name, _, rest = build.partition("=")
        folder, _, types = rest.rpartition(":")
        for kind in types.split(","):
            target, _, arch = kind.partition("@")
            plain = shapes.write_f16(shape, f16.with_stem(f"F16-{arch}"), other=arch) if arch else f16
            model = shapes.write_by_build(plain, Path(folder) / "llama-quantize", name, target)
            engines[f"{name} {kind}"] = LlamaBench(Path(folder) / "llama-bench", model, threads, policy)
    for peer in args.peer:
        name, _, rest = peer.partition("=")
        binary, _, path = rest.partition(",")
        path, _, its_shape = path.partition("@")
        if its_shape in ("", shape):
            engines[name] = LlamaBench(Path(binary), Path(path), threads, policy)
    return engines


def run_shape(args: argparse.Namespace, shape: str, threads: int) -> dict[str, Any]:
    """All engines on one shape with a number of threads."""
    import shapes

    from bitdistill.engine import _native

    folder = args.models / shape
    source = dict(real.partition("=")[::2] for real in args.real).get(shape)
    source = Path(source) if source else None
    student = str(shapes.write_student(shape, folder / "student", source))
    f16 = shapes.write_f16(shape, folder / "F16.gguf", source)
    engines: dict[str, Worker | LlamaBench] = {}
    wanted = args.only or (QUICK if args.quick else None)
    context = str(args.context)
    for name, options in NATIVE.items():
        if name in wanted if wanted else not name.endswith("kv8"):
            for isa in args.isa or [None]:
                engines[f"bitdistill {name}" + (f", {isa}" if isa else "")] = Worker(
                    ["native", student, str(threads), context, *options], isa
                )
    types = [name for name in ["F16", *shapes.gguf_types(shape)] if wanted is None or name in wanted]
    files = {n: f16 if n == "F16" else shapes.write_quantized(f16, n, threads) for n in types}
    policy = wait_policy(args, list(files.values())[-1], threads)
    builds = {"": None} | {
        f", {n}": Path(folder) for n, _, folder in (b.partition("=") for b in args.libraries)
    }
    for suffix, libraries in builds.items():
        for name, path in files.items():
            for kv in (("float16", ""), ("int8", "+kv8")):
                if not kv[1] or (wanted and name + kv[1] in wanted):
                    worker = Worker(
                        ["llama", str(path), str(threads), context, kv[0]], None, policy, libraries
                    )
                    engines[f"llama.cpp {name}{kv[1]}{suffix}"] = worker
    engines |= peer_builds(args, shape, f16, threads, policy)

    seconds: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": [], "decode8": []} for name in engines
    }
    bandwidth: list[float] = []
    waited = 0.0
    for number in range(args.rounds + 1):  # the first is a warm-up
        bandwidth.append(_native.read_bandwidth(threads))
        for do in ("decode", "prefill", "decode8"):
            for name, engine in engines.items():
                if do == "decode8" and not name.startswith("bitdistill"):
                    continue
                waited += settle(args.wait_idle)
                if isinstance(
                    engine, Worker
                ):  # llama-bench warms up by itself; a process stopped for long is cold
                    engine.ask(do="decode", tokens=2, sequences=8 if do == "decode8" else 1)
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
        "omp_wait_policy": policy,
        "waited_s": round(waited, 1),
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
    parser.add_argument(
        "--isa", nargs="+", help="instruction sets of the native engine, each a row of its own"
    )
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="NAME=FOLDER:TYPE[,TYPE...]",
        help="a folder with llama-bench and llama-quantize of another engine, and the types to make by the latter "
        "from the F16 file (IQ2_BN, IQ2_BN+q4_K for another type of the embedding, I2_S@llama for another "
        "architecture than the shape's)",
    )
    parser.add_argument(
        "--libraries",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="libllama.so and its libggml of another build of llama-cpp-python's llama.cpp: every format a second time",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=BINARY,MODEL[@SHAPE]")
    parser.add_argument(
        "--omp",
        choices=("active", "passive"),
        help="OMP_WAIT_POLICY of the others; the faster one if not given",
    )
    parser.add_argument("--gemv", type=Path, metavar="BENCH_GEMV", help="also run this build of bench_gemv")
    parser.add_argument(
        "--real",
        action="append",
        default=[],
        metavar="SHAPE=FOLDER",
        help="weights of a shape from a model folder",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="FORMAT", help=f"of {', '.join(NATIVE)}, F16, F16+kv8, Q8_0, ..."
    )
    parser.add_argument("--quick", action="store_true", help="six formats, 3 rounds, decode 48, prefill 256")
    parser.add_argument("--skip-tests", action="store_true", help="recorded in the result")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--append", action="store_true", help="keep the runs of --out on other shapes, threads and machines"
    )
    parser.add_argument(
        "--wait-idle",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="before each timing wait so long at most for others to leave the machine alone (Linux)",
    )
    parser.add_argument("--note", help="recorded with the runs and shown on the page")
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
        if k not in ("models", "out", "gemv", "append", "build", "peer", "real", "libraries", "note")
        and v != parser.get_default(k)
    }
    command = " ".join(["benchmarks/cpu_speed.py", *(f"{k}={v}" for k, v in options.items())])
    command += "".join(f" real={shape}" for shape in sorted(r.partition("=")[0] for r in args.real))
    builds = [f"{name}:{rest.rpartition(':')[2]}" for name, _, rest in (b.partition("=") for b in args.build)]
    command += "".join(f" build={build}" for build in builds)  # without the place where it lies
    command += "".join(f" libraries={b.partition('=')[0]}" for b in args.libraries)
    result: dict[str, Any] = {"runs": []}
    if args.append:
        result = json.loads(args.out.read_text("utf-8"))
    tests = {"outcome": "skipped"} if args.skip_tests else run_tests()
    import llama_cpp

    facts = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "tests": tests,
        "versions": {"llama-cpp-python": llama_cpp.__version__},
        **({"note": args.note} if args.note else {}),
    }
    if args.gemv:
        result["gemv"] = {str(threads): gemv(args.gemv, threads) for threads in args.threads}
    for shape in args.shapes:
        for threads in args.threads:
            before = machine()
            run = {**run_shape(args, shape, threads), **facts, "machine": before}
            run["machine"]["load_average_at_end"] = os.getloadavg()[0]
            others = [r for r in result["runs"] if cpu_render.place(r) != cpu_render.place(run)]
            result["runs"] = [*others, run]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for run in result["runs"]:
        print(cpu_render.table(run))
    print(f"{args.out}: median bandwidth", [median(r["read_bandwidth_bytes_per_s"]) for r in result["runs"]])


if __name__ == "__main__":
    main()
