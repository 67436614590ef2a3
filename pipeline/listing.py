"""The inputs of a command → one stream of images, in the order of the plan."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice, pairwise
from typing import Final

from pipeline.errors import NoImagesError, ReadError, StorageError
from pipeline.seen import SeenUris
from pipeline.sources import ListedImage, ListingOptions, Source, expand_braces, normalise_input, open_source
from pipeline.sources.base import IMAGE_SUFFIXES
from pipeline.sources.tree import TreeSource
from pipeline.storage import describe, has_scheme, is_transient

_SHOWN_SUFFIXES: Final = 8
_SHOWN_FAULTS: Final = 10
# Containers that are being indexed at the same time: in an object store, that is mostly waiting.
_CONTAINERS_AHEAD: Final = 4
_REMOTE_CONTAINERS_AHEAD: Final = 64
# Images of a container that are listed before it is its turn.
_IMAGES_AHEAD: Final = 10_000
# The images of a container so far, and those that are still to be listed.
_Begun = tuple[list[ListedImage], Iterator[ListedImage]]


class Inputs:
    """All inputs of a command, each opened; tables first, since they know labels that folders do not, then sorted.

    Raises NoImagesError, with a fault for every input that is missing.
    """

    def __init__(self, given: tuple[str, ...], *, options: ListingOptions, limit: int | None = None) -> None:
        self.given = given
        self.limit = limit
        self.skipped: Counter[str] = Counter()
        """How many files were passed over, by suffix or reason, as far as images were listed."""
        self.num_repeated = 0
        """How many images were met more than once, and listed once."""
        self.notices: list[str] = []
        """What else is worth a line to the user."""
        self.class_names: set[tuple[str, ...]] = set()
        """The names of all classes in the order of their ids, as each of the tables says that knows them, as far as
        images were listed."""
        self._primed: Iterator[ListedImage] | None = None
        options = replace(options, notice=self.notices.append, class_names=self.class_names.add)
        self._sources = _open_sources(given, options)
        is_remote = any(has_scheme(source.uri) for source in self._sources)
        self._containers_ahead = _REMOTE_CONTAINERS_AHEAD if is_remote else _CONTAINERS_AHEAD

    def list_images(self) -> Iterator[ListedImage]:
        """All images, each once, or the first `limit` of them; raises NoImagesError at the end where there was none."""
        if self._primed is not None:
            primed, self._primed = self._primed, None
            yield from primed
            return
        for counts in (self.skipped, *(source.skipped for source in self._sources)):
            counts.clear()
        self.class_names.clear()
        self.num_repeated = 0
        num_images = 0
        with contextlib.closing(self._list_distinct()) as images:
            for image in islice(images, self.limit):
                num_images += 1
                yield image
        if num_images == 0:
            raise _nothing_found(self.given, self.skipped)

    @property
    def uris(self) -> list[str]:
        """Where the inputs are: of a pattern, the folder that it begins in."""
        return [source.uri for source in self._sources]

    @property
    def trees(self) -> list[TreeSource]:
        """The folders among the inputs."""
        return [source for source in self._sources if isinstance(source, TreeSource)]

    def check_not_empty(self) -> None:
        """Raise NoImagesError where there is nothing to list; what is listed for that is not listed again."""
        images = self.list_images()
        self._primed = chain([next(images)], images)

    def _list_distinct(self) -> Generator[ListedImage, None, None]:
        if not self._may_repeat:
            yield from self._list_all()
            return
        with SeenUris() as seen, contextlib.closing(self._list_all()) as images:
            for image in images:
                if seen.add(image.uri):
                    yield image
                else:
                    self.num_repeated += 1

    @property
    def _may_repeat(self) -> bool:
        """Whether one image may come from two inputs: from tables that name it, or from a folder inside another."""
        if any(source.may_repeat for source in self._sources):
            return True
        uris = sorted(f"{source.uri.rstrip('/')}/" for source in self._sources)
        return any(inner.startswith(outer) for outer, inner in pairwise(uris))

    def _list_all(self) -> Generator[ListedImage, None, None]:
        """The images of all sources and of the containers in them, some containers ahead of their turn."""
        threads = ThreadPoolExecutor(self._containers_ahead, thread_name_prefix="index")
        ahead: deque[ListedImage | tuple[Source, Future[_Begun]]] = deque()
        num_containers = 0
        try:
            for item in chain.from_iterable(map(self._list_source, self._sources)):
                if isinstance(item, ListedImage):
                    ahead.append(item)
                else:
                    ahead.append((item, threads.submit(_begin, item)))
                    num_containers += 1
                while ahead and (
                    isinstance(ahead[0], ListedImage)
                    or num_containers > self._containers_ahead
                    or len(ahead) > _IMAGES_AHEAD
                ):
                    num_containers -= not isinstance(ahead[0], ListedImage)
                    yield from self._finish(ahead.popleft())
            while ahead:
                yield from self._finish(ahead.popleft())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _list_source(self, source: Source) -> Iterator[ListedImage | Source]:
        """What an input holds; a container is itself what it holds."""
        if not source.is_folder:
            yield source
            return
        is_empty = True
        for item in source.list_images():
            is_empty = False
            yield item
        self.skipped += source.skipped
        if is_empty and isinstance(source, TreeSource) and source.pattern is not None:
            raise _nothing_found([f"{source.uri.rstrip('/')}/{source.pattern.text}"], source.skipped)

    def _finish(self, item: ListedImage | tuple[Source, Future[_Begun]]) -> Iterator[ListedImage]:
        if isinstance(item, ListedImage):
            yield item
            return
        source, begun = item
        head, rest = begun.result()
        yield from head
        yield from rest
        self.skipped += source.skipped


def exclude_known(images: Iterable[ListedImage], known: Iterable[str]) -> Iterator[ListedImage]:
    """Those of `images` whose URIs are not `known`; neither is ever in memory as a whole."""
    with SeenUris() as seen:
        for uri in known:
            seen.add(uri)
        yield from (image for image in images if seen.add(image.uri))


def _open_sources(given: tuple[str, ...], options: ListingOptions) -> list[Source]:
    named = {normalise_input(one): one for text in given for one in expand_braces(text)}

    def open_one(one: str) -> Source | str:
        try:
            return open_source(one, options=options)
        except NoImagesError as error:
            return str(error)

    # To see whether an object is there costs a request, and an interrupt must not wait for its answer.
    threads = ThreadPoolExecutor(_REMOTE_CONTAINERS_AHEAD if any(map(has_scheme, named)) else 1)
    try:
        opened = dict(zip(named, threads.map(open_one, named.values()), strict=True))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    faults = [fault for fault in opened.values() if isinstance(fault, str)]
    if (more := len(faults) - _SHOWN_FAULTS) > 0:
        faults[_SHOWN_FAULTS:] = [f"and {more:,} more inputs that cannot be read"]
    if faults:
        raise NoImagesError(*faults)
    sources = [(normal, source) for normal, source in opened.items() if not isinstance(source, str)]
    sources.sort(key=lambda pair: (not pair[1].may_repeat, pair[0].encode()))
    return [source for _, source in sources]


def _nothing_found(where: Iterable[str], skipped: Counter[str]) -> NoImagesError:
    seen = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common(_SHOWN_SUFFIXES))
    instead = f"there are {seen}" if seen else "nothing is there"
    return NoImagesError(
        f"found no images in {', '.join(map(repr, where))} ({instead}); "
        f"the names of images end in {' '.join(sorted(IMAGE_SUFFIXES))}"
    )


def _begin(source: Source) -> _Begun:
    images = _list_container(source)
    return list(islice(images, _IMAGES_AHEAD)), images


def _list_container(source: Source) -> Iterator[ListedImage]:
    """The images of a container; one that cannot be read is an entry of its own that says why."""
    try:
        for image in source.list_images():
            assert isinstance(image, ListedImage), "containers hold no containers"
            yield image
    except ReadError as error:
        yield ListedImage(source.uri, error=str(error))
    except OSError as error:
        kind, message = describe(error)
        if is_transient(error):
            raise StorageError(f"cannot read {source.uri}: {kind}: {message}") from error
        yield ListedImage(source.uri, error=f"{kind}: {message}")
