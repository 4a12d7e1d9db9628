"""Files that are in the way when a run continues are moved aside, never deleted."""

from __future__ import annotations

import os
from pathlib import Path


class Aside:
    """Moves files of a run into a folder `replaced-NNN` beside them, made when first needed.

    Attributes:
        folder: That folder; None while nothing was moved.
        moved: What was moved, by its name in the run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)
        self.folder: Path | None = None
        self.moved: list[str] = []

    def move(self, path: Path) -> Path:
        """Move a file or folder of the run; returns where it is now."""
        target = self._free(path.relative_to(self._run_dir))
        os.rename(path, target)
        return target

    def write(self, name: str, text: str) -> Path:
        """Keep a text that is about to be removed from a file of the run."""
        target = self._free(Path(name))
        with target.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return target

    def describe(self) -> str:
        """What was moved, in a line for people; empty when nothing was."""
        if self.folder is None:
            return ""
        shown = ", ".join(self.moved[:4])
        more = f" and {len(self.moved) - 4} more" if len(self.moved) > 4 else ""
        return f"kept in {self.folder}, not part of what goes on now: {shown}{more}"

    def _free(self, name: Path) -> Path:
        """A path in the folder that is not taken."""
        folder = self.folder = self.folder or self._new()
        self.moved.append(name.as_posix())
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while target.exists():
            number += 1
            target = folder / name.with_name(f"{name.name}.{number}")
        return target

    def _new(self) -> Path:
        number = 1
        while True:
            folder = self._run_dir / f"replaced-{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
