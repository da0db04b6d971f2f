"""What a forked child must not touch: the sockets and event loops of its parent, whose copies it inherits."""

import os
import weakref
from typing import Any

_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()
# Collecting a loop or a transport would close descriptors that child and parent share.
_KEPT: list[object] = []


def watch(owner: Any) -> None:
    """Have something that holds sockets or a loop start anew in each forked child.

    Its `leave_to_parent` returns what the parent goes on using, so that the child never closes it.
    """
    _WATCHED.add(owner)


def _leave_all() -> None:
    _KEPT.extend([owner.leave_to_parent() for owner in list(_WATCHED)])


os.register_at_fork(after_in_child=_leave_all)
