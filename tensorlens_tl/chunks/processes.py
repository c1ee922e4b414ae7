"""Chunks run by one process, or by all that a launcher such as torchrun started.

1. Every process opens the folder and looks which chunks are missing.
2. Of these, process r of W runs the r-th, the (r + W)-th, and so on.
3. A process that refuses leaves a note, at which the others stop; then all refuse.
4. Every process reads all chunks in order of their number. So results are the same to the bit,
   whatever the number of processes was, and however often they were stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..checks import progress_bar
from .folder import Folder


@dataclass(frozen=True)
class Processes:
    """This process among those that run together.

    Attributes:
        number: Number of this process, from 0.
        count: How many there are.
    """

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Ask the launcher: accelerate joins the processes that torchrun or Slurm started."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Wait at the end for all processes; what one of them refuses, all refuse."""
        fault: ValueError | None = None
        try:
            yield
        except ValueError as error:
            fault = error
        if self.count > 1:
            from torch import distributed

            found: list[str | None] = [None] * self.count
            distributed.all_gather_object(found, None if fault is None else str(fault))
            for number, text in enumerate(found):
                if fault is None and text is not None:
                    fault = ValueError(f"Process {number} refused: {text}")
        if fault is not None:
            raise fault


def spread(
    resume: str | os.PathLike[str],
    question: str,
    n: int,
    run: Callable[[int, int], dict[str, Tensor]],
    progress: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Run all chunks that are missing, and give what all chunks left.

    Args:
        resume: Folder of finished chunks. All processes see it.
        question: Hash of all that the results depend on.
        n: Number of prompts.
        run: Runs the prompts from the first to the last + 1, and returns tensors by name.
        progress: Whether to show a progress bar on standard error after 2 s, in process 0.

    Yields:
        What every chunk left, in order.

    Raises:
        ValueError: If any process refuses something, or the folder holds another question.
    """
    processes = Processes.here()
    # 1. All look before any begins, so that all see the same.
    with processes.agreeing():
        folder = Folder.of(resume, question, n)
        note = folder.path / ".refused"
        note.unlink(missing_ok=True)
        mine = folder.missing[processes.number :: processes.count]
    # 2. The chunks of this process.
    with (
        processes.agreeing(),
        progress_bar("chunks", len(mine), progress and not processes.number) as bar,
    ):
        for chunk in mine:
            if note.exists():  # 3. Another process refused.
                break
            try:
                folder.write(chunk, run(*folder.span(chunk)))
            except ValueError:
                note.touch()
                raise
            bar.update()
    note.unlink(missing_ok=True)
    # 4. All chunks.
    for chunk in folder.chunks:
        yield folder.read(chunk)
