"""Files that are whole or not there, and a SimpleNN in one of them."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import SimpleNN

FORMAT = 1


class CheckpointError(Exception):
    """The file does not hold a model that :func:`save_model` wrote."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, so that at any moment `path` holds its old content, or none, or all of the new.

    Raises OSError, and then leaves `path` as it was and nothing beside it.
    """
    # open() and not tempfile: tempfile's files can be read by their owner only, whatever the umask says.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
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
    """Write the float32 parameters of `model` as safetensors, with `about` in the metadata.

    The metadata is one entry, `fusednn`, holding JSON: safetensors writes several entries in a random order, and
    equal models would be unequal files. Raises OSError as :func:`write_atomically` does.
    """
    metadata = {"fusednn": json.dumps({"format": FORMAT, **about}, sort_keys=True)}
    write_atomically(path, save(model.state_dict(), metadata))


def load_model(path: Path) -> SimpleNN:
    """The model that :func:`save_model` wrote to `path`, on the CPU.

    Raises CheckpointError if `path` is cut short or holds anything else, OSError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    _check_format(path, metadata)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {tensor.dtype for tensor in state.values()}
    match found:
        case {"fc1.weight": (hidden, inputs), "fc2.weight": (outputs, _)} if dtypes == {torch.float32}:
            model = SimpleNN(inputs, hidden, outputs, bias="fc1.bias" in found, device="meta")
            if found == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}:
                model.to_empty(device="cpu").load_state_dict(state)
                return model
    raise CheckpointError(f"{path} does not hold the parameters of a float32 SimpleNN but {found}, {dtypes}")


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    try:
        found = json.loads(metadata["fusednn"])["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} was not written by fusednn: its metadata has no format") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version of fusednn reads format {FORMAT}")
