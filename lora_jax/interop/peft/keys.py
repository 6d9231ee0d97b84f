"""The names of tensors in a PEFT file, taken apart and put together."""

from __future__ import annotations

from typing import NamedTuple

from lora_jax.adapters import AdapterError

from ..module_names import BIAS, WEIGHT

PREFIX = "base_model.model."

# A linear layer's factors are modules there, an embedding's are parameters. DoRA's magnitudes have one name in both.
_MAGNITUDE = ".lora_magnitude_vector"
_FACTORS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
# A module with factors keeps what it had under this name; one that is saved in full, its biases under these.
_BASE = "base_layer"
_COPIES = ("original_module", "modules_to_save")


class FactorKey(NamedTuple):
    """A factor's tensor: `role` is `"a"`, `"b"` or `"magnitude"`; of the last, nothing says if it's an embedding's."""

    module: str
    role: str
    embedding: bool | None


class LeafKey(NamedTuple):
    """A whole parameter's tensor: `part` is `"weight"` or `"bias"`.

    `holder` is `"base_layer"` in a module with factors; of a module that is saved in full, PEFT leaves the biases as
    they were in `"original_module"`, and the trained ones again in `"modules_to_save"`, with `bias="all"`.
    """

    module: str
    part: str
    holder: str


def parse_key(name: str, where: str) -> FactorKey | LeafKey:
    """Takes the name of a tensor apart.

    Args:
        name: Name of a tensor, such as `base_model.model.bert.pooler.dense.lora_A.weight`.
        where: File, for error messages.

    Raises:
        AdapterError: No name that PEFT gives to a part of a LoRA.

    Example:
        >>> parse_key("base_model.model.layer.0.query.lora_A.weight", "")
        FactorKey(module='layer.0.query', role='a', embedding=False)
        >>> parse_key("base_model.model.layer.0.query.base_layer.bias", "")
        LeafKey(module='layer.0.query', part='bias', holder='base_layer')
        >>> parse_key("base_model.model.classifier.modules_to_save.default.dense.bias", "")
        LeafKey(module='classifier.dense', part='bias', holder='modules_to_save')
    """
    body = name.removeprefix(PREFIX)
    if body == name:
        raise AdapterError(f"{where}: the tensor '{name:.200}' has no name of PEFT's, which begin with {PREFIX}")
    for suffix, (role, embedding) in _FACTORS.items():
        if body.endswith(suffix) and body != suffix:
            return FactorKey(body.removesuffix(suffix), role, embedding)
    if body.endswith(_MAGNITUDE) and body != _MAGNITUDE:
        return FactorKey(body.removesuffix(_MAGNITUDE), "magnitude", None)
    if body.endswith("lora_B.bias"):
        raise AdapterError(f"{where}: '{name:.200}' is a bias beside `lora_B` (`lora_bias`), which has no place here")
    module, _, part = body.rpartition(".")
    if ".lora_" in body:
        raise AdapterError(
            f"{where}: '{name:.200}' is no tensor of a plain LoRA. If it has an adapter's name in it, save the adapter "
            "with `model.save_pretrained(folder)` in PEFT, which takes the name out"
        )
    module, holder = _unwrapped(module)
    if part not in (WEIGHT, BIAS) or not module:
        raise AdapterError(f"{where}: the tensor '{name:.200}' is neither a factor nor a `weight` or `bias`")
    return LeafKey(module, part, holder)


def _unwrapped(module: str) -> tuple[str, str]:
    """A module's name without what PEFT put into it, and what that was, `""` if it was nothing."""
    if module.endswith(f".{_BASE}"):
        return module.removesuffix(f".{_BASE}"), _BASE
    for holder in _COPIES:
        wrapped, found, inside = f"{module}.".partition(f".{holder}.")
        if found:
            if holder == "modules_to_save":  # in a head of several layers the adapter's name comes first
                inside = inside.partition(".")[2]
            return f"{wrapped}.{inside}".removesuffix("."), holder
    return module, ""


def factor_key(module: str, role: str, *, embedding: bool | None) -> str:
    """The name of a factor's tensor, the inverse of `parse_key`."""
    if role == "magnitude":
        return f"{PREFIX}{module}{_MAGNITUDE}"
    suffix = next(suffix for suffix, found in _FACTORS.items() if found == (role, embedding))
    return f"{PREFIX}{module}{suffix}"


def leaf_key(module: str, part: str, *, wrapped: bool = False) -> str:
    """The name of a whole parameter's tensor; `wrapped` in a module that has factors."""
    return f"{PREFIX}{module}.{'base_layer.' if wrapped else ''}{part}"
