"""llama.cpp's server in the package xllamacpp, with those options of ``llama-server`` that keeptune serve uses."""

import argparse
import threading
from pathlib import Path


def main() -> None:
    """Serves until the process is ended."""
    parser = argparse.ArgumentParser(prog="keeptune.pipeline.llama_server")
    for option in ("-m", "--lora", "--host", "--alias", "--chat-template-file"):
        parser.add_argument(option, default="")
    for option in ("--port", "-c", "-t"):  # 0: a free port, the context of the model, all threads
        parser.add_argument(option, type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="attention and its cache in float32")
    chosen = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias, params.verbosity = chosen.m, {chosen.alias}, 0
    params.hostnames, params.port, params.n_ctx = [chosen.host or "127.0.0.1"], chosen.port, chosen.c
    if chosen.t:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = chosen.t
    if chosen.exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if chosen.chat_template_file:
        params.chat_template = Path(chosen.chat_template_file).read_text(encoding="utf-8")
    if chosen.lora:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = chosen.lora, 1.0
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    print(f"serving on {server.listening_address}", flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    main()
