# Written by tools/stubs.py. Do not edit.
# mypy: disable-error-code=override

from basd.core.features import Features
from contextlib import AbstractContextManager
from torch import Tensor, nn
from typing import Any

class Taps:
    model: nn.Module
    names: Any
    modules: Any
    readers: Any
    unread: Any
    time_axis: bool
    stated: Any
    readings: list[Any] | None
    widths: Any
    channels_last: bool | None
    fixed: Any
    embed: Any
    droppers: Any
    images: Any
    convolves: Any
    outputs: Any
    versions: Any
    grid: tuple[Any, ...] | None
    handles: Any
    running: Any
    repeated: Any
    settled: bool
    depth: Any
    def __init__(self, model: nn.Module, layers: Any = 'all', attention: bool = True, prefix: int | None = None, channels_last: bool | None = None, time_axis: bool = False, grid: tuple[Any, ...] | None = None, readings: list[Any] | None = None, settled: bool = False) -> None: ...
    def install_hooks(self) -> None: ...
    def remove(self) -> None: ...
    def features(self, logits: Tensor | None = None, depth: int | None = None) -> Features: ...
    def pop_features(self, logits: Any = None, depth: Any = None) -> Features: ...
    def check(self, depth: int | None = None) -> None: ...
    def changed(self) -> list[Any]: ...
    def tokens(self, i: int, out: Tensor) -> tuple[Any, ...]: ...
    def run(self, depth: int | None, *args: Any, **kwargs: Any) -> Any: ...
def tap(model: nn.Module, layers: Any = 'all', attention: bool = True, prefix: int | None = None, channels_last: bool | None = None, time_axis: bool = False, grid: tuple[Any, ...] | None = None) -> AbstractContextManager[Taps]: ...
class TappedModel(nn.Module):
    model: nn.Module
    names: Any
    attention: bool
    prefix: int | None
    channels_last: bool | None
    time_axis: bool
    grid: tuple[Any, ...] | None
    logits: Any
    by_index: Any
    readings: Any
    ran: Any
    stops: bool
    taps: Any
    made: Any
    widths: Any
    tokens: Any
    grid_sizes: Any
    heads: Any
    input_size: Any
    architecture: Any
    model_args: Any
    origin: str
    def __init__(self, model: nn.Module, layers: Any = 'all', attention: bool = True, mean: Any = None, std: Any = None, prefix: int | None = None, channels_last: bool | None = None, time_axis: bool = False, grid: tuple[Any, ...] | None = None, logits: Any = 'auto') -> None: ...
    def forward(self, x: Any, *args: Any, depth: int | None = None, **kwargs: Any) -> Features: ...
    def __call__(self, x: Any, *args: Any, depth: int | None = None, **kwargs: Any) -> Features: ...
    def install_hooks(self) -> TappedModel: ...
    @property
    def stated_reading(self) -> dict[str, Any]: ...
    def remove_hooks(self) -> None: ...
    def normalize(self, x: Tensor) -> Tensor: ...
    def infer_shapes(self, x: Any) -> Features: ...
    @property
    def has_attention(self) -> bool: ...
    def settle(self, x: Any, *args: Any, **kwargs: Any) -> None: ...
def __getattr__(name: str) -> Any: ...     # the others are not public
