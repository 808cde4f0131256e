"""What a server's run config may ask of a participant that has a file of its own."""

from collections.abc import Mapping

import pytest

from common.config import RunConfig, declared
from common.errors import ConfigError

OWN = {"client-id": "a"}


def ask(run: Mapping[str, int], node: Mapping[str, str | int]) -> None:
    declared(tuple(RunConfig.parse(run).flat().items()), tuple(node.items()))


@pytest.mark.parametrize(("key", "most"), [("local-epochs", 50), ("batch-size", 1024)])
def test_work_has_a_cap_that_the_participant_sets(key: str, most: int) -> None:
    ask({key: most}, OWN)
    with pytest.raises(ConfigError, match=rf"client a: .*{key} = {most + 1}; .*max-{key} = {most}"):
        ask({key: most + 1}, OWN)
    ask({key: most + 1}, OWN | {f"max-{key}": most + 1})
    with pytest.raises(ConfigError, match=rf"max-{key} = 2"):
        ask({key: 3}, OWN | {f"max-{key}": 2})
    ask({key: most + 1}, {"partition-id": 0})
