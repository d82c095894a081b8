"""A user dir: pkm_adam as it is, but with dense gradients of values, the reference of the tests."""

from dataclasses import dataclass

from fairseq.optim import register_optimizer

from pkm_fairseq.optim.pkm_adam import PkmAdam, PkmAdamConfig


@dataclass
class DenseConfig(PkmAdamConfig):
    """The same options; fairseq wants a class of their own for each name."""


@register_optimizer("dense_pkm_adam", dataclass=DenseConfig)
class DensePkmAdam(PkmAdam):
    """pkm_adam whose backward passes leave a dense ``.grad``."""

    def __init__(self, cfg, params):
        super().__init__(cfg, params)
        for values in self._values:
            values.value_table.factored = False
