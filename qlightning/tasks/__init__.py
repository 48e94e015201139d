"""Tasks: small LightningModules to train something with. Your own LightningModule is an equal citizen."""

from qlightning.lazy import at_first_use

_HOME = {
    "CausalLM": "causal_lm",
    "Diffusion": "diffusion",
    "ImageClassification": "image_classification",
    "adamw": "optimizer",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = at_first_use(__name__, _HOME)
