"""Files that an interruption, a full disk or a second process cannot spoil: the old content or the new, never half."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"


class WriteFailed(Exception):
    """Output cannot be written; the message names the place, the reason and what is free there."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a block that does nothing but write to `path`: each failure of it becomes one of writing.

    Libraries report a full disk in their own ways: torch as a RuntimeError, safetensors as a SafetensorError.
    """
    try:
        yield
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).strip().partition("\n")[0]
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free / (1 << 20)
        raise WriteFailed(f"{path} cannot be written ({reason}; the disk has {free:,.0f} MiB free)") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is moved into place, when the disk has it, else removed."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        make_readable(temporary)
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def make_readable(path: Path) -> None:
    """The permissions a new file has by the user's umask; temporary files and safetensors' have 0600."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def move_folder(source: Path, target: Path) -> None:
    """Moves a complete folder to `target`, replacing what is there, when the disk has all of it."""
    for path in (*source.rglob("*"), source):
        sync(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def sync(path: Path) -> None:
    """Returns when the disk has what is in the file, or which files are in the folder."""
    if path.is_dir() and sys.platform == "win32":  # has no handle on a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> None:
    """Writes the checksums of all files in `folder`, by which `damage` knows them again, when the disk has them."""
    contents = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    for path in contents:
        sync(path)
    write_json(folder / CHECKSUMS, {p.relative_to(folder).as_posix(): digest(p) for p in contents})
    sync(folder)


def damage(folder: Path) -> str | None:
    """What differs in `folder` from when it was sealed, the first of it; None when it is whole."""
    try:
        for name, expected in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest(folder / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing: it was not written to its end"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    return None


class Locked(Exception):
    """Another process holds the lock; `args[0]` is what it wrote into it."""


@contextmanager
def lock(path: Path, text: str) -> Iterator[None]:
    """Holds `path` as a lock that says `text`, until the block ends or the process dies.

    The lock is the operating system's, on the open file: what a dead process has left is free. Raises Locked
    where another process (or thread) holds it, OSError on a file system without locks.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(handle):
                raise Locked(os.read(handle, 200).decode(errors="replace"))
            # The last holder may have removed the file after it was opened here; then the lock is on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, text.encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; one that stays is free
            path.unlink()
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others must be able to read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
