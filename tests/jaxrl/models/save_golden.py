"""Saves every golden model with this project, for `make_golden.py --check` to load elsewhere.

    python tests/jaxrl/models/save_golden.py /tmp/saved
    python tests/jaxrl/models/make_golden.py --check /tmp/saved/models/* /tmp/saved/adapters/*

The second needs transformers, PEFT and PyTorch. Each model is saved twice: with the config.json
it came with, and with one made from the decoder alone.
"""

import shutil
import sys
from pathlib import Path

from jaxrl.models.huggingface import (
    load_adapter,
    load_pretrained,
    save_adapter,
    save_pretrained,
)

GOLDEN = Path(__file__).parent / "golden"


def main(target: Path) -> None:
    for source in sorted(GOLDEN.iterdir()):
        loaded = load_pretrained(source, compute_dtype="float32")
        for suffix, document in (("", loaded.document), ("_own_config", None)):
            folder = target / "models" / f"{source.name}{suffix}"
            save_pretrained(
                folder, loaded.config, loaded.params, document=document, max_file_bytes=40_000
            )
            shutil.copy(source / "expected.npz", folder)
    for source in sorted(GOLDEN.with_name("golden_adapters").iterdir()):
        loaded = load_adapter(source, load_pretrained(GOLDEN / source.name))
        save_adapter(
            target / "adapters" / source.name, loaded, base_model=str(GOLDEN / source.name)
        )
        shutil.copy(source / "expected.npz", target / "adapters" / source.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
