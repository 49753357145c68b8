"""Saves every golden model with this project, for `make_golden.py --check` to load elsewhere.

    python tests/jaxrl/models/save_golden.py /tmp/saved
    python tests/jaxrl/models/make_golden.py --check /tmp/saved/*     # needs transformers, PyTorch

Each is saved twice: with the config.json it came with, and with one made from the decoder alone.
"""

import shutil
import sys
from pathlib import Path

from jaxrl.models.huggingface import load_pretrained, save_pretrained

GOLDEN = Path(__file__).parent / "golden"


def main(target: Path) -> None:
    for source in sorted(GOLDEN.iterdir()):
        loaded = load_pretrained(source, compute_dtype="float32")
        for suffix, document in (("", loaded.document), ("_own_config", None)):
            folder = target / f"{source.name}{suffix}"
            save_pretrained(
                folder, loaded.config, loaded.params, document=document, max_file_bytes=40_000
            )
            shutil.copy(source / "expected.npz", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
