"""Kernels that were compiled beforehand are found where their cache was carried to."""

import json
import tarfile
from pathlib import Path

from bench import packing


def test_a_cache_that_was_moved_is_found(tmp_path: Path) -> None:
    (tmp_path / "KEY").mkdir()
    group = tmp_path / "KEY" / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": {"kernel.cubin": "/elsewhere/KEY/kernel.cubin"}}))
    packing.relocate(tmp_path)
    assert json.loads(group.read_text()) == {"child_paths": {"kernel.cubin": str(tmp_path / "KEY" / "kernel.cubin")}}


def test_what_is_packed(tmp_path: Path) -> None:
    folder = tmp_path / "kernels" / "KEY"
    folder.mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "kernel.source"):
        (folder / name).write_text(name)
    packing.pack_kernels(tmp_path / "kernels")
    with tarfile.open(tmp_path / "kernels.tar.xz") as archive:
        names = {name for name in archive.getnames() if "." in name}
    assert names == {"kernels/KEY/kernel.cubin", "kernels/KEY/kernel.json"}


def test_an_archive_is_replaced_whole(tmp_path: Path) -> None:
    bundle, file = tmp_path / "bundle.tar.gz", tmp_path / "a.json"
    for content in ("one", "two"):
        file.write_text(content)
        packing.pack(bundle, [file])
        with tarfile.open(bundle) as archive:
            member = archive.extractfile("a.json")
            assert member is not None
            assert member.read().decode() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "bundle.tar.gz"]
