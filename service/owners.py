"""Whose each push is: a second token of the same role can neither join it nor commit it."""

from __future__ import annotations

import threading
from collections import OrderedDict

from weight_update.errors import DeniedError

from .guard import caller

MAX_PUSHES = 1024  # that are remembered; only the newest can be open


class Owners:
    """Names of those who began the last pushes; where no tokens are asked for, all have the same."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # guards both
        self._of_push: OrderedDict[str, str] = OrderedDict()
        self._of_transaction: OrderedDict[int, str] = OrderedDict()

    def claim(self, push_id: str) -> None:
        """The caller begins this push, or renews its lease; DeniedError where another one did before."""
        with self._guard:
            if self._of_push.setdefault(push_id, caller().name) != caller().name:
                raise DeniedError(f"push {push_id!r} was begun by {self._of_push[push_id]!r}; choose an id of your own")
            while len(self._of_push) > MAX_PUSHES:
                self._of_push.popitem(last=False)

    def begun(self, push_id: str, transaction: int) -> None:
        """It is this transaction now."""
        with self._guard:
            self._of_transaction[transaction] = self._of_push.get(push_id, caller().name)
            while len(self._of_transaction) > MAX_PUSHES:
                self._of_transaction.popitem(last=False)

    def require(self, transaction: int) -> None:
        """DeniedError where this transaction is another one's."""
        with self._guard:
            owner = self._of_transaction.get(transaction, caller().name)
        if owner != caller().name:
            raise DeniedError(f"transaction {transaction} was begun by {owner!r}; begin a push of your own")
