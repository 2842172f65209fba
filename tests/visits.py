"""Somebody who labels on the page of dynamical-label: asks for all that it has, and answers."""

import logging
import pathlib
import re
import time

from starlette.testclient import TestClient

import dynamical_jax as dj

HERE = "http://127.0.0.1:8765"


class Visit:
    """Takes the place of the server's loop: patch it for `uvicorn.Server.run`.

    Args:
      table: of labels, as the program writes it.
      images: the folder of images.
      seconds: to wait for the session's thread.
      damage: called when the session has begun, and waits for nothing.
      review: whether to look for wrong labels, too, for which models are trained.

    Attributes:
      refusals: what the page was told by requests that were refused.
      error: what the session's thread says of its last job.
    """

    def __init__(self, table, images, seconds, damage=lambda: None, review=False):
        self.table, self.images, self.seconds = pathlib.Path(table), images, seconds
        self.damage, self.review = damage, review
        self.refusals, self.error = [], ""

    def __call__(self, server, sockets=None):
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        # An exception that the page does not answer is raised here.
        self.browser = TestClient(server.config.app, base_url=HERE, follow_redirects=False)
        self.token = server.config.app._token
        self.wait()
        self.damage()
        for page in ("", "page.css", "page.js", "icon.svg", "status", "progress"):
            assert self.ask(page).status_code == 200, page
        for file in ("labels.csv", "predictions.csv", "label-studio.json"):
            self.ask(file)
        (one, *others) = self.ask_json("next", count=3).get("offers", []) or [None]
        for offer in filter(None, (one, *others)):
            for size in ("thumb", "large", "full"):
                self.ask(f"image/{size}/{offer['id']}")
        self.ask_json("class", name="a", sure=True)
        if one is not None:
            self.answer(one)
            self.ask_json("undo")
        self.ask_json("grid")
        for offer in (one, *others):
            if offer is not None:
                self.answer(offer)
        if self.review:
            self.ask_json("review")
        self.wait()
        self.ask_json("sort")

    def answer(self, offer):
        """What is answered is on disk before the page hears of it."""
        said = self.ask_json("answer", given=[{"id": offer["id"], "what": "label", "label": "a"}])
        if "offers" in said:
            labels = dj.labeling.read_labels(self.table, self.images).by_path
            assert labels.get(offer["name"]) == "a", offer

    def wait(self):
        end = time.monotonic() + self.seconds
        while (status := self.ask("status").json()["status"])["doing"]:
            if time.monotonic() > end:
                raise TimeoutError(status["doing"])
            time.sleep(0.01)
        self.error = status["error"] or self.error
        # It shows all errors; those that are no `UserError` with their type.
        assert not re.match(r"\w+Error: ", status["error"]), status["error"]

    def ask(self, page, **body):
        address = f"/{self.token}/{page}"
        if body:
            body = {"client": "tab", **body}
            response = self.browser.post(address, json=body, headers={"origin": HERE})
        else:
            response = self.browser.get(address)
        assert response.status_code in (200, 400, 415), (page, response.status_code, response.text)
        if response.status_code == 400:
            why = response.json()["error"]
            assert len(why.splitlines()) == 1, why
            self.refusals.append(why)
        return response

    def ask_json(self, page, **body):
        return self.ask(page, who="me", **body).json()
