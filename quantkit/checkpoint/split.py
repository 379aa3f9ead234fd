"""A packed linear on disk that is several linears in transformers' model (Molmo 2's `att_proj`): its rows are cut.

transformers cuts a dense weight by an operation of its conversion. Here the operation also cuts the tensors of a packed
weight, each by its own rule. What stands in for it is given to transformers with its other conversions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import ConversionOps, WeightConverter

from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.layers.quant_linear import QuantLinear

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class SplitRows(ConversionOps):
    """Cuts one tensor into those of several linears, packed or not. dense: transformers' operation for dense ones."""

    def __init__(self, dense: Any) -> None:
        self.dense = dense

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **given: Any,
    ) -> dict[str, Any]:
        """Target pattern -> its part. given: among others `full_layer_name`, the parameter of the first part."""
        full_layer_name: str = given["full_layer_name"]
        model: PreTrainedModel = given["model"]
        names = [full_layer_name.replace(target_patterns[0], target, 1) for target in target_patterns]
        linears: list[Any] = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        leaf = full_layer_name.rpartition(".")[2]
        if not isinstance(linears[0], QuantLinear) or leaf not in linears[0].tensors:
            found: dict[str, Any] = self.dense.convert(input_dict, source_patterns, target_patterns, **given)
            return found
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return dict(zip(target_patterns, cut(full_layer_name, leaf, tensor, linears), strict=True))

    @property
    def reverse_op(self) -> Any:
        return self.dense.reverse_op


def cut(name: str, leaf: str, tensor: torch.Tensor, linears: list[QuantLinear]) -> list[torch.Tensor]:
    """A stored tensor of a packed linear [N, K], cut into those of `linears`, which have its rows in this order.

    ModelError naming it if its rows cannot be cut there.
    """
    sizes = [linear.out_features for linear in linears]
    rows = [(*linear.tensors[leaf].shape, 1)[0] for linear in linears]
    parts = codec(linears[0].file_format).cut(leaf, tensor, linears[0].scheme, sizes, rows)
    if parts is not None:
        return parts
    raise ModelError(
        f"{name}: a tensor of shape {list(tensor.shape)} cannot be cut into parts of {sizes} rows"
    )


def cutting(conversions: list[Any], modules: Iterable[str]) -> list[Any]:
    """transformers' conversions, those of a packed linear that becomes `modules` of the model with a `SplitRows`."""
    return [
        _cutting(each) if isinstance(each, WeightConverter) and _makes(each, modules) else each
        for each in conversions
    ]


def _makes(each: Any, modules: Iterable[str]) -> bool:
    """Whether a conversion cuts one tensor into those of some modules."""
    ends = [f".{target}".removesuffix(".weight") for target in each.target_patterns]
    return (
        len(ends) > 1
        and len(each.source_patterns) == 1
        and any(f".{m}".endswith(tuple(ends)) for m in modules)
    )


def _cutting(each: Any) -> Any:
    names = [*each.source_patterns, *each.target_patterns]
    (operation,) = each.operations
    if all(name.endswith(".weight") for name in names):  # as packed tensors end otherwise
        names = [name.removesuffix(".weight") for name in names]
    made = WeightConverter(names[:1], names[1:], [SplitRows(operation)])
    for scope in ("scope_prefix", "base_model_prefix"):
        if hasattr(each, scope):
            setattr(made, scope, getattr(each, scope))
    return made
