"""Memories in models of Hugging Face transformers, the second host.

Importing it registers the models with memory: transformers' ``AutoConfig`` and ``AutoModel*`` can
then load models that ``save_pretrained`` wrote.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pkm_fairseq.huggingface needs transformers, safetensors and accelerate: "
        "pip install 'pkm_fairseq[huggingface]'"
    ) from error

from .add import add_memories
from .architectures import Architecture
from .callback import MemoryUsageCallback
from .models import MemoryModel, memory_class, register_architecture
from .trainer import MemoryTrainer

__all__ = [
    "Architecture",
    "MemoryModel",
    "MemoryTrainer",
    "MemoryUsageCallback",
    "add_memories",
    "memory_class",
    "register_architecture",
]
