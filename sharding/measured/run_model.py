"""The program of a row of a table of runs: sizes, types and what was trained."""

import math
import re
from dataclasses import replace
from typing import Any

from sharding.machines.topology import Cluster
from sharding.measured.run_row import Row
from sharding.programs.transformer import TransformerConfig, find_model, transformer

_GPT2_VOCAB = 50257
# Megatron pads the vocabulary so that every shard is a multiple of this.
_VOCAB_MULTIPLE = 128
# Widths of heads where d_model / heads gives too few parameters.
_HEAD_DIMS = (128, 256)
# Models that are no decoders: they are read as one of their size, and no constant is fitted to it.
_NO_DECODER = re.compile(r"gan\b|diffusion|\bdit\b|unet|\bvit\b", re.IGNORECASE)
_UNGATED = re.compile(r"gpt-?\d|^gpt|mpt|opt-|pythia|nemotron|bert|bloom|falcon", re.IGNORECASE)


def read_config(row: Row, cluster: Cluster) -> TransformerConfig:
    name = row.text("model")
    if _NO_DECODER.search(name):
        row.fill("sizes: no decoder, read as one of its size", None)
    # What stands in brackets is how it was run: "DeepSeekV3 (w/o MTP)".
    published = find_model(name) or find_model(name.split("(")[0]) if name else None
    names = {"layers": "n_layers", "d_model": "d_model", "heads": "n_heads", "d_ff": "d_ff",
             "kv_heads": "n_kv_heads", "vocab": "vocab"}  # fmt: skip
    cells = {field: row.whole(column) for field, column in names.items()}
    sizes: dict[str, Any] = {field: value for field, value in cells.items() if value}
    seq_len = row.whole("seq_len") or row.fill("seq_len: 4096, or 1024 before 2021", 4096)
    if published is not None:
        # The published sizes also hold what the table has no column for; experts' width is in
        # d_ff there.
        if published.experts:
            sizes.pop("d_ff", None)
        config = replace(published, **sizes)
    elif {"layers", "d_model"} <= set(sizes):
        width = sizes["d_model"]
        if "heads" not in sizes:
            sizes["heads"] = row.fill("heads: of 64", max(1, width // 64))
        if "vocab" not in sizes:
            gpt2 = cluster.chip.kind == "switch"
            sizes["vocab"] = row.fill("vocab: GPT-2's", _GPT2_VOCAB) if gpt2 else 32000
        # Four times the width is the plain feed-forward's; a gated one is narrower or wider.
        gated = not _UNGATED.search(name or "gpt") and sizes.get("d_ff") != 4 * width
        if "d_ff" not in sizes:
            sizes["d_ff"] = row.fill("d_ff: 4·d_model", 4 * width)
            gated = False
        config = TransformerConfig(name=name or f"decoder-{sizes['layers']}x{width}", **sizes)
        config = _as_counted(row, replace(config, gated=gated))
    else:
        config = _of_params(row, name)
    if sizes.get("heads") == 1:  # a table that does not know: heads of 64
        heads = max(1, config.d_model // 64)
        config = replace(config, heads=heads, kv_heads=None)
    if not config.gated and not published:
        config = replace(config, rotary=False)
    return replace(config, name=name or config.name, seq_len=seq_len)


def with_padded_vocab(row: Row, config: TransformerConfig, stack: str, tensor: int) -> (
    TransformerConfig
):  # fmt: skip
    """The vocabulary as Megatron pads it, in even shards.

    Undivided, vTrain's models have GPT-2's 50,257 as it is: their heads run at a third of the rate
    of divided ones, as products do whose rows are not aligned.
    """
    padded = stack.startswith("megatron") and (
        tensor > 1 or "vtrain" not in row.text("source").lower()
    )
    if not padded:
        return config
    multiple = _VOCAB_MULTIPLE * tensor
    return replace(config, vocab=-(-config.vocab // multiple) * multiple)


def _as_counted(row: Row, config: TransformerConfig) -> TransformerConfig:
    """Gates the feed-forward, ties the head and widens heads if the parameters say so."""
    wanted = row.number("params_b")
    if not wanted:
        return config
    choices = [
        replace(config, gated=gated, tied=tied, head_dim=head_dim)
        for head_dim in (config.head_dim, *_HEAD_DIMS)
        for gated in (config.gated, not config.gated)
        for tied in (False, True)
    ]
    error = [abs(math.log(transformer(c).parameter_count / wanted / 1e9)) for c in choices]
    best = min(range(len(choices)), key=error.__getitem__)
    # A rounded number of parameters tells the feed-forward only if it is nearly right.
    return choices[best] if error[best] < 0.05 and error[best] < error[0] - 0.01 else config


def _of_params(row: Row, name: str) -> TransformerConfig:
    """A decoder of usual proportions: width 128 times the depth, and twelve width² a layer.

    The parameters are those that a token meets; with an expert degree they lie in experts.
    """
    match = re.search(r"(\d+(?:\.\d+)?)\s*b\b.*?a(\d+(?:\.\d+)?)b", name, re.IGNORECASE)
    billions = float(match[2]) if match else row.number("params_b")
    if billions is None:
        match = re.search(r"(\d+(?:\.\d+)?)\s*([bmt])\b", name, re.IGNORECASE)
        rate, speed = row.number("tflops_per_chip"), row.number("tokens_per_s_per_chip")
        if match is not None:
            billions = float(match[1]) * {"m": 1e-3, "b": 1.0, "t": 1e3}[match[2].lower()]
        elif rate and speed:
            billions = row.fill("parameters: FLOPs a token / 6", rate * 1e3 / speed / 6)
        else:
            billions = row.fill("parameters: 7 B, nothing is known", 7.0)
    row.fill("sizes: usual proportions for the number of parameters", None)
    layers = max(4, round((billions * 1e9 / (12 * 128**2)) ** (1 / 3)))
    width = max(256, 128 * round((billions * 1e9 / (12 * layers)) ** 0.5 / 128))
    config = TransformerConfig(name=name, layers=layers, d_model=width,
                               heads=max(1, width // 128), d_ff=4 * width, vocab=51200,
                               gated=False, rotary=False)  # fmt: skip
    experts = row.whole("ep") or 1
    if experts == 1:
        return config
    # Eight experts of half the width do the work of the dense feed-forward.
    return replace(config, experts=max(64, experts), experts_per_token=8,
                   moe_d_ff=max(1, width // 2))  # fmt: skip


def with_types(row: Row, config: TransformerConfig, stack: str) -> TransformerConfig:
    dtype = row.text("dtype").lower()
    notes = row.text("notes").lower()
    precision = "fp8" if "fp8" in dtype else "int8" if "int8" in dtype + notes else "bf16"
    if "fp4" in dtype:
        precision = "fp4"
    changes: dict[str, Any] = {"precision": precision}
    if "lora" in (row.text("source") + notes + row.text("model")).lower():
        changes["adapters_only"] = True
    capacity = re.search(r"capacity(?:[ _]factor)?[ =]+([\d.]+)", notes)
    if capacity and config.experts:
        changes["capacity"] = float(capacity[1])
    if stack == "megatron_fp16":
        wide = "fp32 allreduce" in dtype
        changes |= {"flash": False, "fused_loss": False, "weight_dtype": "float16",
                    "optimizer_bytes": 12.0,
                    "gradient_dtype": "float32" if wide else "float16"}  # fmt: skip
    elif stack == "megatron":
        changes |= {"weight_dtype": "bfloat16", "optimizer_bytes": 12.0}
    elif dtype == "bf16" and stack == "fsdp":  # "pure": everything in bfloat16
        changes |= {"weight_dtype": "bfloat16", "optimizer_bytes": 4.0,
                    "gradient_dtype": "bfloat16"}  # fmt: skip
    elif stack == "fsdp":
        changes |= {"gradient_dtype": "float32"}
    return replace(config, **changes)
