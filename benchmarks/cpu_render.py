"""docs/cpu-speed.md and its chart from results/cpu-speed.json; nothing in them is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cpu-speed.md"
CHART = ROOT / "docs/cpu-speed.svg"


def rate(run: dict[str, Any], name: str, do: str) -> float:
    """Median tokens per second."""
    tokens = {
        "prefill": run["prefill_tokens"],
        "decode": run["decode_tokens"],
        "decode8": 8 * (run["decode_tokens"] // 4),
    }
    seconds = run["engines"][name]["seconds"][do]
    return float(tokens[do] / median(seconds)) if seconds else 0.0


def ratio(run: dict[str, Any], name: str, other: str, do: str) -> float:
    """How many times as fast `name` is as `other`: the median of the ratios inside a round."""
    ours, theirs = (run["engines"][n]["seconds"][do] for n in (name, other))
    return float(median(b / a for a, b in zip(ours, theirs, strict=True)))


def host(run: dict[str, Any]) -> str:
    """The machine of a run in a few words."""
    facts = run.get("machine", {})
    name = facts.get("model name", "?").replace("(R)", "").removesuffix(" Processor")
    return f"{name} {facts.get('cpu family', '?')}/{facts.get('model', '?')}"


def place(run: dict[str, Any]) -> tuple[str, int, str]:
    """What a run is the newest of."""
    return run["shape"], run["threads"], host(run)


def peers(run: dict[str, Any], isa: str) -> list[str]:
    """The formats that our rows of an instruction set are held against: for `avx2` the ones of builds without more.

    All of them where no build is known to be held to AVX2.
    """
    others = [n for n in run["engines"] if not n.startswith("bitdistill")]
    held = [n for n in others if run["engines"][n].get("isa") == "avx2"]
    return held if isa == "avx2" and held else others


def best_other(run: dict[str, Any], do: str, isa: str) -> str:
    """The fastest format that is not ours."""
    return max(peers(run, isa), key=lambda n: rate(run, n, do))


def full_precision(run: dict[str, Any], do: str, isa: str) -> str:
    """llama.cpp's F16 that our rows of an instruction set are held against: of the faster build."""
    names = [n for n in peers(run, isa) if n.split(", ")[0] == "llama.cpp F16"]
    return max(names, key=lambda n: rate(run, n, do))


def bytes_per_token(engine: dict[str, Any]) -> int | None:
    """Weights that one decoded token reads."""
    if "ternary_bytes" in engine:
        return int(engine["ternary_bytes"] + engine["dense_bytes"] + engine["head_bytes"])
    return engine.get("weight_bytes")


