"""TRL's DPO loss on given pairs of token ids, for TRL's own environment: `MODEL REFERENCE PAIRS.json OUT`.

Imports nothing of this project. Writes the loss and the gradient of every parameter.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Runs one forward and backward of TRL's trainer over all pairs at once."""
    model_path, reference_path, pairs_path, out_path = sys.argv[1:]
    model, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (model_path, reference_path)
    )
    given = json.loads(Path(pairs_path).read_text())
    tokenizer = AutoTokenizer.from_pretrained(reference_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as directory:
        settings = DPOConfig(
            output_dir=directory,
            beta=given["beta"],
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_dropout=True,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "1+", "chosen": "2", "rejected": "3"}]),
            processing_class=tokenizer,
        )
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(given["pairs"]))
        loss.backward()
    gradient = {
        name: param.grad for name, param in trainer.model.named_parameters() if param.grad is not None
    }
    save_file({"loss": loss.detach().double().reshape(1), **gradient}, out_path)


if __name__ == "__main__":
    main()
