"""The merge of the first tutorial: BASE DONOR OUT, both models loaded whole, half and half.

Needs equal names, and leaves out everything around the tensors: config, shards.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


base, donor, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
a, b = load(base), load(donor)
merged = {k: torch.lerp(a[k], b[k], 0.5) for k in a}
save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
