"""Labels of a classification: their names, in the order of the classes."""

import re
from typing import Any, List

FILLER = re.compile(r"madeupword\d{4,}")  # fairseq-preprocess pads dictionaries with these


def label_names(dictionary: Any) -> List[str]:
    """The labels of a label dictionary: class ``i`` of a head is the i-th of them.

    ``fairseq-preprocess`` sorts a dictionary by frequency, so the order does not depend on the
    meaning of the labels.

    Args:
        dictionary: fairseq's, with or without the ``<mask>`` that its tasks add.
    """
    symbols = dictionary.symbols[dictionary.nspecial :]
    return [name for name in symbols if name != "<mask>" and not FILLER.fullmatch(name)]
