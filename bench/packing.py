"""Archives: the results of a run on a GPU, and kernels compiled beforehand, in Triton's cache."""

import json
import tarfile
from pathlib import Path


def pack(bundle: Path, files: list[Path]) -> None:
    """Write an archive of the files. One that is there is replaced when the new one is complete."""
    bundle.parent.mkdir(parents=True, exist_ok=True)
    unfinished = bundle.with_name(f"{bundle.name}.unfinished")
    with tarfile.open(unfinished, "w:gz") as archive:
        for file in files:
            archive.add(file, file.name)
    unfinished.replace(bundle)


def relocate(cache: Path) -> None:
    """Make a cache that was moved usable: Triton's cache holds absolute paths."""
    for group in cache.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text()).get("child_paths", {})
        here = {name: str(group.parent / name) for name in paths}
        if here != paths:
            group.write_text(json.dumps({"child_paths": here}))


def pack_kernels(cache: Path) -> None:
    """Pack a cache beside itself, as tar.xz, without the sources, which no run reads."""
    for file in cache.glob("*/*.source"):
        file.unlink()
    archive = cache.with_name(f"{cache.name}.tar.xz")
    with tarfile.open(archive, "w:xz", preset=2) as packed:
        packed.add(cache, cache.name)
    kernels = sum(1 for _ in cache.glob("*/*.cubin"))
    print(f"{kernels} kernels in {cache}, {archive.stat().st_size / 2**20:.1f} MiB packed in {archive}")
