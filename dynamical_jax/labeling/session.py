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
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynamical_jax import streams
from dynamical_jax.errors import UserError
from dynamical_jax.labeling import answers, learner, proposal, review, standing, tables
from dynamical_jax.labeling import folder as folders
from dynamical_jax.labeling.answers import Answer, Batch
from dynamical_jax.labeling.folder import Folder, Pictures
from dynamical_jax.labeling.learner import Config
from dynamical_jax.labeling.tables import Proposed
from dynamical_jax.store import Store
from dynamical_jax.strategies import Strategy

HOLD = 60.0
"""Seconds for which a picture that is shown to one is not handed out to another."""

RANDOM_AHEAD = 3
"""Images drawn at random that are handed out ahead, since the next batch may come any moment."""

LONGEST_NAME = 100
"""Characters of a class name."""

Report = Callable[[str, float | None], None]
"""Called with the name of the current task, and the share of it that is done, if known."""


class Settings(NamedTuple):
    """The configuration of a session.

    Attributes:
      images: the folder.
      table: of labels.
      output: table of images to label next; the model is beside it.
      strategy: asks for images; one without a state.
      config: of the model.
      decoding: options of `images.decode`.
      batch_size: images of a batch.
      audit_fraction: share of them that is drawn at random.
      classes: names that are there from the beginning.
    """

    images: str
    table: pathlib.Path
    output: pathlib.Path
    strategy: Strategy
    config: Config
    decoding: Mapping[str, Any]
    batch_size: int = 25
    audit_fraction: float = 0.1
    classes: tuple[str, ...] = ()

    @property
    def store(self) -> Store:
        """Where the model is kept, as `dynamical-select` does."""
        return Store(self.output.with_suffix(".checkpoint"))


class Chosen(NamedTuple):
    """The images to label next.

    Attributes:
      query: images that the strategy chose, its first choice first.
      audit: images drawn at random.
      predictions: path → prediction, for all images without a label.
      facts: of the training, for the records; empty where there is no model.
    """

    query: list[Proposed]
    audit: list[Proposed]
    predictions: dict[str, Proposed]
    facts: dict[str, Any]


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


class _StoppedError(Exception):
    """Ends the task of the thread when the session is closed."""


def choose(
    folder: Folder, settings: Settings, is_open: Callable[[str], bool], report: Report
) -> Chosen:
    """Trains, predicts, and asks the strategy; returns the images to label next.

    Random images are drawn first, from all images without a label: if they were drawn from those
    that the strategy leaves over, the model would look better than it is.

    Args:
      folder: the images, and what is labeled.
      settings: of the session.
      is_open: whether a path may be asked for; called when the model is trained.
      report: called with the name of the current task.
    """
    config, size = settings.config, settings.batch_size

    def restricted() -> Folder:
        rows = [row for row in folder.unlabeled if is_open(folder.paths[row])]
        return folder._replace(unlabeled=np.array(rows, int))

    if len(folder.class_names) < 2:
        return Chosen([], proposal.draw(restricted(), size, config.seed), {}, {})
    model, facts = train(folder, settings, report)
    scoring = lambda done, total: report("looking at all images", done / total)
    predictions = predict(folder, model, scoring)
    left = restricted()
    num_audit = min(len(left.unlabeled), int(settings.audit_fraction * size + 0.5))
    generator = streams.generator(config.seed, "draws", len(folder.labels))
    rows = generator.choice(left.unlabeled, num_audit, replace=False)
    audit = [predictions[folder.paths[row]] for row in rows]
    left = left._replace(unlabeled=np.setdiff1d(left.unlabeled, rows))
    query = []
    if len(left.unlabeled) and size > num_audit:
        scoring = lambda done, total: report("choosing what to ask for", done / total)
        wanted = size - num_audit
        query = proposal.choose(settings.strategy, left, model, wanted, config.seed, scoring)
    return Chosen(query, audit, predictions, facts)