def table(run: dict[str, Any]) -> str:
    """One line an engine and format."""
    bandwidth = median(run["read_bandwidth_bytes_per_s"])
    lines = [
        f"**{run['shape']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, {host(run)}** "
        f"(read bandwidth {bandwidth / 1e9:.1f} GB/s"
        + (
            f", OMP_WAIT_POLICY {run['omp_wait_policy']})"
            if run["threads"] > 1 and "omp_wait_policy" in run
            else ")"
        ),
        "",
        "| engine, format | compiled for | decode, tokens/s | prefill, tokens/s | 8 sequences, tokens/s | MB a token | "
        "share of bandwidth | peak RSS, MB | load, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, engine in run["engines"].items():
        decode, prefill, eight = (rate(run, name, do) for do in ("decode", "prefill", "decode8"))
        size = bytes_per_token(engine)
        cells = [
            name,
            engine.get("isa", ""),
            f"{decode:.1f}",
            f"{prefill:.0f}",
            f"{eight:.1f}" if eight else "",
            f"{size / 1e6:.0f}" if size else "",
            f"{100 * size * decode / bandwidth:.0f} %" if size else "",
            f"{engine['peak_rss_bytes'] / 1e6:.0f}" if "peak_rss_bytes" in engine else "",
            f"{engine['load_s']:.2f}" if "load_s" in engine else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def isas(run: dict[str, Any]) -> list[str]:
    """Instruction sets that our rows name ("bitdistill FORMAT, ISA"); [""] if they name none."""
    return list(dict.fromkeys(n.partition(", ")[2] for n in run["engines"] if n.startswith("bitdistill")))


def memory(run: dict[str, Any], mine: list[str]) -> str:
    """Peak memory of F16 over that of our smallest, by the type of keys and values.

    F16 of the build that takes least: one for AMX holds its matrices a second time.
    """
    engines = run["engines"]

    def peak(name: str) -> int:
        return min((e["peak_rss_bytes"] for n, e in engines.items() if n.split(", ")[0] == name), default=0)

    cells = []
    for kv in ("float16", "int8"):
        names = [n for n in mine if engines[n].get("kv", "float16") == kv]
        if not names:
            continue
        smallest = min(engines[n]["peak_rss_bytes"] for n in names)
        cell = f"{peak('llama.cpp F16') / smallest:.2f}×"
        if kv == "int8":
            cell += " with int8 keys and values"
            if alike := peak("llama.cpp F16+kv8"):
                cell += f" ({alike / smallest:.2f}× against F16 with q8_0 ones)"
        cells.append(cell)
    return ", ".join(cells)


def summary(runs: list[dict[str, Any]]) -> str:
    """The ratios that count: our best format of an instruction set against the best of the others, and against F16."""
    lines = [
        "| machine | shape | threads | ours | decode against the best other format | decode against F16 | "
        "prefill against the best other | prefill against F16 | 8 sequences against one, same format | "
        "RSS, F16 against ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        for isa in isas(run):
            mine = [n for n in run["engines"] if n.startswith("bitdistill") and n.partition(", ")[2] == isa]
            cells = [host(run), run["shape"], str(run["threads"]), isa or "best"]
            for do in ("decode", "prefill"):
                ours = max(mine, key=lambda n: rate(run, n, do))
                other = best_other(run, do, isa)
                cells.append(f"{ratio(run, ours, other, do):.2f}× ({other})")
                cells.append(f"{ratio(run, ours, full_precision(run, do, isa), do):.2f}×")
            gains = [(rate(run, n, "decode8") / rate(run, n, "decode"), n) for n in mine]
            cells.append(
                ", ".join(
                    f"{gain:.2f}× ({n.split()[1].split(',')[0].replace('+screened4', '')})"
                    for gain, n in gains
                )
            )
            cells.append(memory(run, mine))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chart(runs: list[dict[str, Any]], path: Path) -> None:
    """Decode and prefill rates as bars, one panel a shape and number of threads: the newest run of each."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "cpu-speed"
    from matplotlib import pyplot

    runs = list({(run["shape"], run["threads"]): run for run in runs}.values())
    figure, axes = pyplot.subplots(2, len(runs), figsize=(4.2 * len(runs), 7), squeeze=False)
    for column, run in enumerate(runs):
        for line, do in enumerate(("decode", "prefill")):
            axis = axes[line][column]
            names = sorted(run["engines"], key=lambda n: rate(run, n, do))
            colours = ["#2a6f97" if n.startswith("bitdistill") else "#adb5bd" for n in names]
            axis.barh(names, [rate(run, n, do) for n in names], color=colours)
            axis.set_title(f"{run['shape']}, {run['threads']} threads: {do}, tokens/s", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def conditions(result: dict[str, Any]) -> str:
    """Machine, date and command of each run; runs of one command are named once."""
    lines = []
    for run in result["runs"]:
        facts = {**result, **run}
        known = facts["machine"]
        load = f"load {known['load_average']:.1f} at the start"
        if "load_average_at_end" in known:
            load += f" and {known['load_average_at_end']:.1f} at the end (the benchmark's own threads count)"
        if run.get("waited_s"):
            load += f", {run['waited_s']:.0f} s waited for other processes to pause"
        line = (
            f"{known.get('model name', '?')} (family {known.get('cpu family', '?')}, model {known.get('model', '?')}), "
            f"{known['cpus']} CPUs, {load}; {facts['date']}; "
            f"`{facts['command']}`; exactness tests before it: {facts['tests']['outcome']}; "
            + ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
            + (f". {run['note']}" if "note" in run else "")
        )
        if line not in lines:
            lines.append(line)
    return "\n".join(f"- {line}." for line in lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# CPU speed\n",
        "Generated by `python benchmarks/cpu_speed.py --render` from `results/cpu-speed.json`. Models in the shapes of "
        "SmolLM2, Gemma 3 and Qwen3, with random weights unless the command says `real`; medians over interleaved "
        "rounds, ratios inside a round. Native rows pick the greedy token, the others only compute logits. "
        "`screened4` and `screened` give the tokens of the full head ([engine.md](engine.md)). The student has SubLN, "
        "which the GGUF models lack. With two threads, the others' OpenMP threads wait for each other actively or "
        "passively, whichever decodes faster. A process that is not timed is stopped. RSS is the whole process, Python "
        "included (llama-bench has none); `load` is without hashing. `compiled for` is what the engine's library says "
        "of itself. Our rows held to `avx2` are compared with the peers' builds for AVX2 where the run has any, else "
        "with all peers; our other rows with all peers. Keys and values are float16, int8 in rows with `kv8` (q8_0 "
        "with flash attention in llama.cpp's), and the two are never mixed in a ratio of memory unless it says so.\n",
        conditions(result),
        summary(result["runs"]),
        f"![decode and prefill rates]({CHART.name})\n",
        *(table(run) for run in result["runs"]),
    ]
    for threads, text in result.get("gemv", {}).items():
        parts.append(f"Ternary products alone (`bench_gemv {threads} 15`):\n\n```\n{text.strip()}\n```\n")
    return "\n".join(parts)


def write(source: Path) -> None:
    """docs/cpu-speed.md and docs/cpu-speed.svg."""
    result = json.loads(source.read_text("utf-8"))
    PAGE.write_text(page(result), "utf-8")
    chart(result["runs"], CHART)
