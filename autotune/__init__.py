"""Finding tuned configs for the kernels, and measuring them: ``python -m autotune --help``.

``compare``, ``sweep`` and ``roofline`` profile what they are handed; ``%load_ext autotune`` adds ``%profile layer(x)``.

The modules, in the order in which they are best read:

measuring    ``timing`` (stop-watch, memory, machine), ``passes`` (a call and its gradients), ``measure`` (contenders
             are checked, then take turns), ``ceilings``; ``workloads`` (operators at the models' shapes), of which
             ``selection`` takes some, ``operators``, ``networks``; ``cases`` keeps rows on disk
comparing    ``contenders`` and ``contest`` (compare and what it found), ``sweeps``, ``roofs``, ``magic``
showing      ``tables``, ``plots``; ``results`` of bench, ``report`` of profile
tuning       ``tuner`` (one launch), ``tunables`` (what is stored), ``precompile``, ``kernel_cases`` (every kernel once)
commands     ``profile``, ``bench``, ``tune``, ``show``, ``verify``, ``compile``
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.contenders import compare as compare
    from autotune.magic import load_ipython_extension as load_ipython_extension
    from autotune.roofs import roofline as roofline
    from autotune.sweeps import sweep as sweep
    from autotune.tuner import tuning as tuning

_MODULES = {
    "compare": "autotune.contenders",
    "load_ipython_extension": "autotune.magic",
    "roofline": "autotune.roofs",
    "sweep": "autotune.sweeps",
    "tuning": "autotune.tuner",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: ``import autotune`` alone brings neither PyTorch nor matplotlib."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


if os.environ.get("DYNAMIC_KERNELS_AUTOTUNE") == "1":  # the whole program stands inside tuning()
    _everywhere = __getattr__("tuning")()
    _everywhere.__enter__()
