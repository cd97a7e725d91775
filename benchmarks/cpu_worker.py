"""One engine in one process, driven by JSON lines: `cpu_speed.py` starts it and times many of them in turns.

    cpu_worker.py native  MODEL THREADS CONTEXT LAYOUT HEAD KV
    cpu_worker.py llama   MODEL THREADS CONTEXT KV

KV is float16 or int8; llama.cpp's int8 is q8_0 for keys and values, with its flash attention, which it needs for them.
Reads {"do": "prefill" | "decode", "tokens": N, "sequences": S} and answers {"seconds": ...}; at the start it writes
{"load_s": ..., facts}, and for {"do": "end"} {"peak_rss_bytes": ...}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[int, int], float]
_KEPT: list[Any] = []  # what llama.cpp calls back for as long as it runs


def native(model: str, threads: int, layout: str, head: str, kv: str) -> tuple[dict[str, Any], Run, Run]:
    """Prefill and decode of bitdistill's engine; decode picks greedy tokens, which llama.cpp's loop does not."""
    import numpy as np

    from bitdistill.engine import Engine, _native

    start = time.perf_counter()
    options: dict[str, Any] = {"threads": threads, "layout": layout, "head": head, "kv": kv}
    engine = Engine(model, **options)
    verified_s = time.perf_counter() - start
    del engine
    start = time.perf_counter()
    engine = Engine(model, **options, verify=False)
    facts = {
        "load_s": time.perf_counter() - start,
        "load_verified_s": verified_s,
        "isa": engine.isa,
        "kv": kv,
    }
    for key in ("ternary_bytes", "dense_bytes", "head_bytes"):
        facts[key] = engine.facts[key]
    sampler = _native.Sampler(0.0, 0, 1.0, 0)
    ids = np.random.default_rng(0).integers(0, engine.facts["vocab_size"], 4096, dtype=np.int32)

    def prefill(tokens: int, sequences: int) -> float:
        sequence = _native.Sequence(engine.model)
        begin = time.perf_counter()
        engine.model.step([(sequence, ids[:tokens])], [sampler], [0], [0])
        return time.perf_counter() - begin

    def decode(tokens: int, sequences: int) -> float:
        rows = [_native.Sequence(engine.model) for _ in range(sequences)]
        last = [ids[i : i + 1] for i in range(sequences)]
        streams = list(range(sequences))
        begin = time.perf_counter()
        for step in range(tokens):
            chosen = engine.model.step(
                list(zip(rows, last, strict=True)), [sampler] * sequences, streams, [step] * sequences
            )
            last = [np.array([token], dtype=np.int32) for token in chosen]
        seconds = time.perf_counter() - begin
        now = engine.model.facts
        facts["rescored_rows_per_token"] = now["rescored_rows"] / max(now["screened_tokens"], 1)
        facts["kv_bytes"] = sum(row.kv_bytes for row in rows)
        return seconds

    return facts, prefill, decode


def instruction_sets(system_info: str) -> str:
    """The ones that llama_print_system_info names as compiled in and that kernels choose by."""
    pairs = (part.partition("=") for part in system_info.replace("CPU :", "").split("|"))
    there = {name.strip() for name, _, value in pairs if value.strip() not in ("", "0")}
    known = ("AVX2", "AVX_VNNI", "AVX512", "AVX512_VNNI", "AMX_INT8", "NEON", "DOTPROD", "MATMUL_INT8", "SVE")
    return " ".join(name.lower() for name in known if name in there)


def llama(model: str, threads: int, context: int, kv: str) -> tuple[dict[str, Any], Run, Run]:
    """Prefill and decode of llama.cpp through llama_decode; every step computes its logits, nothing is sampled."""
    import ctypes

    import llama_cpp
    import numpy as np

    _KEPT.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_KEPT[0], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    start = time.perf_counter()
    handle = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if handle is None:
        raise SystemExit(f"{model}: llama.cpp cannot load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = threads
    if kv == "int8":
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    state = llama_cpp.llama_init_from_model(handle, params)
    if state is None:
        raise SystemExit(f"{model}: llama.cpp cannot make a context of {context} tokens")
    facts: dict[str, Any] = {"load_s": time.perf_counter() - start, "kv": kv}
    facts["isa"] = instruction_sets(llama_cpp.llama_print_system_info().decode())
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(handle))
    facts["weight_bytes"] = llama_cpp.llama_model_size(handle)
    ids = np.random.default_rng(0).integers(0, vocab, 4096, dtype=np.int32)
    pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))

    def evaluate(offset: int, count: int) -> None:
        at = ctypes.cast(ctypes.byref(pointer.contents, 4 * offset), ctypes.POINTER(ctypes.c_int32))
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(at, count)) != 0:
            raise SystemExit(f"{model}: llama_decode failed")

    def timed(body: Callable[[], None]) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
        begin = time.perf_counter()
        body()
        llama_cpp.llama_synchronize(state)
        return time.perf_counter() - begin

    def prefill(tokens: int, sequences: int) -> float:
        return timed(lambda: evaluate(0, tokens))

    def decode(tokens: int, sequences: int) -> float:
        def steps() -> None:
            for i in range(tokens):
                evaluate(i, 1)

        return timed(steps)

    return facts, prefill, decode


def peak_rss_bytes() -> int:
    """The largest resident set of this process, Python included."""
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    kind, model, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if kind == "native":
        facts, prefill, decode = native(model, threads, *sys.argv[5:8])
    else:
        facts, prefill, decode = llama(model, threads, context, sys.argv[5])
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "end":
            break
        run = prefill if request["do"] == "prefill" else decode
        print(
            json.dumps({"seconds": run(request["tokens"], request.get("sequences", 1))}),
            flush=True,
        )
    print(json.dumps({**facts, "peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
