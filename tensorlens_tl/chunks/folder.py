"""Finished chunks of one question in a folder, a file each. Nothing is executed in reading them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checks import file_path, write_whole

CHUNK = 64
"""Prompts in a chunk. It may not depend on the number of processes, nor on the batch."""
FORMAT = "tensorlens_tl chunks 1"


@dataclass(frozen=True)
class Folder:
    """A folder that holds the finished chunks of one question.

    Attributes:
        path: Where the folder is.
        n: Number of prompts.
    """

    path: Path
    n: int

    @classmethod
    def of(cls, resume: str | os.PathLike[str], question: str, n: int) -> Folder:
        """Open a folder, and make it where there is none.

        Args:
            resume: Where the folder is, or will be.
            question: Hash of all that the results depend on.
            n: Number of prompts.

        Returns:
            The folder, which exists now.

        Raises:
            ValueError: If the folder holds another question, or cannot be written.
        """
        path = file_path(resume, "resume")
        about = {"format": FORMAT, "question": question, "prompts": n, "chunk": CHUNK}
        file = path / "question.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                others = {name.name for name in path.iterdir()} - {file.name}
                if any(not name.startswith(".") for name in others):
                    raise ValueError(
                        f"resume={str(resume)!r} is a folder of other files. Pass a new folder."
                    )
                write_whole(file, lambda new: new.write_text(json.dumps(about)))
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"resume={str(resume)!r} cannot be used: {error}. Pass a new folder."
            ) from None
        if found != about:
            raise ValueError(
                f"resume={str(resume)!r} holds another question (other prompts, targets, options "
                "or weights). Pass another folder."
            )
        return cls(path, n)

    @property
    def chunks(self) -> range:
        """Numbers of all chunks."""
        return range(-(-self.n // CHUNK))

    def span(self, chunk: int) -> tuple[int, int]:
        """First and last + 1 prompt of a chunk."""
        return chunk * CHUNK, min((chunk + 1) * CHUNK, self.n)

    def file(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self.path / f"{chunk:08d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """The chunks that are not finished."""
        there = {path.name for path in self.path.glob("*.safetensors")}
        return [chunk for chunk in self.chunks if self.file(chunk).name not in there]

    def write(self, chunk: int, found: dict[str, Tensor]) -> None:
        """Keep a finished chunk: whole or not at all."""
        found = {name: tensor.cpu().contiguous() for name, tensor in found.items()}
        write_whole(self.file(chunk), lambda new: save_file(found, new))

    def read(self, chunk: int) -> dict[str, Tensor]:
        """Read a finished chunk.

        Args:
            chunk: Number of the chunk.

        Returns:
            What the chunk left, by name.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            return load_file(self.file(chunk))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.file(chunk)} cannot be read ({error}). Delete the file, and run again."
            ) from None
