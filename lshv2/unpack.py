"""A package out of its zip, trusting nothing in it: safe names, listed sizes, sha256 of every member."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from lshv2.errors import UserError

MANIFEST = "MANIFEST.json"


def unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Every member into `folder`, verified; returns the manifest's `members` and `expected`.

    Raises UserError on a file that is no whole zip, a name that would leave `folder`, a member that is missing,
    unlisted or there twice, and the first one whose size or sha256 is not the listed one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _read_manifest(path, archive)
            members = manifest["members"]
            names = [info.filename for info in archive.infolist() if info.filename != MANIFEST]
            for name in [*names, *members]:
                _check_name(path, name)
            if odd := sorted(Counter(names) - Counter(list(members))) or sorted(members.keys() - set(names)):
                raise UserError(f"{path}: member {odd[0]} is missing, unlisted or there twice: fetch the package again")
            for name in names:
                _extract(path, archive, name, members[name], folder)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a package") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole zip file ({error}): fetch or make the package again") from None
    return manifest


def _read_manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        manifest = json.loads(archive.read(MANIFEST))
        return {"members": dict(manifest["members"]), "expected": manifest["expected"]}
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: {MANIFEST} is missing or damaged ({error}): make the package again") from None


def _check_name(path: Path, name: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or name.endswith("/") or not name:
        raise UserError(f"{path}: member {name!r} would be written outside of its folder: do not trust this package")


def _extract(path: Path, archive: zipfile.ZipFile, name: str, entry: dict[str, Any], folder: Path) -> None:
    """One member, read no further than its listed size, compared with its sha256."""
    digest, left = hashlib.sha256(), int(entry["bytes"])
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(name) as source, open(target, "wb") as file:
            while block := source.read(min(1 << 20, left + 1)):
                left -= len(block)
                digest.update(block)
                file.write(block)
                if left < 0:
                    break
    except (zipfile.BadZipFile, zlib.error, EOFError):
        left = -1
    if left != 0 or digest.hexdigest() != entry["sha256"]:
        raise UserError(f"{path}: member {name} is damaged (its sha256 is another): fetch or make the package again")
