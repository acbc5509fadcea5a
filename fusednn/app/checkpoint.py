"""Files that are whole or not there, and a SimpleNN in one of them."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import SimpleNN
from ..dispatch import DTYPES

FORMAT = 2
"""1 had no checksum."""

OLD_SECONDS = 3600
"""Nobody writes a file for so long: a temporary one that is older was left by a run that was killed."""


class CheckpointError(Exception):
    """The file does not hold a model that :func:`save_model` wrote."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, so that at any moment `path` holds its old content, or none, or all of the new.

    Raises OSError, and then leaves `path` as it was and nothing beside it.
    """
    for left in path.parent.glob(f".fusednn-{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD_SECONDS:
                left.unlink()
    # open() and not tempfile: tempfile's files can be read by their owner only, whatever the umask says.
    temporary = path.with_name(f".fusednn-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name outlives a power cut too
    finally:
        os.close(directory)


def save_model(model: SimpleNN, path: Path, about: Mapping[str, int | float | str]) -> None:
    """Write the parameters of `model`, of one floating dtype, as safetensors, with `about` and a checksum of both.

    The metadata is one entry, `fusednn`, holding JSON: safetensors writes several entries in a random order, and
    equal models would be unequal files. Raises TypeError for other dtypes, OSError as :func:`write_atomically` does.
    """
    state, noted = model.state_dict(), {"format": FORMAT, **about}
    if len(dtypes := {tensor.dtype for tensor in state.values()}) > 1 or not dtypes <= {*DTYPES}:
        raise TypeError(f"a model of {dtypes} would not be read again")
    metadata = {"fusednn": json.dumps({**noted, "sha256": _checksum(state, noted)}, sort_keys=True)}
    write_atomically(path, save(state, metadata))


def _checksum(state: Mapping[str, torch.Tensor], noted: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(noted, sort_keys=True).encode() + save(dict(state))).hexdigest()


def load_model(path: Path) -> SimpleNN:
    """The model that :func:`save_model` wrote to `path`, on the CPU.

    Raises CheckpointError if `path` is cut short, changed or holds anything else, OSError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    noted = _noted(path, metadata)
    if noted.pop("sha256", None) != _checksum(state, noted):
        raise CheckpointError(f"{path} is damaged: its content is not that of its checksum")
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {tensor.dtype for tensor in state.values()}
    match found:
        case {"fc1.weight": (hidden, inputs), "fc2.weight": (outputs, _)} if len(dtypes) == 1 and dtypes <= {*DTYPES}:
            model = SimpleNN(inputs, hidden, outputs, "fc1.bias" in found, torch.device("meta"), dtypes.pop())
            if found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}:
                model.to_empty(device="cpu").load_state_dict(state)
                return model
    raise CheckpointError(f"{path} does not hold the parameters of a SimpleNN but {found}, {dtypes}")


def _noted(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What save_model noted, in a format that is known."""
    try:
        noted: dict[str, Any] = json.loads(metadata["fusednn"])
        found = noted["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} was not written by fusednn: its metadata has no format") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}; this version of fusednn reads format {FORMAT}")
    return noted
