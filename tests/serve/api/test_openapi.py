"""What the service says of itself in /openapi.json, held against what it does: many odd requests, and no 500s."""

import pytest

pytest.importorskip("schemathesis")

import hypothesis
import schemathesis

from jaxtune.serve.api.app import make_app
from tests.serve.conftest import make_service

_HERE = {"Host": "localhost"}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    service = make_service(tmp_path_factory.mktemp("service"))
    found = schemathesis.openapi.from_asgi("/openapi.json", make_app(service), headers=_HERE)
    yield found.include(path_regex="^/v1/(files|uploads|fine_tuning|models|jaxtune/(audit|files))")
    service.database.close()


# What is well formed may still name a file that there is not.
_NOT_SAID = [schemathesis.checks.positive_data_acceptance]


def test_every_route_keeps_its_word(described):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) >= 20
    for operation in operations:
        wrong = [schemathesis.GenerationMode.NEGATIVE] if operation.body or operation.query else []
        for mode in (schemathesis.GenerationMode.POSITIVE, *wrong):

            @hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def keeps_its_word(case):
                case.call_and_validate(headers=_HERE, excluded_checks=_NOT_SAID)

            keeps_its_word()
