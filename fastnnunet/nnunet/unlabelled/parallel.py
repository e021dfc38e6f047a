"""The same function over many cases, here or in processes, with failures returned beside results."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from fastnnunet.errors import BuildError, FastnnUNetError
from fastnnunet.events import Listener, Progress
from fastnnunet.system.children import Children

T = TypeVar("T")
R = TypeVar("R")


def each(function: Callable[[T], R], items: Mapping[str, T], processes: int) -> Iterator[tuple[str, R | Exception]]:
    """Yield (name, result or what it raised) of every item as it is done, in `processes` processes; up to 1: in this.

    `function` and items must be picklable. Raises BuildError when a process dies.
    """
    if processes <= 1 or len(items) <= 1:
        for name, item in items.items():
            yield name, _outcome(partial(function, item))
        return
    children = Children()
    with ProcessPoolExecutor(min(processes, len(items)), mp_context=children) as pool:
        try:
            futures = {pool.submit(function, item): name for name, item in items.items()}
            for future in as_completed(futures):
                if isinstance(future.exception(), BrokenProcessPool):
                    raise BuildError(
                        "a process died, usually for lack of memory\n"
                        "use fewer --workers and run the same command again; finished cases are kept"
                    )
                yield futures[future], _outcome(future.result)
        except KeyboardInterrupt:  # nobody waits for the cases they are at
            children.end()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def finish_each(
    function: Callable[[T], None], items: Mapping[str, T], processes: int, what: str, trouble: str, progress: Listener
) -> None:
    """Run `function` over every item as `each` does and tell of each that is done; the first that fails ends it.

    `what` is being done; `trouble`, with {} for a name, says what cannot be done. Raises what `function` does
    where that is one of our errors, else BuildError.
    """
    for done, (name, outcome) in enumerate(each(function, items, processes), start=1):
        if isinstance(outcome, FastnnUNetError):
            raise outcome
        if isinstance(outcome, Exception):
            raise BuildError(f"{trouble.format(name)}: {type(outcome).__name__}: {outcome}") from outcome
        progress(Progress(what=what, done=done, total=len(items), unit="cases"))


def _outcome(run: Callable[[], R]) -> R | Exception:
    try:
        return run()
    except Exception as e:  # from readers and frameworks underneath: the caller names the case
        return e
