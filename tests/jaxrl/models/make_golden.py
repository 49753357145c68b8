"""Makes the golden models of every family with `transformers` and PyTorch, which tests need not.

    pip install torch transformers peft && python tests/jaxrl/models/make_golden.py

writes golden/NAME/{config.json, model.safetensors, expected.npz}: a small model whose weights are
such that nothing hides (norms, biases and routers random, logits of standard deviation ≥ 1), and
the logits of sequences that are longer than every window; and golden_adapters/NAME, a LoRA
adapter of one of them in PEFT's files. `--check FOLDER` loads a model that
this project has saved into `transformers` and compares logits with those beside it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "golden"
ADAPTERS = Path(__file__).parent / "golden_adapters"
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 100.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 4.0, "beta_slow": 1.0, "rope_theta": 100.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 5, "sliding_window": 6}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1, "attention_bias": True,
                                    "rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True,
                        "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 10, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 24, "norm_topk_prob": False}),
    "qwen3_moe_normalised": ("qwen3_moe", {"head_dim": 8, "num_experts": 5,
                                           "num_experts_per_tok": 3,
                                           "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 10}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2,
                            "intermediate_size": 24, "sliding_window": None}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 4.0, "rope_parameters": PLAIN}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 4, "rope_parameters": {
        "full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}
    }, "layer_types": ["sliding_attention", "full_attention"] * 2}),
}  # fmt: skip


def build(name: str) -> transformers.PreTrainedModel:
    kind, changes = CASES[name]
    fields = {**SIZES, **changes}
    if "rope_parameters" not in changes:
        fields["rope_parameters"] = PLAIN
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(sorted(CASES).index(name))
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in path:
                tensor.copy_((0.0 if kind.startswith("gemma") else 1.0) + 0.3 * noise)
            elif "embed" in path or path.endswith("bias"):
                tensor.copy_(0.7 * noise)
            else:  # kernels are [.., out, in]
                tensor.copy_(1.4 * noise / tensor.shape[-1] ** 0.5)
    return model


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def make(name: str) -> None:
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(7).integers(0, SIZES["vocab_size"], (2, 24)).astype(np.int32)
    with tempfile.TemporaryDirectory() as saved:
        build(name).to(torch.bfloat16).save_pretrained(saved)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((Path(saved) / file).read_bytes())
    # Read again, since a conversion of the model would round its RoPE frequencies too.
    logits = logits_of(read(folder), tokens)
    assert logits.std() >= 1, (name, logits.std())
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits)
    print(f"{name}: logits' standard deviation {logits.std():.2f}")


def make_adapter(name: str, **options: Any) -> None:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(
        read(HERE / name), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            if "lora_" in path:
                tensor.copy_(0.5 * torch.randn(tensor.shape))
    folder = ADAPTERS / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    document = json.loads((folder / "adapter_config.json").read_text())
    document["base_model_name_or_path"] = name  # not where this machine keeps it
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2) + "\n")
    tokens = np.load(HERE / name / "expected.npz")["tokens"]
    np.savez_compressed(
        folder / "expected.npz", tokens=tokens, logits=logits_of(model.eval(), tokens)
    )
    print(f"adapter of {name}")


def read(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def check(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    if (folder / "adapter_config.json").exists():
        import peft

        model = peft.PeftModel.from_pretrained(read(HERE / folder.name), folder).eval()
    else:
        model = read(folder)
    gap = np.abs(logits_of(model, expected["tokens"]) - expected["logits"]).max()
    print(f"{folder.name}: largest difference of logits {gap:.2e}")
    assert gap < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, nargs="*", help="folders saved by this project")
    args = parser.parse_args()
    if args.check is not None:
        for folder in args.check:
            check(folder)
        return
    for name in CASES:
        make(name)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    make_adapter("llama3", r=3, lora_alpha=5, target_modules=everything)
    make_adapter("gemma3", r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], use_rslora=True)


if __name__ == "__main__":
    main()
