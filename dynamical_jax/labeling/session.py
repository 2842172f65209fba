"""Lets people label a folder of images, one session after the other, without a server.

A session hands out pictures, takes answers, and chooses the next batch in a thread of its own when
one is done; images drawn at random are handed out meanwhile. What it keeps is what
`dynamical-select` keeps, under the same names: the table of labels, the table of images to label
next, the model. Either program goes on where the other stopped.

An answer is on disk, in the table and in the log, before the next picture is handed out.
"""

import contextlib
import hashlib
import pathlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax.errors import UserError
from dynamical_jax.labeling import answers, choosing, classes, learner, review, standing, tables
from dynamical_jax.labeling import folder as folders
from dynamical_jax.labeling.answers import Answer, Batch
from dynamical_jax.labeling.book import Book
from dynamical_jax.labeling.choosing import Chosen, Settings
from dynamical_jax.labeling.folder import Folder, Pictures
from dynamical_jax.labeling.history import histories
from dynamical_jax.labeling.tables import Proposed
from dynamical_jax.labeling.worker import Worker

HOLD = 60.0
"""Seconds for which a picture that is shown to one is not handed out to another."""

RANDOM_AHEAD = 3
"""Images drawn at random that are handed out ahead, since the next batch may come any moment."""


NEXT_BATCH = "the next batch"
"""A job of the worker."""


class Offer(NamedTuple):
    """A picture to be labeled.

    Attributes:
      id: identifies the image in the browser, in place of its path.
      path: relative to the folder.
      kind: the reason why it is asked for, such as `answers.QUERY`.
      predicted: the class that the model predicts, or "".
      confidence: the model's probability of that.
      label: its present label, or "".
    """

    id: str
    path: str
    kind: str
    predicted: str
    confidence: float | None
    label: str


class NewAnswer(NamedTuple):
    """A person's answer to one image, as the page sends it.

    Attributes:
      id: of the image.
      what: `answers.LABEL`, `SKIP` or `BROKEN`.
      label: the class.
    """

    id: str
    what: str
    label: str = ""


class Conflict(NamedTuple):
    """A label that differs from the one that another person gave before; the later one counts."""

    path: str
    label: str
    before: str
    who: str