def train(
    folder: Folder, settings: Settings, report: Report
) -> tuple[learner.Learner, dict[str, Any]]:
    """Trains the model on all labels and saves it; returns it, and facts about the training.

    Args:
      folder: has labels of at least two classes.
      settings: of the session.
      report: called with the name of the current task.
    """
    config, store = settings.config, settings.store
    report("training", None)
    start = learner.warm_start(folder, config, store)
    if start.fit is not None:
        return start.learner, start.fit
    target, first = config.training.largest_loss(len(folder.labeled)), None

    def on_epoch(progress: Any, seen: Any) -> None:
        nonlocal first
        text, done = f"training, pass {progress.epoch} over the labels", None
        if seen is not None and target is not None:
            first = max(first or seen.loss, target * 1.001)
            passed = np.log(first / max(seen.loss, 1e-12)) / np.log(first / target)
            done = float(np.clip(passed, 0, 1))
        report(text, done)

    return learner.train(start, folder, config, store, on_epoch)


def predict(
    folder: Folder, model: learner.Learner, on_progress: Callable[[int, int], None]
) -> dict[str, Proposed]:
    """Returns path → prediction of all images without a label, copies included."""
    rows = np.setdiff1d(folder.readable, folder.labeled)
    if not len(rows):
        return {}
    images = proposal.predict(folder, model, rows, on_progress)
    return {image.path: image for image in images}


