"""llama.cpp's server from the package xllamacpp, with the options of ``llama-server`` that keeptune serve uses.

python -m keeptune.pipeline.llama_server -m base.gguf --lora adapter.gguf --port 8080
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until the process is ended."""
    parser = argparse.ArgumentParser(prog="keeptune.pipeline.llama_server")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--alias", default="tuned")
    parser.add_argument("-c", "--ctx-size", type=int, default=0, help="0: as the model was trained")
    parser.add_argument("-t", "--threads", type=int, default=0, help="0: all")
    parser.add_argument("--cache-type", choices=["f16", "f32"], default="f16", help="of keys and values")
    parser.add_argument("--chat-template-file", type=Path)
    chosen = parser.parse_args(arguments)

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = chosen.model, {chosen.alias}
    params.hostnames, params.port, params.n_ctx, params.verbosity = [chosen.host], chosen.port, chosen.ctx_size, 0
    if chosen.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = chosen.threads
    if chosen.cache_type == "f32":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if chosen.chat_template_file:
        params.chat_template = chosen.chat_template_file.read_text(encoding="utf-8")
    adapters = [xllamacpp.CommonAdapterLoraInfo() for _ in chosen.lora]
    for adapter, file in zip(adapters, chosen.lora, strict=True):
        adapter.path, adapter.scale = file, 1.0
    params.lora_adapters = adapters
    server = xllamacpp.Server(params)
    print(f"serving on {server.listening_address}", flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    main()
