"""Label a folder of images in the browser.

  dynamical-label photos/

prints an address and opens the browser there. Press a key for a class, and the next picture comes;
when a batch is done, the model is trained and chooses the next one, while pictures drawn at random
come. Each label is in labels.csv (columns path, relative to the folder, and label) before the next
picture is shown. Ctrl-C ends it at any time, and the same command goes on.

The files are those of dynamical-select, labels.csv, to_label.csv and so on in the folder where the
command is given: either program goes on where the other stopped. labels.answers.jsonl has all
answers, also those that were taken back.

Only this machine can reach the page, and only with the token in the address. From another one take
a tunnel: ssh -L 8765:127.0.0.1:8765 there, and open the address here.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import secrets
import socket
import sys
import threading
import webbrowser

import filelock
from absl import flags

from dynamical_jax import files, labeling, words
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options, person, strategy

AUDIT_FRACTION = flags.DEFINE_float(
    "audit_fraction",
    0.1,
    "Share of a batch that is drawn at random, which tells how good the model is.",
    lower_bound=0.0,
    upper_bound=1.0,
)
OPEN = flags.DEFINE_boolean("open", True, "Open the browser.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; by default this machine's.")
PORT = flags.DEFINE_integer(
    "port",
    None,
    "Port to listen on; by default 8765, or another where that is taken.",
    lower_bound=0,
    upper_bound=65535,
)
flags.adopt_module_key_flags(options)
flags.adopt_module_key_flags(person)
flags.adopt_module_key_flags(strategy)

USUAL_PORT = 8765
STOPPED = "stopped; all labels are on disk, the same command goes on"


def start() -> None:
    """Runs this program: the console script dynamical-label."""
    binary.start(sys.modules[__name__])


def main(argv: list[str]) -> int | None:
    """Serves the page until it is interrupted; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), STOPPED)


def run(argv: list[str]) -> list[str]:
    """Serves the page; returns what failed: nothing."""
    program, *folders = argv
    binary.check_command_line([program, *folders[1:]], sys.modules[__name__])
    settings = check_flags(folders)
    for path in (settings.table, settings.output):
        files.check_writable(path)
    try:
        with filelock.FileLock(settings.output.with_suffix(".lock"), timeout=0):
            serve(settings)
    except filelock.Timeout as error:
        raise UserError(f"{settings.output} is in use by another process: wait for it") from error
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    return []


def check_flags(folders: list[str]) -> labeling.choosing.Settings:
    """Checks the command line before any work; returns the settings of the session."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError("the page needs more packages: pip install 'dynamical-jax[label]'")
    if len(folders) != 1 or not pathlib.Path(folders[0]).is_dir():
        raise UserError(
            f"a folder of images must be given, as in dynamical-label photos; got "
            f"{folders[0] if folders else 'none'}"
        )
    output = person.check_tables(folders[0], {})
    chosen, config = person.strategy_and_config()
    return labeling.choosing.Settings(
        folders[0],
        pathlib.Path(person.LABELS.value),
        output,
        chosen,
        config,
        person.read_options(),
        options.BATCH_SIZE.value,
        AUDIT_FRACTION.value,
        tuple(person.CLASSES.value),
    )


def serve(settings: labeling.choosing.Settings) -> None:
    """Serves the page of a session until Ctrl-C."""
    import uvicorn  # here, because without the extra there is neither

    from dynamical_jax.labeling import server

    token = secrets.token_urlsafe(24)
    session = labeling.Session(settings, on_round=functools.partial(record, settings))
    if session.num_taken_over:
        number = words.count(session.num_taken_over, "label")
        print(f"{number} of {settings.output} added to {settings.table}")
    app = server.create(session, token, pathlib.Path(settings.images), settings.table, HOST.value)
    listener = listen(HOST.value, PORT.value)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    with listener, contextlib.ExitStack() as stack:
        session.start()
        stack.callback(leave, session)
        port = listener.getsockname()[1]
        if not server.is_loopback(HOST.value):
            print(
                f"warning: whoever reaches port {port} of this machine and knows the address (with "
                "this machine's name in it) can see the images and label them, and what is sent is "
                "not encrypted",
                file=sys.stderr,
            )
        address = f"http://{browser_host(HOST.value)}:{port}/{token}/"
        print(f"{words.count(len(session.paths), 'image')}, {len(session.labels)} labeled")
        print(f"Open {address} in a browser; Ctrl-C here ends it", flush=True)
        if OPEN.value:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])
        # Only a signal ends it, which it raises again; a callback of XLA may have swallowed that.
        raise KeyboardInterrupt


def leave(session: labeling.Session) -> None:
    """Ends a session; a compiler or a long computation that does not end soon is not waited for."""
    if not session.close(timeout=2.0):
        print(STOPPED, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # All that counts is on disk; to unwind the interpreter under a running thread may crash it.
        os._exit(130)


def listen(host: str, port: int | None) -> socket.socket:
    """Returns a socket that listens.

    Args:
      host: address or name.
      port: None for the usual one, or any if that is taken.

    Raises:
      UserError: if it cannot.
    """
    ports = [USUAL_PORT, 0] if port is None else [port]
    for number in ports:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family)
        except UnicodeError as error:  # No name of a host is so long.
            raise UserError(f"cannot listen on {host}: there is no such host") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE and number != ports[-1]:
                continue
            raise UserError(
                f"cannot listen on {host}, port {number}: {error.strerror or error}"
            ) from error
    raise AssertionError


def browser_host(host: str) -> str:
    """Returns the name by which a browser on this machine reaches a host address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "localhost"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def record(
    settings: labeling.choosing.Settings,
    folder: labeling.Folder,
    chosen: labeling.choosing.Chosen,
    batch: labeling.answers.Batch,
) -> None:
    """Writes a round's line of the log that dynamical-select writes, too."""
    facts = chosen.facts or {"strategy": "random"}  # There is no model yet.
    line = person.record(sys.modules[__name__], settings.images, folder, facts, batch.query)
    files.append(settings.output.with_suffix(".jsonl"), {**line, "audit": batch.audit})