class Session:
    """Hands out the images of a folder to one or several people, and takes their labels.

    All methods may be called from any thread.

    Args:
      settings: the configuration.
      choose_next: called instead of `choose`.
      on_round: called in the session's thread when a batch is chosen, with the folder, what was
        chosen, and the batch.
      clock: seconds since 1970.

    Raises:
      UserError: if there are no images, or the tables cannot be read or contradict each other.
    """

    def __init__(
        self,
        settings: Settings,
        choose_next: Callable[..., Chosen] = choose,
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
        self._log = answers.Log(answers.beside(settings.table))
        self._labels = dict(update.labels)
        self._in_table = set(self._labels)
        self._stamp = self._table_stamp()
        self._broken = answers.broken(self._log.answers) - set(self._labels)
        self._skipped: set[str] = set()
        self._classes = list(self._log.classes)
        self._take_classes([*map(class_name, settings.classes), *self._labels.values()])
        self._history = _histories(self._log.answers)
        self._group = max((answer.group for answer in self._log.answers), default=0)
        self._held: dict[str, list[str]] = {}
        self._lease: dict[str, tuple[str, float]] = {}
        self._kind: dict[str, str] = {}
        self._pictures: Pictures | None = None
        self._originals: set[str] = set()
        self._predictions: dict[str, Proposed] = {}
        self._shuffle(self.paths)  # Nobody waits until they are read.
        self._suspects: list[review.Suspect] | None = None
        self._queue = self._last_batch()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending_jobs: set[str] = set()
        self._doing, self._share, self._error = "", None, ""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="labeling", daemon=True)

    def __enter__(self) -> "Session":
        self.start()
        return self

    def start(self) -> None:
        """Starts the thread, which first reads the images."""
        self._thread.start()
        with self._lock:
            if any(map(self._is_open, self._queue)):
                self._add_job("the model", self._load)
            else:
                self._add_job("the next batch", self._next_batch)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, timeout: float | None = None) -> bool:
        """Stops the current task; returns whether it has stopped.

        No label is lost. A batch that was not chosen yet is chosen by the next session.

        Args:
          timeout: seconds to wait; by default as long as it takes.
        """
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def labels(self) -> dict[str, str]:
        """The present labels, path → class name."""
        with self._lock:
            return dict(self._labels)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order in which they were added; none is ever removed."""
        with self._lock:
            return list(self._classes)

    @property
    def log(self) -> answers.Log:
        """The log of all answers; callers only read it."""
        return self._log

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
          UserError: if there is no such image or class, or the table cannot be written. Then
            nothing was taken.
        """
        with self._lock:
            paths = [self._path_of_identifier(one.id) for one in new_answers]
            for one in new_answers:
                if one.what not in (answers.LABEL, answers.SKIP, answers.BROKEN):
                    raise UserError(f"unknown answer {one.what!r}")
                if one.what == answers.LABEL and one.label not in self._classes:
                    raise UserError(f"there is no class {one.label!r}: add it first")
            self._group += 1
            before = [self._state(path) for path in paths]
            entries = [
                self._entry(path, one, client, who)
                for path, one in zip(paths, new_answers, strict=True)
            ]
            conflicts = list(self._conflicts(entries))
            self._save(
                {
                    path: one.label if one.what == answers.LABEL else None
                    for path, one in zip(paths, new_answers, strict=True)
                    if one.what == answers.LABEL
                    or (one.what == answers.BROKEN and path in self._labels)
                }
            )
            self._log.add(entries)
            for path, one in zip(paths, new_answers, strict=True):
                self._broken.discard(path)
                self._skipped.discard(path)
                if one.what == answers.BROKEN:
                    self._broken.add(path)
                elif one.what == answers.SKIP and path not in self._labels:
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
            self._save(
                {
                    path: label or None
                    for path, label in labels.items()
                    if self._labels.get(path, "") != label
                }
            )
            self._group += 1
            self._log.add(
                [
                    self._entry(path, NewAnswer("", answers.UNDO, label), client, who)
                    for path, label in labels.items()
                ]
            )
            history.pop()
            for path, state in steps:
                self._skipped.discard(path)
                self._broken.discard(path)
                if state.broken:
                    self._broken.add(path)
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
        name = class_name(name)
        with self._lock:
            self._take_classes([name])
        return name

    def review(self) -> None:
        """Starts the search for labels that may be wrong, in the session's thread."""
        with self._lock:
            self._add_job("labels that may be wrong", self._review)

    def status(self) -> dict[str, Any]:
        """Returns the numbers that the page shows beside the picture, as JSON values."""
        with self._lock:
            counts = Counter(self._labels.values())
            left = sum(map(self._is_open, self._queue))
            return {
                "classes": [{"name": name, "count": counts[name]} for name in self._classes],
                "images": len(self.paths),
                "labeled": len(self._labels),
                "aside": len(self._broken) + len(self._skipped),
                "batch": {"size": len(self._queue), "left": left, "round": self._round},
                "doing": self._doing,
                "share": self._share,
                "error": self._error,
                "finished": not left and not self._doing and not self._remaining(),
                "has_model": bool(self._predictions),
            }

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the session, as JSON values; `standing` explains the numbers."""
        with self._lock:
            log = (list(self._log.answers), list(self._log.batches))
            labels, suspects = dict(self._labels), self._suspects
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
            aside = self._labels.keys() | self._broken
            return [image for path, image in self._predictions.items() if path not in aside]

    def wait(self, timeout: float = 60.0) -> None:
        """Waits until the thread has no task.

        Raises:
          TimeoutError: if that takes longer than `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while self._pending_jobs:
            if time.monotonic() > end:
                raise TimeoutError(f"still {self._doing} after {timeout} s")
            time.sleep(0.01)

    # The methods below are called with the lock held, except for the tasks of the thread.

    @property
    def _round(self) -> int:
        return len(self._log.batches)

    def _path_of_identifier(self, identifier: str) -> str:
        path = self._path_of.get(identifier)
        if path is None:
            raise UserError("there is no such image")
        return path

    def _is_open(self, path: str) -> bool:
        """Whether an image may be asked for."""
        return not (path in self._labels or path in self._broken or path in self._skipped)

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
        learned = {first[path] for path in self._labels}
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
                return path
        return None

    def _shuffle(self, paths: Iterable[str]) -> None:
        """Sets the order in which random images are handed out."""
        order = sorted(paths)
        generator = streams.generator(self._settings.config.seed, "draws", self._round, 1)
        generator.shuffle(order)
        self._drawn = order

    def _offer(self, path: str) -> Offer:
        guess = self._guess(path)
        kind = self._kind.get(path, answers.AGAIN)
        label = self._labels.get(path, "")
        return Offer(self._id_of[path], path, kind, guess.predicted, guess.confidence, label)

    def _guess(self, path: str) -> Proposed:
        """Returns the prediction of the newest model that was not trained on the image."""
        return self._predictions.get(path) or self._queue.get(path) or Proposed(path)

    def _state(self, path: str) -> "_State":
        return _State(self._labels.get(path, ""), path in self._broken)

    def _entry(self, path: str, new_answer: NewAnswer, client: str, who: str) -> Answer:
        guess = self._guess(path)
        kind = answers.AGAIN if path in self._labels else self._kind.get(path, answers.AGAIN)
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
        )

    def _last_client(self, path: str) -> str:
        """Returns the client that gave the last answer to an image."""
        of_path = (one.client for one in reversed(self._log.answers) if one.path == path)
        return next(of_path, "")

    def _conflicts(self, entries: Iterable[Answer]) -> Iterator[Conflict]:
        for entry in entries:
            before = self._labels.get(entry.path, "")
            if entry.what != answers.LABEL or not before or before == entry.label:
                continue
            last = [one for one in self._log.answers if one.path == entry.path]
            if not last or last[-1].client != entry.client:
                who = last[-1].who if last else "the table"
                yield Conflict(entry.path, entry.label, before, who)

    def _save(self, changes: Mapping[str, str | None]) -> None:
        """Changes labels, in the table first."""
        if not changes:
            return
        settings = self._settings
        try:
            with tables.locked(settings.table):
                # A table that is as this session left it need not be read row by row.
                unchanged = self._stamp == self._table_stamp()
                if unchanged and all(changes.values()) and not self._in_table & set(changes):
                    tables.add_labels(settings.table, changes)
                else:
                    tables.change_labels(settings.table, changes, settings.images)
                if unchanged:
                    self._stamp = self._table_stamp()
        except OSError as error:
            raise UserError(f"cannot write {settings.table}: {error.strerror}") from error
        self._in_table |= set(changes)
        for path, label in changes.items():
            if label is None:
                self._labels.pop(path, None)
            else:
                self._labels[path] = label

    def _table_stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._settings.table.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _take_classes(self, names: Iterable[str]) -> None:
        """Adds new classes, also to the log, so that a class keeps its position, and its key."""
        if new := [name for name in dict.fromkeys(names) if name not in self._classes]:
            self._log.add(new)
            self._classes += new

    def _last_batch(self) -> dict[str, Proposed]:
        """Returns the rest of the batch of the last session, or of `dynamical-select`."""
        output, images = self._settings.output, self._settings.images
        proposed = tables.read_proposal(output, images)
        if tables.read_labels(output, images).by_path:
            # They are in the table of labels now, and there they may change.
            tables.write_proposal(output, proposed, self._settings.table)
        batches = self._log.batches
        audit = set(batches[-1].audit) if batches else set()
        known = {image.path: image for image in proposed if image.path in self._id_of}
        for path, image in known.items():
            at_random = answers.AUDIT if path in audit else answers.QUERY
            self._kind[path] = at_random if image.predicted else answers.RANDOM
        return known

    def _after_answers(self) -> None:
        if not any(map(self._is_open, self._queue)):
            self._add_job("the next batch", self._next_batch)

    def _add_job(self, name: str, job: Callable[[], None]) -> None:
        """Queues a job for the thread, unless it is queued already."""
        if name not in self._pending_jobs:
            self._pending_jobs.add(name)
            self._doing = self._doing or "starting"
            self._jobs.put(lambda: self._run_job(name, job))

    # The thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _run_job(self, name: str, job: Callable[[], None]) -> None:
        """Runs a job; its error is shown, and random pictures are handed out from then on."""
        error = ""
        try:
            job()
        except _StoppedError:
            return
        except UserError as wrong:
            error = str(wrong)
        except Exception as wrong:  # The person goes on labeling whatever the model does.
            error = f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}"
        with self._lock:
            if error and name == "the next batch":
                self._fall_back()
            self._pending_jobs.discard(name)
            self._error = error
            self._doing, self._share = ("starting" if self._pending_jobs else ""), None

    def _fall_back(self) -> None:
        """Makes a batch of random images after the choice of a batch failed."""
        paths = [path for path in reversed(self._drawn) if self._is_open(path)]
        self._queue = {path: self._guess(path) for path in paths[: self._settings.batch_size]}
        self._kind |= dict.fromkeys(self._queue, answers.RANDOM)

    def _report(self, text: str, share: float | None) -> None:
        if self._closing:
            raise _StoppedError
        self._doing, self._share = text, share

    def _folder(self) -> Folder:
        """Returns the images and the labels of the table, which other programs may have changed."""
        settings = self._settings
        if self._pictures is None:
            self._report("reading the images", None)
            pictures = folders.read(settings.images, self.paths, **settings.decoding)
            with self._lock:
                self._pictures = pictures
                self._shuffle(self._choosable())
        with self._lock:
            self._reread_table()
            return folders.with_labels(self._pictures, self._labels)

    def _reread_table(self) -> None:
        stamp = self._table_stamp()
        if stamp == self._stamp:
            return
        labels = tables.read_labels(self._settings.table, self._settings.images).by_path
        self._labels = {path: label for path, label in labels.items() if path in self._id_of}
        self._in_table |= set(labels)
        self._stamp = stamp
        self._broken -= set(self._labels)
        self._take_classes(self._labels.values())

    def _load(self) -> None:
        """Reads the images, and predicts their classes with the saved model."""
        folder, settings = self._folder(), self._settings
        if len(folder.class_names) < 2:
            return
        start = learner.warm_start(folder, settings.config, settings.store)
        if start.round_index == 0 or start.former_description is not None or start.new_classes:
            return  # There is none that knows these classes.
        predictions = predict(
            folder,
            start.learner,
            lambda done, total: self._report("looking at all images", done / total),
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
        chosen = self._choose(folder, settings, is_open, self._report)
        with self._lock:
            former_predictions = {
                path: image.predicted for path, image in self._predictions.items()
            }
            current_predictions = {
                path: image.predicted for path, image in chosen.predictions.items()
            }
            kappa, size = standing.kappa(former_predictions, current_predictions)
            if self._log.batches and self._log.batches[-1].num_labeled == len(folder.labels):
                kappa = None  # No new label: the model is the same, and agrees with itself.
            proposed = _mix(chosen, settings.config.seed, self._round)
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
            self._log.add([batch])
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
        on_progress = lambda done, total: self._report(
            "looking for labels that may be wrong", done / total
        )
        found = review.suspects(folder, self._settings.config, on_progress)
        with self._lock:
            self._suspects = found


class _State(NamedTuple):
    """The state of an image before an answer, for undo."""

    label: str
    broken: bool


def class_name(name: str) -> str:
    """Returns a class name as it is written to tables, without surrounding spaces.

    Raises:
      UserError: if it is empty, too long, or not of one line of printable characters.
    """
    name = name.strip()
    if not name:
        raise UserError("a class needs a name")
    if len(name) > LONGEST_NAME:
        raise UserError(f"a class name has at most {LONGEST_NAME} characters, not {len(name)}")
    if not name.isprintable():
        raise UserError("a class name is one line of printable characters")
    return name


def _identifier(path: str) -> str:
    """Returns an identifier that every session gives this path, so that open pages stay valid."""
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _mix(chosen: Chosen, seed: int, number: int) -> list[Proposed]:
    """Returns the query in its order, with the random images at random positions."""
    total = len(chosen.query) + len(chosen.audit)
    generator = streams.generator(seed, "draws", number, 2)
    places = set(generator.permutation(total)[: len(chosen.audit)].tolist())
    query, audit = iter(chosen.query), iter(chosen.audit)
    return [next(audit if place in places else query) for place in range(total)]


def _histories(log: Iterable[Answer]) -> dict[str, list[list[tuple[str, _State]]]]:
    """Returns the answers that each client may take back, from the log of earlier sessions."""
    state: dict[str, _State] = {}
    histories: dict[str, list[list[tuple[str, _State]]]] = {}
    groups: dict[str, int] = {}
    for answer in log:
        history = histories.setdefault(answer.client, [])
        before = state.get(answer.path, _State("", False))
        if answer.what == answers.UNDO:
            if history and groups.get(answer.client) != -answer.group:
                history.pop()
                groups[answer.client] = -answer.group
            state[answer.path] = _State(answer.label, False)
            continue
        if groups.get(answer.client) != answer.group:
            history.append([])
            groups[answer.client] = answer.group
        history[-1].append((answer.path, before))
        if answer.what == answers.LABEL:
            state[answer.path] = _State(answer.label, False)
        elif answer.what == answers.BROKEN:
            state[answer.path] = _State("", True)
    return histories
