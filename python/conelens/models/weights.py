"""Weight files: safetensors or `weights_only` state dicts, read without running code from the file."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from conelens.errors import CheckpointError

_NESTED = ("state_dict", "model_state_dict", "model", "net")
_HALF = (torch.float16, torch.bfloat16)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name, on the CPU, in the dtype of the file.

    `.safetensors` is read by safetensors; anything else by `torch.load(weights_only=True)`, which builds
    tensors and never calls what a pickle names. A state dict nested under `state_dict`, `model_state_dict`,
    `model` or `net` is found, and a `module.` prefix (DataParallel) is dropped.

    Raises:
        CheckpointError: no such file, not a weight file, or a pickle that would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weight file at {path}")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a state dict of named tensors")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its keys are {sorted(map(str, found))[:5]}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model` from a weight file and return it; half-precision tensors become the parameter's dtype.

    Raises:
        CheckpointError: see `read_state_dict`; or names or shapes that do not fit the model, each listed.
    """
    found = read_state_dict(path)
    wanted = model.state_dict()
    # counters of batch norm are absent from old files and play no part in a forward pass
    missing = [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")]
    unknown = [n for n in found if n not in wanted]
    if missing or unknown:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {_name_trouble(missing, unknown)}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path} does not fit {type(model).__name__}: {name} has shape {tuple(value.shape)}, "
                f"the model wants {tuple(wanted[name].shape)}"
            )
        if value.dtype in _HALF:
            found[name] = value.to(wanted[name].dtype)
    model.load_state_dict(found, strict=False)
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that names more than tensors, so that opening it could run code; refused. "
            "Get the weights as safetensors, or where you trust the file, load it in Python and save model.state_dict() alone."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable weight file: {_first_line(error)}") from error


def _name_trouble(missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
    if unknown:
        hint = difflib.get_close_matches(unknown[0], missing, n=1) if missing else []
        also = f"; did {unknown[0]} mean {hint[0]}?" if hint else ""
        parts.append(f"{len(unknown)} are unknown ({_some(unknown)}){also}")
    return "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
