"""``--quant-noise-scalar``."""

import logging
from functools import wraps
from operator import attrgetter
from typing import Any, Callable, List

from fairseq.modules.quantization.scalar.utils import MAPPING
from torch.ao.quantization.observer import HistogramObserver

logger = logging.getLogger(__name__)


def leave_subclasses_as_they_are(stock: Callable[..., List[str]]) -> Callable[..., List[str]]:
    """Replace ``get_layers``, which names the layers that get noise.

    fairseq also names subclasses of classes that it can quantize, such as the learned positional
    embedding, a subclass of ``nn.Embedding``. They behave differently and have no quantized form.
    """

    @wraps(stock)
    def get_layers(model: Any, *args: Any, **kwargs: Any) -> List[str]:
        layers = []
        for name in stock(model, *args, **kwargs):
            module = attrgetter(name)(model)
            if isinstance(module, tuple(MAPPING)) and type(module) not in MAPPING:
                logger.info(f"{name} gets no noise: {type(module).__name__} is not supported")
            else:
                layers.append(name)
        return layers

    return get_layers


def observe_on_any_device(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``emulate_int8_histogram``, which always moves scale and zero point to a GPU."""

    @wraps(stock)
    def emulate(weight: Any, scale: Any = None, zero_point: Any = None, bits: int = 8) -> Any:
        if scale is None:
            observer = HistogramObserver().to(weight.device)
            observer(weight.float())
            scale, zero_point = (x.type_as(weight) for x in observer.calculate_qparams())
        return stock(weight, scale, zero_point, bits=bits)

    return emulate
