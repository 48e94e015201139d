"""What a model's own text is worth for its quantization-aware training (arXiv 2305.17888)."""

import tempfile
from typing import Any

from claim import Arm, Claim, ascending

from qlightning.data import GeneratedText, StandardLibraryText
from qlightning.data.splits import TRAIN
from qlightning.methods import LLMQAT


class Manual(StandardLibraryText):
    """Trains on the prose of Python's language reference, which the source text leaves out; held out is source."""

    def read_documents(self, split: str) -> list[str]:
        if split != TRAIN:
            return super().read_documents(split)
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]


def manual(source: Any) -> Any:
    return Manual(tokenizer="bytes", sequence_length=256, batch_size=16, seed=source.seed)


def generated() -> Arm:
    """Data and module are made one after the other: the first learns from the second where its model lies."""
    made: list[GeneratedText] = []

    def data(source: Any) -> Any:
        made.append(GeneratedText("named below", sequences=1600, texts_at_once=800, real=source, seed=source.seed))
        return made[-1]

    def module(task: Any) -> Any:
        task.configure_model()
        made[-1].model = tempfile.mkdtemp()
        task.model.save_pretrained(made[-1].model)
        return task

    return Arm(LLMQAT().callbacks, data=data, module=module)


CLAIMS = [
    Claim(
        name="llm_qat",
        says="W4A8KV4, taught by the float model alone: training beats rounding, and text that the model wrote is "
        "better than a corpus of another kind (the last from memory). Held-out text is the float model's; 'real' is "
        "what the float model was trained on, which the paper does not have.",
        base="llama",
        arms={
            "rounding": Arm(LLMQAT().callbacks, steps=0),
            "another corpus": Arm(LLMQAT().callbacks, data=manual),
            "generated": generated(),
            "real": Arm(LLMQAT().callbacks),
        },
        holds=ascending("generated", "another corpus", "rounding"),
        expected="generated < another corpus < rounding",
    ),
]
