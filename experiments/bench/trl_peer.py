"""Worker: TRL's GRPOTrainer on the workload. Runs in an environment with `trl` and `torch`.

The trainer owns its loop; a callback before each step waits for the parent, and one after it
reports, so that a step is exactly what the trainer does between the two.
"""

import tempfile
from pathlib import Path
from typing import Any

from experiments.bench import protocol
from experiments.bench.workload import (
    BOS,
    EOS,
    PAD,
    SEPARATOR,
    UNKNOWN,
    Workload,
    lowercase_share,
)


def build_tokenizer() -> Any:
    """One token a byte, as a Hugging Face tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    special = {"<pad>": PAD, "<bos>": BOS, "<unk>": UNKNOWN, "<sep>": SEPARATOR, "<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=letters | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(w: Workload, folder: Path) -> Any:
    """Transformers' Qwen3 with the workload's weights, saved so that TRL finds the reference."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=w.vocab_size,
        hidden_size=w.embed,
        intermediate_size=w.mlp,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        num_key_value_heads=w.kv_heads,
        head_dim=w.head_dim,
        rms_norm_eps=w.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": w.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        max_position_embeddings=w.prompt_len + w.new_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    state = {name: torch.from_numpy(array) for name, array in w.weights().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    model.save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder)


def build_trainer(w: Workload, folder: Path) -> Any:
    """The trainer with one optimiser step a batch of all B · G completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=w.completions,
        num_generations=w.group_size,
        gradient_accumulation_steps=1,
        num_iterations=1,
        max_completion_length=w.new_tokens,
        temperature=w.temperature,
        top_p=1.0,
        top_k=0,
        beta=w.kl_coef,
        epsilon=w.clip_eps,
        loss_type="grpo",
        learning_rate=w.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=10**6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=w.seed,
    )
    return GRPOTrainer(
        model=build_model(w, folder),
        processing_class=build_tokenizer(),
        reward_funcs=lambda prompts, completions, **_: lowercase_share(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": w.texts()}),
    )


def connect(trainer: Any, channel: protocol.Channel, w: Workload) -> Any:
    """The callback that runs the trainer's steps at the parent's word."""
    import torch
    from transformers import TrainerCallback

    watches: list[protocol.Stopwatch] = []

    def timed(name: str, function: Any, *, minus: str | None = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with watches[-1].part(name, minus=minus):
                return function(*args, **kwargs)

        return call

    trainer._generate = timed("rollout", trainer._generate)
    trainer._generate_and_score_completions = timed(
        "scoring", trainer._generate_and_score_completions, minus="rollout"
    )

    def logits(tokens: list[list[int]]) -> list[Any]:
        with torch.no_grad():
            return trainer.ref_model(torch.tensor(tokens)).logits.tolist()

    class AtTheParentsWord(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            while (message := channel.receive())["op"] == "logits":
                channel.send(logits=logits(message["tokens"]))
            if message["op"] == "close":
                raise EOFError
            watches[:] = [protocol.Stopwatch()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            channel.send(**watches[-1].result())

    return AtTheParentsWord()


def main() -> None:
    """The worker."""
    channel = protocol.Channel()
    import importlib.metadata as metadata

    workload = Workload.from_argv()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(workload, Path(folder))
        trainer.add_callback(connect(trainer, channel, workload))
        channel.ready(**{p: metadata.version(p) for p in ("trl", "torch", "transformers")})
        try:
            trainer.train()
        except EOFError:
            channel.close()


if __name__ == "__main__":
    main()
