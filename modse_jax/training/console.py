"""Console output of a run. Only the main process prints."""

from typing import TextIO

import tqdm

from modse_jax.runtime import processes


def log(text: str, file: TextIO | None = None) -> None:
    """Prints a message, on standard output by default, above the progress bar if there is one."""
    if processes.is_main_process():
        tqdm.tqdm.write(text, file=file)


def open_progress_bar(step: int, total_steps: int) -> tqdm.tqdm:
    """Returns a progress bar over training steps. It is shown only on a terminal."""
    return tqdm.tqdm(
        total=total_steps,
        initial=step,
        unit="step",
        disable=None if processes.is_main_process() else True,
        dynamic_ncols=True,
    )
