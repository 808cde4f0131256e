"""`mh-pfedhn superlink`: Flower's SuperLink, which takes from a node only what a node may say.

Flower checks who asks, and not in whose name the message is that it hands in: a participant could
speak as the SuperLink, to the ServerApp and to other participants; and a time that is no number
stays in its database, where every later pull stumbles over it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from flwr.common.constant import SUPERLINK_NODE_ID

from common.errors import WireError

MOST_PIECES = 4096
"""Of one reply."""


def add_superlink_parser(commands: Any) -> None:
    """Add `superlink` to the command line; its words are those of `flower-superlink`."""
    command = commands.add_parser(
        "superlink", help="run a SuperLink (words as of flower-superlink)", add_help=False,
        prefix_chars="\0",
    )  # fmt: skip
    command.add_argument("words", nargs="*")
    command.set_defaults(command=run_superlink)


def run_superlink(args: argparse.Namespace) -> int:
    """Run `flower-superlink` with these words; returns when it ends."""
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.servicer.fleet import fleet_handlers

    fleet_handlers.push_messages = guarded(fleet_handlers.push_messages)
    sys.argv = ["flower-superlink", *args.words]
    flower_superlink()
    return 0


def guarded(push_messages: Callable[..., Any]) -> Callable[..., Any]:
    """Return Flower's handler of fleet/push-messages, called only with what a node may hand in."""
    from flwr.supercore.error import ApiErrorCode, FlowerError

    def push_guarded(request: Any, state: Any) -> Any:
        try:
            require_reply(request)
        except WireError as error:
            raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, str(error)) from error
        return push_messages(request=request, state=state)

    return push_guarded


def require_reply(request: Any) -> None:
    """Raise WireError unless a PushMessagesRequest is one reply, in the name of who sends it."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise WireError("a node hands in one message at a time, with one tree of its pieces.")
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    node = request.node.node_id
    if metadata.src_node_id != node or metadata.dst_node_id != SUPERLINK_NODE_ID:
        raise WireError(
            f"node {node} hands in a message from {metadata.src_node_id} to "
            f"{metadata.dst_node_id}; it may send from itself to {SUPERLINK_NODE_ID} alone."
        )
    if not metadata.reply_to_message_id:
        raise WireError(f"node {node} hands in a message that answers none.")
    if not (math.isfinite(metadata.created_at) and 0 < metadata.ttl < math.inf):
        raise WireError(f"node {node}: created_at and ttl must be finite numbers.")
    if metadata.message_id != tree.object_id:
        raise WireError(f"node {node}: the pieces are of another message.")
    if not all(0 <= seconds < math.inf for seconds in request.clientapp_runtime_list):
        raise WireError(f"node {node}: a running time is no number of seconds.")
    if num_pieces(tree) > MOST_PIECES:
        raise WireError(f"node {node}: a reply has at most {MOST_PIECES} pieces.")


def num_pieces(tree: Any) -> int:
    """Count the pieces of a reply."""
    waiting, count = [tree], 0
    while waiting and count <= MOST_PIECES:
        waiting.extend(waiting.pop().children)
        count += 1
    return count
