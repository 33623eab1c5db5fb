"""The feature maps of a backbone: their channels, reduction and modules."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any


class FeatureInfo(list[dict[str, Any]]):
    """``dict(num_chs=…, reduction=…, module=…)`` of every feature map, with timm's accessors.

    ``reduction`` is the number of the image's pixels per position of the map and axis, ``module`` the name of the
    module after which it is taken. An accessor gives its entry of the returned maps (``out_indices``; None: of all), of
    one map ``idx``, or of several.
    """

    def __init__(self, maps: Iterable[dict[str, Any]], out_indices: Sequence[int] | None = None) -> None:
        super().__init__(maps)
        self.out_indices = tuple(range(len(self)) if out_indices is None else out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """The dicts, or ``keys`` of them."""
        if isinstance(idx, int):
            return {key: self[idx][key] for key in keys or self[idx]}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    channels = functools.partialmethod(get, "num_chs")
    reduction = functools.partialmethod(get, "reduction")
    module_name = functools.partialmethod(get, "module")
