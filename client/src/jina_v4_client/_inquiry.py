"""The question which revision of the model serves a task: an agenda of one request."""

from typing import NoReturn

from jina_v4_client._dispatch import Job
from jina_v4_client._model import Task
from jina_v4_client._server import Known, check_revision, models_request, server_for
from jina_v4_client._wire import Reply
from jina_v4_client.errors import ServerError


class Inquiry:
    """Asks anew, whatever is known of the servers; this client goes on with the revision that it is told.

    Attributes:
        revision: that was told; None if the server does not tell.
    """

    def __init__(self, known: Known, task: Task) -> None:
        self.revision: str | None = None
        self.done = False
        self._known = known
        self._task = task
        self._questions = [Job(models_request())]

    def take(self) -> Job | None:
        """Give the one request."""
        return self._questions.pop() if self._questions else None

    def receive(self, _job: Job, reply: Reply) -> None:
        """Take in the reply."""
        try:
            server = server_for(self._known.learn(reply), self._task)
            check_revision(server, self._known.revisions.get(self._task))
        except ServerError as error:
            self.abandon(error)
        if server.revision is not None:
            self._known.revisions[self._task] = server.revision
        self.revision = server.revision
        self.done = True

    def fail(self, _job: Job, error: ServerError) -> None:
        """Take in that there is no answer."""
        self.abandon(error)

    def abandon(self, error: ServerError) -> NoReturn:
        """Take in that nothing more can be sent."""
        self._known.forget()
        raise error