class Session:
    """Hands out the images of a folder to one or several people, and takes their labels.

    All methods may be called from any thread.

    Args:
      settings: the configuration.
      choose_next: called instead of `choosing.choose`.
      on_round: called in the session's thread when a batch is chosen, with the folder, what was
        chosen, and the batch.
      clock: seconds since 1970.

    Raises:
      UserError: if there are no images, or the tables cannot be read or contradict each other.
    """

    def __init__(
        self,
        settings: Settings,
        choose_next: Callable[..., Chosen] = choosing.choose,
        on_round: Callable[[Folder, Chosen, Batch], None] = lambda *_: None,
        clock: Callable[[], float] = time.time,
    ):
        if not 0 <= settings.audit_fraction <= 1:
            raise UserError(f"audit_fraction must be in [0, 1], got {settings.audit_fraction}")
        self._settings, self._choose, self._on_round = settings, choose_next, on_round
        self._clock = clock
        self._lock = threading.RLock()
        sheet = settings.output.with_suffix(".png")
        self.paths = folders.find(settings.images, sheet)
        update = folders.take_over(settings.table, settings.output, settings.images, self.paths)
        self.num_taken_over = update.num_new
        self._id_of = {path: _identifier(path) for path in self.paths}
        self._path_of = {identifier: path for path, identifier in self._id_of.items()}
        if len(self._path_of) < len(self.paths):
            raise UserError("two images have the same identifier: rename one of them")
        self._book = Book(
            settings.table,
            settings.images,
            self.paths,
            update.labels,
            map(classes.check_name, settings.classes),
        )
        self._skipped: set[str] = set()
        self._history = histories(self._book.log.answers)
        self._group = max((answer.group for answer in self._book.log.answers), default=0)
        self._held: dict[str, list[str]] = {}
        self._lease: dict[str, tuple[str, float]] = {}
        self._kind: dict[str, str] = {}
        self._drawn_in: dict[str, int] = {}
        self._pictures: Pictures | None = None
        self._originals: set[str] = set()
        self._predictions: dict[str, Proposed] = {}
        self._shuffle(self.paths)  # Nobody waits until they are read.
        self._suspects: list[review.Suspect] | None = None
        self._queue = self._last_batch()
        self._worker = Worker(self._lock, self._fall_back)

    def __enter__(self) -> "Session":
        self.start()
        return self

    def start(self) -> None:
        """Starts the thread, which first reads the images."""
        self._worker.start()
        with self._lock:
            if any(map(self._is_open, self._queue)):
                self._worker.add_job("the model", self._load)
            else:
                self._worker.add_job(NEXT_BATCH, self._next_batch)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, timeout: float | None = None) -> bool:
        """Stops the current task; returns whether it has stopped.

        No label is lost. A batch that was not chosen yet is chosen by the next session.

        Args:
          timeout: seconds to wait; by default as long as it takes.
        """
        return self._worker.close(timeout)

    @property
    def labels(self) -> dict[str, str]:
        """The present labels, path → class name."""
        with self._lock:
            return dict(self._book.labels)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order in which they were added; none is ever removed."""
        with self._lock:
            return list(self._book.classes)

    @property
    def log(self) -> answers.Log:
        """The log of all answers; callers only read it."""
        return self._book.log

    def path(self, identifier: str) -> pathlib.Path:
        """Returns the file of an image.

        Raises:
          UserError: if there is none.
        """
        return pathlib.Path(self._settings.images) / self._path_of_identifier(identifier)

    def offers(self, client: str, count: int = 1) -> list[Offer]:
        """Returns pictures to label: the first to show now, the others to show next.

        They are reserved for this client for `HOLD` seconds, and come first when it asks again.
        Pictures come from the batch; while there is none, they are drawn at random.

        Args:
          client: the browser tab that asks.
          count: the largest number of pictures.
        """
        with self._lock:
            now = self._clock()

            def free(path: str) -> bool:
                return self._is_open(path) and not self._held_by_other(path, client, now)

            held = [path for path in self._held.get(client, []) if free(path)]
            for path in self._queue:
                if len(held) >= count:
                    break
                if path not in held and free(path):
                    held.append(path)
            queued = any(path in self._queue for path in held)
            while not queued and len(held) < min(count, RANDOM_AHEAD):
                path = self._draw(lambda path: free(path) and path not in held)
                if path is None:
                    break
                held.append(path)
            self._lease = {
                path: lease for path, lease in self._lease.items() if now - lease[1] < HOLD
            }
            for path in set(self._held.get(client, [])) - set(held):
                if not self._held_by_other(path, client, now):
                    self._lease.pop(path, None)
            self._lease |= dict.fromkeys(held, (client, now))
            self._held[client] = held
            return [self._offer(path) for path in held[:count]]

    def answer(
        self, client: str, new_answers: Sequence[NewAnswer], who: str = ""
    ) -> list[Conflict]:
        """Writes answers to disk; returns those that differ from the labels of other people.

        Args:
          client: the browser tab that answers.
          new_answers: one answer, or those of a grid.
          who: the person's name, for the log.

        Raises:
          UserError: if there is no such image or class, or the table or the log cannot be written.
            Then nothing was taken.
        """
        with self._lock:
            paths = [self._path_of_identifier(one.id) for one in new_answers]
            for one in new_answers:
                if one.what not in (answers.LABEL, answers.SKIP, answers.BROKEN):
                    raise UserError(f"unknown answer {one.what!r}")
                if one.what == answers.LABEL and one.label not in self._book.classes:
                    raise UserError(f"there is no class {one.label!r}: add it first")
            self._group += 1
            before = [self._book.state(path) for path in paths]
            entries = [
                self._entry(path, one, client, who)
                for path, one in zip(paths, new_answers, strict=True)
            ]
            conflicts = list(self._conflicts(entries))
            changes = {
                path: one.label if one.what == answers.LABEL else None
                for path, one in zip(paths, new_answers, strict=True)
                if one.what == answers.LABEL
                or (one.what == answers.BROKEN and path in self._book.labels)
            }
            with self._book.saved(changes):
                self._book.log.add(entries)
            for path, one in zip(paths, new_answers, strict=True):
                self._book.broken.discard(path)
                self._skipped.discard(path)
                if one.what == answers.BROKEN:
                    self._book.broken.add(path)
                elif one.what == answers.SKIP and path not in self._book.labels:
                    self._skipped.add(path)
                self._lease.pop(path, None)
            self._history.setdefault(client, []).append(list(zip(paths, before, strict=True)))
            self._after_answers()
            return conflicts

    def undo(self, client: str, who: str = "") -> list[Offer]:
        """Takes back a client's last answers, and hands out their pictures to it again.

        Labels that another client has changed since stay as they are.

        Args:
          client: the browser tab.
          who: the person's name, for the log.

        Returns:
          The pictures; none if there is nothing to take back.
        """
        with self._lock:
            history = self._history.get(client, [])
            if not history:
                return []
            steps = [
                (path, state) for path, state in history[-1] if self._last_client(path) == client
            ]
            labels = {path: state.label for path, state in steps}
            self._group += 1
            changes = {
                path: label or None
                for path, label in labels.items()
                if self._book.labels.get(path, "") != label
            }
            with self._book.saved(changes):
                self._book.log.add(
                    [
                        self._entry(path, NewAnswer("", answers.UNDO, label), client, who)
                        for path, label in labels.items()
                    ]
                )
            history.pop()
            for path, state in steps:
                self._skipped.discard(path)
                self._book.broken.discard(path)
                if state.broken:
                    self._book.broken.add(path)
            now = self._clock()
            open_again = [path for path, _ in steps if self._is_open(path)]
            others = [path for path in self._held.get(client, []) if path not in open_again]
            self._held[client] = open_again + others
            self._lease |= dict.fromkeys(open_again, (client, now))
            return [self._offer(path) for path, _ in steps]

    def grid(self, client: str, name: str = "", count: int = 25) -> list[Offer]:
        """Returns pictures for which the model predicts one class, the most confident first.

        Args:
          client: the browser tab that asks; the pictures are reserved for it.
          name: the class; by default the one predicted for the most images.
          count: the largest number of pictures.
        """
        with self._lock:
            now = self._clock()
            # Not what was drawn at random or asked for by name: it is answered without the guess.
            choosable = set(self._choosable())
            free = [
                image
                for image in self._predictions.values()
                if image.path in choosable
                and not self._held_by_other(image.path, client, now)
                and self._kind.get(image.path, answers.GRID) == answers.GRID
            ]
            sizes = Counter(image.predicted for image in free)
            if not sizes:
                return []
            name = name or max(sizes, key=lambda name: (sizes[name], name))
            alike = [image for image in free if image.predicted == name]
            alike = sorted(alike, key=lambda image: -image.confidence)[:count]
            self._lease |= {image.path: (client, now) for image in alike}
            for image in alike:
                self._kind.setdefault(image.path, answers.GRID)
            return [self._offer(image.path) for image in alike]

    def add_class(self, name: str) -> str:
        """Adds a class unless it exists; returns its name.

        Raises:
          UserError: if the name is not allowed.
        """
        name = classes.check_name(name)
        with self._lock:
            self._book.add_classes([name])
        return name

    def look_alike(self, name: str) -> str:
        """Returns a class that a new one may be, mistyped; "" if there is none like it."""
        pairs = classes.look_alikes([*self.class_names, classes.check_name(name)])
        return next((one for one, other in pairs if other == name.strip()), "")

    def review(self) -> None:
        """Starts the search for labels that may be wrong, in the session's thread."""
        with self._lock:
            self._worker.add_job("labels that may be wrong", self._review)

    def status(self) -> dict[str, Any]:
        """Returns the numbers that the page shows beside the picture, as JSON values."""
        with self._lock:
            counts = Counter(self._book.labels.values())
            left = sum(map(self._is_open, self._queue))
            return {
                "classes": [{"name": name, "count": counts[name]} for name in self._book.classes],
                "images": len(self.paths),
                "labeled": len(self._book.labels),
                "aside": len(self._book.broken) + len(self._skipped),
                "batch": {"size": len(self._queue), "left": left, "round": self._round},
                "doing": self._worker.doing,
                "share": self._worker.share,
                "error": self._worker.error,
                "finished": not left and not self._worker.doing and not self._remaining(),
                "has_model": bool(self._predictions),
            }

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the session, as JSON values; `standing` explains the numbers."""
        with self._lock:
            log = (list(self._book.log.answers), list(self._book.log.batches))
            labels, suspects = dict(self._book.labels), self._suspects
        found = standing.points(*log, labels)
        stop, why = standing.may_stop(log[1])
        last = standing.recent(found)
        rounds = [
            {
                **part,
                **{kind: part[kind] and part[kind]._asdict() for kind in ("random", "query")},
            }
            for part in standing.by_round(found)
        ]
        agreement = [
            {"num_labeled": batch.num_labeled, "kappa": batch.kappa, "size": batch.kappa_size}
            for batch in log[1]
            if batch.kappa is not None
        ]
        now = standing.share(last)
        return {
            "rounds": rounds,
            "now": now and now._asdict(),
            "agreement": agreement,
            "gain": standing.gain(found, max(1, len(labels)))._asdict(),
            "stop": {"stop": stop, "why": why},
            "suspects": None
            if suspects is None
            else [
                {**suspect._asdict(), "id": self._id_of[suspect.path]}
                for suspect in suspects
                if labels.get(suspect.path) == suspect.label
            ],
        }

    def predictions(self) -> list[Proposed]:
        """Returns the predictions for all images without a label; none without a model."""
        with self._lock:
            aside = self._book.labels.keys() | self._book.broken
            return [image for path, image in self._predictions.items() if path not in aside]

    def wait(self, timeout: float = 60.0) -> None:
        """Waits until the thread has no task.

        Raises:
          TimeoutError: if that takes longer than `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while self._worker.is_busy:
            if time.monotonic() > end:
                raise TimeoutError(f"still {self._worker.doing} after {timeout} s")
            time.sleep(0.01)

    # The methods below are called with the lock held, except for the tasks of the thread.

    @property
    def _round(self) -> int:
        return len(self._book.log.batches)

    def _path_of_identifier(self, identifier: str) -> str:
        path = self._path_of.get(identifier)
        if path is None:
            raise UserError("there is no such image")
        return path

    def _is_open(self, path: str) -> bool:
        """Whether an image may be asked for."""
        return not (path in self._book.labels or path in self._book.broken or path in self._skipped)

    def _held_by_other(self, path: str, client: str, now: float) -> bool:
        holder, since = self._lease.get(path, (client, now))
        return holder != client and now - since < HOLD

    def _unique_paths(self) -> set[str] | dict[str, str]:
        """Returns the paths without copies of others, or all paths before the images are read."""
        if self._pictures is None:
            return self._id_of
        if not self._originals:
            rows = np.unique(self._pictures.first[self._pictures.readable])
            self._originals = {self.paths[row] for row in rows}
        return self._originals

    def _choosable(self) -> list[str]:
        """Returns the paths to choose from, without copies of others or of labeled images."""
        if self._pictures is None:
            return [path for path in self._id_of if self._is_open(path)]
        first = dict(zip(self.paths, self._pictures.first, strict=True))
        learned = {first[path] for path in self._book.labels}
        return [
            path
            for path in self._unique_paths()
            if self._is_open(path) and first[path] not in learned
        ]

    def _remaining(self) -> bool:
        """Whether there is any image left to be asked for."""
        return any(map(self._is_open, self._drawn)) or self._pictures is None

    def _draw(self, is_free: Callable[[str], bool]) -> str | None:
        """Returns a random image that nobody has been shown, or None."""
        queued = set(self._queue)
        while self._drawn and not self._is_open(self._drawn[-1]):
            self._drawn.pop()
        for path in reversed(self._drawn):
            if path not in queued and is_free(path):
                self._kind[path] = answers.RANDOM
                self._drawn_in[path] = self._round
                return path
        return None

    def _shuffle(self, paths: Iterable[str]) -> None:
        """Sets the order in which random images are handed out, the first at the end."""
        self._drawn = sorted(paths, key=self._place, reverse=True)

    def _place(self, path: str) -> float:
        """Returns where an image stands in the random order of this round."""
        return choosing.place(self._settings.config.seed, self._round, path)

    def _offer(self, path: str) -> Offer:
        guess = self._guess(path)
        kind = self._kind.get(path, answers.AGAIN)
        label = self._book.labels.get(path, "")
        return Offer(self._id_of[path], path, kind, guess.predicted, guess.confidence, label)

    def _guess(self, path: str) -> Proposed:
        """Returns the prediction of the newest model that was not trained on the image."""
        return self._predictions.get(path) or self._queue.get(path) or Proposed(path)

    def _entry(self, path: str, new_answer: NewAnswer, client: str, who: str) -> Answer:
        guess = self._guess(path)
        kind = answers.AGAIN if path in self._book.labels else self._kind.get(path, answers.AGAIN)
        # An image drawn before this batch was chosen has no place in the order of this round.
        late = kind == answers.RANDOM and self._drawn_in.get(path) != self._round
        return Answer(
            path,
            new_answer.what,
            new_answer.label,
            kind,
            self._round,
            guess.predicted,
            guess.confidence,
            who or client,
            client,
            self._clock(),
            self._group,
            0.0 if late else self._place(path),
        )

    def _last_client(self, path: str) -> str:
        """Returns the client that gave the last answer to an image."""
        of_path = (one.client for one in reversed(self._book.log.answers) if one.path == path)
        return next(of_path, "")

    def _conflicts(self, entries: Iterable[Answer]) -> Iterator[Conflict]:
        for entry in entries:
            before = self._book.labels.get(entry.path, "")
            if entry.what != answers.LABEL or not before or before == entry.label:
                continue
            last = [one for one in self._book.log.answers if one.path == entry.path]
            if not last or last[-1].client != entry.client:
                who = last[-1].who if last else "the table"
                yield Conflict(entry.path, entry.label, before, who)

    def _last_batch(self) -> dict[str, Proposed]:
        """Returns the rest of the batch of the last session, or of `dynamical-select`."""
        output, images = self._settings.output, self._settings.images
        proposed = tables.read_proposal(output, images)
        if tables.read_labels(output, images).by_path:
            # They are in the table of labels now, and there they may change.
            tables.write_proposal(output, proposed, self._settings.table)
        batches = self._book.log.batches
        audit = set(batches[-1].audit) if batches else set()
        known = {image.path: image for image in proposed if image.path in self._id_of}
        for path, image in known.items():
            at_random = answers.AUDIT if path in audit else answers.QUERY
            self._kind[path] = at_random if image.predicted else answers.RANDOM
        return known

    def _after_answers(self) -> None:
        if not any(map(self._is_open, self._queue)):
            self._worker.add_job(NEXT_BATCH, self._next_batch)

    # The thread.

    def _fall_back(self, failed: str) -> None:
        """Makes a batch of random images after the choice of a batch failed."""
        if failed != NEXT_BATCH:
            return
        paths = [path for path in reversed(self._drawn) if self._is_open(path)]
        self._queue = {path: self._guess(path) for path in paths[: self._settings.batch_size]}
        self._kind |= dict.fromkeys(self._queue, answers.RANDOM)

    def _folder(self) -> Folder:
        """Returns the images and the labels of the table, which other programs may have changed."""
        settings = self._settings
        if self._pictures is None:
            self._worker.report("reading the images", None)
            pictures = folders.read(settings.images, self.paths, **settings.reading)
            with self._lock:
                self._pictures = pictures
                self._shuffle(self._choosable())
        with self._lock:
            self._book.reread()
            return folders.with_labels(self._pictures, self._book.labels)

    def _load(self) -> None:
        """Reads the images, and predicts their classes with the saved model."""
        folder, settings = self._folder(), self._settings
        if len(folder.class_names) < 2:
            return
        start = learner.warm_start(folder, settings.config, settings.store)
        if start.round_index == 0 or start.difference or start.new_classes:
            return  # There is none that knows these classes.
        predictions = choosing.predict(
            folder,
            start.learner,
            lambda done, total: self._worker.report("looking at all images", done / total),
        )
        with self._lock:
            # Of what the batch asks for, the table of images to label has it.
            asked = {path: image for path, image in self._queue.items() if image.predicted}
            self._predictions = {**predictions, **asked}

    def _next_batch(self) -> None:
        folder, settings = self._folder(), self._settings

        def is_open(path: str) -> bool:
            with self._lock:
                return self._is_open(path) and not self._held_by_other(path, "", self._clock())

        if not self._remaining():
            with self._lock, contextlib.suppress(OSError):
                tables.write_proposal(settings.output, [])
            return
        chosen = self._choose(folder, settings, is_open, self._worker.report)
        with self._lock:
            former_predictions = {
                path: image.predicted for path, image in self._predictions.items()
            }
            current_predictions = {
                path: image.predicted for path, image in chosen.predictions.items()
            }
            kappa, size = standing.kappa(former_predictions, current_predictions)
            batches = self._book.log.batches
            if batches and batches[-1].num_labeled == len(folder.labels):
                kappa = None  # No new label: the model is the same, and agrees with itself.
            proposed = choosing.mix(chosen, settings.config.seed, self._round)
            proposed = [image for image in proposed if is_open(image.path)]
            paths = {image.path for image in proposed}
            batch = Batch(
                self._round + 1,
                len(folder.labels) if chosen.predictions else 0,
                [image.path for image in chosen.query if image.path in paths],
                [image.path for image in chosen.audit if image.path in paths],
                kappa,
                size,
                self._clock(),
            )
            tables.write_proposal(settings.output, proposed, settings.table)
            settings.output.with_suffix(".png").unlink(missing_ok=True)  # It shows another batch.
            self._book.log.add([batch])
            self._queue = {image.path: image for image in proposed}
            self._predictions = chosen.predictions
            at_random = answers.AUDIT if chosen.predictions else answers.RANDOM
            self._kind |= dict.fromkeys(batch.query, answers.QUERY)
            self._kind |= dict.fromkeys(batch.audit, at_random)
            self._shuffle(self._choosable())
        self._on_round(folder, chosen, batch)

    def _review(self) -> None:
        folder = self._folder()
        if len(folder.class_names) < 2:
            raise UserError("labels of two classes are needed to look for wrong ones")
        on_progress = lambda done, total: self._worker.report(
            "looking for labels that may be wrong", done / total
        )
        found = review.suspects(folder, self._settings.config, on_progress)
        with self._lock:
            self._suspects = found


def _identifier(path: str) -> str:
    """Returns an identifier that every session gives this path, so that open pages stay valid."""
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
