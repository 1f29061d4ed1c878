"""Lists a page at a time, as OpenAI's clients turn them: `after` is the id of the last item that was seen."""

from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlalchemy import Executable, Select
from sqlalchemy.orm import Session

from jaxtune.serve.api.errors import ApiError

R = TypeVar("R", bound=Any)

After = Annotated[str | None, Query(max_length=512)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def page(
    session: Session, rows: Select[Any], table: type[R], after: str | None, limit: int, newest_first: bool = True,
    gone: Executable | None = None,
) -> tuple[list[R], bool]:  # fmt: skip
    """A page of rows, and whether more follow.

    Args:
      session: to read with.
      rows: what is listed, of the caller's alone.
      table: whose `seq` orders and whose `id` is `after`.
      after: the id after which the page begins.
      limit: how many rows.
      newest_first: the order.
      gone: finds where `after` was, if it is in the list no more: who deletes what a page has asks for the next.

    Raises:
      ApiError: `after` is no id of what is listed; to begin anew would turn a client's pages for ever.
    """
    if after is not None:
        at = session.scalar(rows.where(table.id == after).with_only_columns(table.seq))
        if at is None and gone is not None:
            at = session.scalar(gone)
        if at is None:
            raise ApiError(400, f"Invalid 'after': no item {after} in this list.", "after", "invalid_value")
        rows = rows.where(table.seq < at if newest_first else table.seq > at)
    found = list(session.scalars(rows.order_by(table.seq.desc() if newest_first else table.seq).limit(limit + 1)))
    return found[:limit], len(found) > limit
